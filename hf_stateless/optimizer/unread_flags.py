"""Counting steps and reporting bad gradients where what says whether they were finite lies on a GPU, still unread."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..update.reads import Later, reads_at_once


class UnreadFlags:
    """Flags that lie on a device: steps are counted there, and the host hears of bad gradients without waiting.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.unread_flags import UnreadFlags
        >>> unread, steps = UnreadFlags(), [torch.zeros(1), torch.zeros(1)]
        >>> unread.count([4, 7], steps, torch.tensor([True, False]), lr=0.1)
        >>> steps, unread.read()
        ([tensor([1.]), tensor([0.])], [7])
    """

    def __init__(self) -> None:
        self.later = Later()
        """What else the host is told in a later step."""
        self._bad: list[int] = []

    def count(
        self,
        indices: Sequence[int],
        steps: Sequence[Tensor],
        finite: Tensor,
        lr: float | Tensor,
        usable: Sequence[Tensor | None] = (),
    ) -> None:
        """Add one to the counters of finite gradients, unless the learning rate is 0.

        Args:
            indices: positions of the parameters.
            steps: their one-element counters.
            finite: for each, whether its gradient was finite.
            lr: learning rate; a tensor on a device is not read back.
            usable: for each a flag that it was not held back, or None; what was is neither counted nor bad.
        """
        counted = finite
        if any(flag is not None for flag in usable):
            every = torch.ones_like(finite[0])
            flags = torch.stack([every if flag is None else flag for flag in usable])
            finite, counted = finite | ~flags, finite & flags
        self.watch(indices, finite)
        if isinstance(lr, Tensor) and (lr.device == finite.device or not reads_at_once(lr.device)):
            counted = counted & (lr.to(finite.device) != 0)
        elif float(lr) == 0:
            return
        torch._foreach_add_(list(steps), list(counted.to(steps[0].dtype).view(-1, 1).unbind()))

    def watch(self, indices: Sequence[int], finite: Tensor) -> None:
        """Have the positions whose gradients are not finite among those that a later `read` returns."""
        self.later.tell(finite, partial(self._hear, indices))

    def _hear(self, indices: Sequence[int], finite: Sequence[float]) -> None:
        self._bad += [index for index, good in zip(indices, finite, strict=True) if not good]

    def read(self, *, wait: bool = False) -> list[int]:
        """Return the positions of bad gradients that are known by now, each once for each time.

        Args:
            wait: wait for the device, so that all are known.
        """
        self.later.send()
        self.later.read(wait=wait)
        bad, self._bad = self._bad, []
        return bad

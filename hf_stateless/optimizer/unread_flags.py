"""Counting steps and reporting bad gradients where what says whether they were finite lies on a GPU, still unread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class UnreadFlags:
    """Flags that kernels wrote: steps are counted on the device, and the host reads all of them at once, or never.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.unread_flags import UnreadFlags
        >>> unread, steps = UnreadFlags(), [torch.zeros(1), torch.zeros(1)]
        >>> unread.count([4, 7], steps, torch.tensor([True, False]), lr=0.1)
        >>> steps, unread.read()
        ([tensor([1.]), tensor([0.])], [7])
    """

    def __init__(self) -> None:
        self._unread: list[tuple[Sequence[int], Tensor]] = []

    def count(self, indices: Sequence[int], steps: Sequence[Tensor], finite: Tensor, lr: float | Tensor) -> None:
        """Add one to the counters of finite gradients, unless the learning rate is 0.

        Args:
            indices: positions of the parameters.
            steps: their one-element counters.
            finite: for each, whether its gradient was finite.
            lr: learning rate; a tensor on the device is not read back.
        """
        self._unread.append((indices, finite))
        if isinstance(lr, Tensor) and lr.device == finite.device:
            counted = finite & (lr != 0)
        elif float(lr) != 0:
            counted = finite
        else:
            return
        torch._foreach_add_(list(steps), list(counted.to(steps[0].dtype).view(-1, 1).unbind()))

    def read(self) -> list[int]:
        """Return the positions whose gradients were not finite, and forget all; the host waits for the device here.

        While a graph is captured nothing can be waited for: what its replays find stays unread.
        """
        unread, self._unread = self._unread, []
        if not unread or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return []
        flags = torch.cat([finite.to(unread[0][1].device) for _, finite in unread]).tolist()
        indices = [index for some, _ in unread for index in some]
        return [index for index, good in zip(indices, flags, strict=True) if not good]

"""What the host may read at once, and what it learns later: on a GPU reading waits for all work queued there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batches import alike


# Where a number is read without waiting.
_READ_AT_ONCE = ("cpu",)


def reads_at_once(device: torch.device) -> bool:
    """Tell whether the host may read tensors of a device in a step: elsewhere every choice is made on the device.

    Example:
        >>> import torch
        >>> from hf_stateless.update.reads import reads_at_once
        >>> reads_at_once(torch.device("cpu")), reads_at_once(torch.device("cuda"))
        (True, False)
    """
    return device.type in _READ_AT_ONCE


def where_usable(usable: Tensor, factor: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return a factor of weights, 1 where nothing may move, made on the device without a copy from the host.

    Args:
        usable: a flag on the device.
        factor: a number, or a tensor on the device.
        dtype: of what is made of a number; 1 stays the number.

    Example:
        >>> import torch
        >>> from hf_stateless.update.reads import where_usable
        >>> where_usable(torch.tensor(True), 0.5, torch.float32), where_usable(torch.tensor(False), 0.5, torch.float32)
        (tensor(0.5000), tensor(1.))
    """
    if not isinstance(factor, Tensor):
        if factor == 1:
            return factor
        factor = torch.full_like(usable, factor, dtype=dtype)
    return torch.where(usable, factor, 1)


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return the flag that is set where both are; None stands for one that is."""
    if a is None or b is None:
        return b if a is None else a
    return a & b.to(a.device)


class Later:
    """Numbers that the host learns when the device has come to them, mostly in the next step: it never waits.

    Example:
        >>> import torch
        >>> from hf_stateless.update.reads import Later
        >>> later, heard = Later(), []
        >>> later.tell(torch.tensor([True, False]), heard.extend)
        >>> later.send()
        >>> later.read()
        >>> heard
        [1.0, 0.0]
    """

    def __init__(self) -> None:
        self._new: list[tuple[Tensor, Callable[[list[float]], Any]]] = []
        self._sent: list[tuple[Tensor, Any, list[tuple[int, Callable[[list[float]], Any]]]]] = []

    def tell(self, values: Tensor, then: Callable[[list[float]], Any]) -> None:
        """Have the host learn some numbers.

        Args:
            values: flags or numbers, told as float32.
            then: called with them, in the order in which they were told.
        """
        self._new.append((values.detach().reshape(-1), then))

    def send(self) -> None:
        """Start the copies of what was told; nothing is sent while a graph is captured, whose replays tell nobody."""
        new, self._new = self._new, []
        if is_capturing():
            return
        for same in alike(new, lambda one: one[0].device):
            flat = torch.cat([values.float() for values, _ in same])
            self._sent.append((*to_host(flat), [(len(values), then) for values, then in same]))

    def read(self, *, wait: bool = False) -> None:
        """Hand on what has arrived.

        Args:
            wait: wait for all that was told; without it what has not arrived comes in a later call.
        """
        if is_capturing():
            return
        if wait:
            self.send()
        sent, self._sent = self._sent, []
        for flat, event, receivers in sent:
            if event is not None and wait:
                event.synchronize()
            if event is None or event.query():
                values = flat.tolist()
                for size, then in receivers:
                    then(values[:size])
                    del values[:size]
            else:
                self._sent.append((flat, event, receivers))


def to_host(values: Tensor) -> tuple[Tensor, Any]:
    """Start a copy to the host, and return it with the event that tells when it is there; None where it is."""
    if values.device.type == "cpu":
        return values, None
    if values.is_meta:  # a prediction, where every number is 1
        return torch.ones(values.shape, device="cpu"), None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    event = torch.Event(values.device)
    event.record(torch.accelerator.current_stream(values.device))
    return copy, event


def is_capturing() -> bool:
    """Tell whether a CUDA graph is captured, when nothing can be waited for."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

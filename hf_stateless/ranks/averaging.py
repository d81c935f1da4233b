"""Averaging gradients over processes while backward goes on, for parameters that DDP was told to leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .placement import is_sharded


if TYPE_CHECKING:
    from torch.distributed import Work

# All-reduces in flight before the oldest is waited for: their gradients are what is held in memory.
_IN_FLIGHT = 2


def are_replicas(parameters: Iterable[Tensor]) -> bool:
    """Tell whether gradients have to be averaged: there are other processes, and FSDP2 does not do it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1 and not any(is_sharded(p) for p in parameters)


class Averaging:
    """Averages the gradients of one step, each as soon as it is there, in one order on all ranks.

    The parameters are gone through from the last to the first; one that is not ready keeps those behind it waiting.
    What a rank did not use is zero there. Communication has a process group of its own, since DDP's own all-reduces
    come in between at other places on each rank.

    Args:
        parameters: by index, in the order in which backward completes them, equal on all ranks.
        deliver: takes an index and the averaged gradient.
        process_group: of all processes that have replicas; not DDP's.
    """

    def __init__(
        self, parameters: Mapping[int, Tensor], deliver: Callable[[int, Tensor], None], process_group: Any
    ) -> None:
        self._parameters = parameters
        self._line = list(parameters)
        self._deliver = deliver
        self._process_group = process_group
        self._ready: set[int] = set()
        self._sent = 0
        self._in_flight: list[tuple[int, Tensor, Work]] = []

    def share_weights(self) -> None:
        """Give all ranks the weights of the first, as DDP does with what it manages."""
        for p in self._parameters.values():
            torch.distributed.broadcast(p.detach(), src=0, group=self._process_group)

    def offer(self, index: int) -> None:
        """Take in the gradient of a parameter, and send all whose turn it is."""
        self._ready.add(index)
        while not self.closed and self._line[self._sent] in self._ready:
            self._send()

    def close(self) -> None:
        """Send zeros for what this rank did not use, and deliver everything. All ranks have to come here."""
        while not self.closed:
            self._send()
        self._receive(keep=0)

    def reopen(self) -> None:
        """Start the next step."""
        self._ready.clear()
        self._sent = 0

    @property
    def closed(self) -> bool:
        """Whether everything was sent, so that a gradient that comes now is too late."""
        return self._sent == len(self._line)

    def _send(self) -> None:
        index = self._line[self._sent]
        p = self._parameters[index]
        grad = torch.zeros_like(p) if p.grad is None else p.grad.detach()
        p.grad = None
        grad = grad.contiguous().div_(torch.distributed.get_world_size(self._process_group))
        work = torch.distributed.all_reduce(grad, group=self._process_group, async_op=True)
        self._in_flight.append((index, grad, work))
        self._sent += 1
        self._receive(keep=_IN_FLIGHT)

    def _receive(self, keep: int) -> None:
        while len(self._in_flight) > keep:
            index, grad, work = self._in_flight.pop(0)
            work.wait()
            self._deliver(index, grad)

"""Layer-wise updates: the same optimizer step, run inside backward, so that a gradient lives for one layer only.

`LayerwiseUpdates` hooks the parameters of a `StatelessOptimizer`. When a gradient is complete the hook hands it to the
optimizer's own rule, with the learning rate the group has at that moment, and frees it; `step()` does what is left.
There is no second optimizer and nothing to save: checkpoints, schedulers and loggers see the one optimizer.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.state import GradientState
from torch import Tensor

from .sharding import is_sharded, whole_matrix


if TYPE_CHECKING:
    from torch.distributed import Work
    from torch.utils.hooks import RemovableHandle

# All-reduces in flight under DDP before the oldest is waited for: their gradients are what is held in memory.
_IN_FLIGHT = 2


_LIVE: weakref.WeakSet[LayerwiseUpdates] = weakref.WeakSet()


def released_norm(parameters: Iterable[Tensor]) -> Tensor | None:
    """Return the norm of the gradients of these parameters that backward has freed, or None if there are none.

    Args:
        parameters: those of a model, as for `torch.nn.utils.clip_grad_norm_`.

    Example:
        >>> import torch
        >>> from hf_stateless.layerwise import released_norm
        >>> released_norm([torch.ones(2)]) is None
        True
    """
    ids = {id(p) for p in parameters}
    norms = [updates.released_norm() for updates in _LIVE if updates.hooks_any(ids)]
    released = [norm for norm in norms if norm is not None]
    return torch.linalg.vector_norm(torch.stack(released)) if released else None


class UpdatesParameters(Protocol):
    """What the hooks need of the optimizer."""

    param_groups: list[dict[str, Any]]

    def update_parameter(self, index: int) -> None:
        """Apply the rule of its group to one parameter, given by its position among all parameters."""

    def name_of(self, index: int) -> str:
        """Return the name of a parameter for messages."""


class LayerwiseUpdates:
    """Drives a `StatelessOptimizer` from hooks on its parameters.

    Under DDP the hooks fire before DDP has averaged anything, so hooked parameters are kept out of DDP's buckets and
    averaged here, on a process group of their own and in one fixed order on all ranks (`step()` supplies zeros for
    those a rank did not use). Under FSDP2 the hooks fire after the reduce-scatter.

    Args:
        optimizer: the optimizer whose parameters are hooked.
        everything: also update the AdamW part in the hook, so that no gradient is left after backward; clipping is
            then impossible, since the norm is known only at the end.

    Raises:
        RuntimeError: a parameter gets a second gradient in one step, which would be a second update.
    """

    def __init__(self, optimizer: UpdatesParameters, *, everything: bool = False) -> None:
        self.optimizer = optimizer
        self.everything = everything
        self.held = False
        self._hooked: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._done: set[int] = set()
        self._norms: list[Tensor] = []
        self._sent = 0
        self._in_flight: list[tuple[int, Tensor, Work]] = []
        self._process_group: Any = None
        _LIVE.add(self)

    def hooks_any(self, ids: set[int]) -> bool:
        """Tell whether one of the parameters with these identities is updated in backward."""
        return any(id(p) in ids for p in self._hooked.values())

    def install(self) -> None:
        """Hook the parameters that are in the groups now; FSDP2 puts others there after the optimizer was made."""
        groups = self.optimizer.param_groups
        params = enumerate((group["algorithm"], p) for group in groups for p in group["params"])
        hooked = {i: p for i, (algorithm, p) in params if self.everything or algorithm == "multinorm"}
        if [id(p) for p in hooked.values()] == [id(p) for p in self._hooked.values()]:
            return
        self.remove()
        self._hooked = hooked
        self._handles = [p.register_post_accumulate_grad_hook(self._hook(i)) for i, p in hooked.items()]
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1 and not is_sharded(next(iter(hooked.values()))):
            self._process_group = self._process_group or torch.distributed.new_group()
            for p in hooked.values():  # DDP broadcasts only what it manages
                torch.distributed.broadcast(p.detach(), src=0, group=self._process_group)

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked = [], {}

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Let gradients accumulate in the backward passes inside: for all but the last of several in one step."""
        self.held = True
        try:
            yield
        finally:
            self.held = False

    def released_norm(self) -> Tensor | None:
        """Return the norm of all gradients that were released since the last step, or None if there are none."""
        self._send_rest()
        return torch.linalg.vector_norm(torch.stack(self._norms)) if self._norms else None

    def finish(self) -> None:
        """Complete what backward left undone; called by `step()` before the rest is updated."""
        self._send_rest()
        self._done.clear()
        self._norms.clear()
        self._sent = 0

    def _hook(self, index: int) -> Any:
        def update_in_backward(p: Tensor) -> None:
            # accelerate says for each micro-batch whether it is the last one; without accelerate it always is.
            if self.held or not GradientState().sync_gradients or p.grad is None:
                return
            if index in self._done:
                raise RuntimeError(_second_gradient(self.optimizer.name_of(index)))
            self._done.add(index)
            if self._process_group is None:
                self._apply(index, p.grad)
            else:
                self._send(lambda next_index: next_index in self._done)

        return update_in_backward

    def _apply(self, index: int, grad: Tensor) -> None:
        p = self._hooked[index]
        p.grad = grad
        self._norms.append(torch.linalg.vector_norm(whole_matrix(grad).float()))
        self.optimizer.update_parameter(index)
        p.grad = None

    def _send(self, may_go: Callable[[int], bool]) -> None:
        """Start the all-reduces whose turn it is: from the last parameter to the first, as backward runs."""
        order = list(self._hooked)[::-1]
        while self._sent < len(order) and may_go(order[self._sent]):
            p = self._hooked[order[self._sent]]
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = None
            grad.div_(torch.distributed.get_world_size(self._process_group))
            work = torch.distributed.all_reduce(grad, group=self._process_group, async_op=True)
            self._in_flight.append((order[self._sent], grad, work))
            self._receive(keep=_IN_FLIGHT)
            self._sent += 1

    def _send_rest(self) -> None:
        # A step before any backward has nothing to send, on any rank.
        if self._process_group is not None and self._done:
            self._send(lambda _: True)
            self._receive(keep=0)

    def _receive(self, keep: int) -> None:
        while len(self._in_flight) > keep:
            index, grad, work = self._in_flight.pop(0)
            work.wait()
            self._apply(index, grad)


def _second_gradient(name: str) -> str:
    return (
        f"{name} got a second gradient after it was updated in this step. For several backward passes per step put "
        "all but the last into `with optimizer.hold():`; if activation checkpointing re-enters a shared module, set "
        "gradient_checkpointing_kwargs={'use_reentrant': False}."
    )

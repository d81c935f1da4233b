"""Layer-wise updates: the same optimizer step, run inside backward, so that a gradient lives for one layer only.

`Release` hooks the parameters of a `StatelessOptimizer`. When a gradient is complete the hook hands it to the
optimizer's own rule, with the learning rate the group has at that moment, and frees it; `step()` does what is left.
There is no second optimizer and nothing to save: checkpoints, schedulers and loggers see the one optimizer.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.state import AcceleratorState, GradientState, is_initialized
from torch import Tensor

from ..ranks.averaging import Averaging, are_replicas
from ..ranks.placement import is_sharded, total_norm, wide_norm
from ..update.reads import reads_at_once
from .live import enter, unhook
from .rules import RULES


if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

RELEASES = ("matrices", "all")
"""What may be updated in backward: each value includes those before it."""
# Elements of a gradient whose norm is taken at once.
_PART = 1 << 20
# What stands in front of a layer's parameters: `model.layers.3`, up to the first number.
_BLOCK = re.compile(r"(?:\D[^.]*\.)*?\d+(?=\.)")


def block_of(name: str) -> str:
    """Return the name of the block whose sharded matrices are updated together; outside of layers, the parameter's.

    Args:
        name: of a parameter, as the model gives it.

    Example:
        >>> from hf_stateless.optimizer.release import block_of
        >>> block_of("model.layers.3.mlp.experts.5.up_proj.weight"), block_of("lm_head.weight")
        ('model.layers.3', 'lm_head.weight')
    """
    match = _BLOCK.match(name)
    return match.group() if match else name


def is_released(algorithm: str, release: str) -> bool:
    """Tell whether groups of an algorithm are updated in backward under a value of the option `release`."""
    return RULES[algorithm].released in RELEASES[: RELEASES.index(release) + 1]


class UpdatesParameters(Protocol):
    """What the hooks need of the optimizer."""

    param_groups: list[dict[str, Any]]

    def update_parameters(self, indices: Sequence[int], usable: Tensor | None = None) -> None:
        """Apply the rules of their groups to some parameters, given by their positions among all parameters."""

    def refuse_sparse(self, index: int, grad: Tensor) -> None:
        """Raise a ValueError for a gradient that is not dense."""

    def name_of(self, index: int) -> str:
        """Return the name of a parameter for messages."""


class Release:
    """Drives a `StatelessOptimizer` from hooks on its parameters.

    Under DDP the hooks fire before DDP has averaged anything, so hooked parameters are kept out of DDP's buckets and
    averaged here, over all processes; `create_optimizer` keeps them out. Under FSDP2 the hooks fire after the
    reduce-scatter, layer by layer; the matrices of a layer wait for each other, so that its collectives serve all.

    Args:
        optimizer: the optimizer whose parameters are hooked.
        released: `matrices`, or `all` to update the AdamW part in the hook too, so that no gradient is left after
            backward; clipping is then impossible, since the norm is known only at the end.
        order: names of the parameters as the model defines them. Averaging goes through them from the last to the
            first, as backward does; in another order gradients would wait for each other, and fill the memory.

    Raises:
        RuntimeError: in backward, when a parameter gets a gradient after its update in this step, or when
            torch.distributed was initialised after the hooks were installed.
        ValueError: accelerate runs with fp16.
    """

    def __init__(self, optimizer: UpdatesParameters, released: str, order: Sequence[str] = ()) -> None:
        # Weak, so that hooks go with an optimizer that is thrown away, and at once.
        self._optimizer = weakref.ref(optimizer)
        self.released = released
        self._position = {name: position for position, name in enumerate(order)}
        self.held = False
        self.asleep = False
        self._hooked: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._done: set[int] = set()
        self._blocks: dict[int, str] = {}
        self._sizes: Counter[str] = Counter()
        self._waiting: set[int] = set()
        self._norms: list[Tensor] = []
        self._averaging: Averaging | None = None
        self._process_group: Any = None
        self._end_queued = False
        weakref.finalize(optimizer, _take_off, self._handles).atexit = False
        enter(self)

    @property
    def optimizer(self) -> UpdatesParameters:
        """The optimizer whose parameters are hooked."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("The optimizer of these layer-wise updates was thrown away: create another one.")
        return optimizer

    @property
    def awake(self) -> bool:
        """Whether a backward pass of now is taken for one of training."""
        return bool(self._handles) and not self.asleep and self._optimizer() is not None

    @property
    def hooked(self) -> set[int]:
        """The identities of the parameters that are updated in backward."""
        return {id(p) for p in self._hooked.values()}

    def install(self) -> None:
        """Hook the parameters that are in the groups now; FSDP2 puts others there after the optimizer was made.

        Hooks that slept are awake then.
        """
        _refuse_fp16()
        self.asleep = False
        groups = self.optimizer.param_groups
        every = enumerate((group["algorithm"], p) for group in groups for p in group["params"])
        params = [(i, one) for i, one in every if one[1].requires_grad]  # others may be thawed before a later forward
        hooked = {i: p for i, (algorithm, p) in params if is_released(algorithm, self.released)}
        averages = bool(self._replicas())
        if averages:  # what DDP was not told to leave alone is in its buckets, and updated in `step()`
            hooked = {i: p for i, p in hooked.items() if getattr(p, "_ddp_ignored", False)}
        unchanged = [id(p) for p in hooked.values()] == [id(p) for p in self._hooked.values()]
        if unchanged and averages == (self._averaging is not None):
            return
        unhook([*self._hooked.values(), *hooked.values()])
        self._hooked = hooked
        self._blocks = {i: block_of(self.optimizer.name_of(i)) for i, p in hooked.items() if is_sharded(p)}
        self._sizes = Counter(self._blocks.values())
        if averages:
            self._average()
        # Under DDP any parameter tells that backward runs: a rank may use none of those that are hooked.
        listened = {i: p for i, (_, p) in params} if averages else hooked
        self._handles += [p.register_post_accumulate_grad_hook(self._hook(i)) for i, p in listened.items()]

    def _average(self) -> None:
        self._process_group = self._process_group or torch.distributed.new_group()
        line = sorted(self._hooked, key=self._place, reverse=True)
        self._averaging = Averaging({i: self._hooked[i] for i in line}, self._apply, self._process_group)
        self._averaging.share_weights()

    def _place(self, index: int) -> int:
        return self._position.get(self.optimizer.name_of(index), index)

    def remove(self) -> None:
        """Take all hooks off."""
        _take_off(self._handles)
        self.forget()
        self._hooked, self._averaging = {}, None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Let gradients accumulate in the backward passes inside: for all but the last of several in one step."""
        before, self.held = self.held, True
        try:
            yield
        finally:
            self.held = before

    def released_norm(self) -> Tensor | None:
        """Return the norm of all gradients that were released since the last step, or None if there are none."""
        if not self._accumulates():
            self._complete_step()
        return torch.linalg.vector_norm(torch.stack(self._norms)) if self._norms else None

    def finish(self) -> None:
        """Complete what backward left undone; called by `step()` before the rest is updated, on all ranks.

        Raises:
            RuntimeError: no hook was there, and nobody has averaged the gradients of replicas.
        """
        left = [p for p in self._replicas() if p.grad is not None] if not self._handles else []
        if any(getattr(p, "_ddp_ignored", False) for p in left):
            raise RuntimeError(_not_averaged())
        self._complete_step()
        self.forget()
        self.asleep = False  # training goes on

    def _replicas(self) -> list[Tensor]:
        """Return all parameters where DDP's other processes have them too; none beside any that is sharded."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return params if are_replicas(params) else []

    def _complete_step(self) -> None:
        self._release_waiting()
        if self._averaging:
            self._averaging.close()

    def forget(self) -> None:
        """Begin a step anew, whatever backward has done of the last one."""
        self._done.clear()
        self._waiting.clear()
        self._norms.clear()
        self._end_queued = False
        if self._averaging:
            self._averaging.reopen()

    def _accumulates(self) -> bool:
        # accelerate says for each micro-batch whether it is the last one; without accelerate it always is.
        return self.held or not GradientState().sync_gradients

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        reference = weakref.ref(self)  # an optimizer that was thrown away must not live on in the model, and update it

        def update_in_backward(p: Tensor) -> None:
            updates = reference()
            if updates is None or not updates.awake:
                return
            updates._expect_the_end()
            if p.grad is not None and index in updates._hooked:
                updates._complete(index, p.grad)

        return update_in_backward

    def _expect_the_end(self) -> None:
        """Have this rank answer the others at the end of its backward, before DDP waits for them.

        A rank that leaves out a layer would otherwise answer only in `step()`, which it cannot reach: DDP waits at
        the end of backward for ranks that wait in their backward for this one.
        """
        if self._averaging is None or self._end_queued or self._accumulates():
            return
        self._end_queued = True
        averaging, reference = self._averaging, weakref.ref(self)

        def close() -> None:
            updates = reference()
            if updates is not None and not updates._accumulates():
                averaging.close()

        torch.autograd.Variable._execution_engine.queue_callback(close)  # type: ignore[attr-defined]

    def _complete(self, index: int, grad: Tensor) -> None:
        """Take in the gradient of one parameter, as backward reports it."""
        if index in self._done or (self._averaging and self._averaging.closed):
            raise RuntimeError(_second_gradient(self.optimizer.name_of(index)))
        self.optimizer.refuse_sparse(index, grad)
        if self._accumulates():
            return
        if self._averaging is None and self._replicas():
            raise RuntimeError(_initialised_late())
        self._done.add(index)
        if self._averaging:
            self._averaging.offer(index)
        elif index in self._blocks:
            self._wait(index)
        else:
            self._apply(index, grad)

    def _wait(self, index: int) -> None:
        """Update the parameters of a block when the last of them is there, or the first of another one.

        All ranks see the same gradients in the same order, since FSDP2 itself reduces them by collectives.
        """
        block = self._blocks[index]
        if any(self._blocks[other] != block for other in self._waiting):
            self._release_waiting()
        self._waiting.add(index)
        if len(self._waiting) == self._sizes[block]:
            self._release_waiting()

    def _release_waiting(self) -> None:
        # What `zero_grad()` took away, say after an error in backward, is no longer wanted.
        indices = [i for i in sorted(self._waiting) if self._hooked[i].grad is not None]
        self._waiting.clear()
        if indices:
            self._norms.append(total_norm([self._hooked[i].grad for i in indices]))  # type: ignore[misc]
            self.optimizer.update_parameters(indices)
        for i in indices:
            self._hooked[i].grad = None

    def _apply(self, index: int, grad: Tensor) -> None:
        p = self._hooked[index]
        norm, usable = _norm(grad.detach()), None
        # A gradient that is zero on all ranks is one that no rank had: AdamW must not decay its moments.
        if self._averaging and not reads_at_once(norm.device):
            usable = norm != 0
        if self._averaging is None or usable is not None or norm != 0:
            self._norms.append(norm)
            p.grad = grad
            self.optimizer.update_parameters([index], usable)
        p.grad = None


def _take_off(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _norm(grad: Tensor) -> Tensor:
    """Return the norm in float32; on CPU torch makes a copy of that dtype, so large matrices are taken in parts."""
    parts = torch.split(grad, max(1, _PART // grad.shape[1])) if grad.ndim == 2 and grad.numel() > _PART else (grad,)
    norms: list[Tensor] = [wide_norm(part).float() for part in parts]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _refuse_fp16() -> None:
    if is_initialized() and AcceleratorState().mixed_precision == "fp16":
        raise ValueError(
            "fp16 scales the loss and may have to undo a step, but layer-wise updates are done before that is known: "
            "set mixed_precision='bf16', or leave out _layerwise."
        )


def _second_gradient(name: str) -> str:
    return (
        f"{name} got a second gradient after it was updated in this step. Call optimizer.step() after each backward "
        "pass, or put all but the last of several into `with optimizer.hold():`. If it comes from activation "
        "checkpointing, set its use_reentrant=False. If this pass is none of training, or for another optimizer, type "
        "optimizer.eval() before it."
    )


def _not_averaged() -> str:
    return (
        "The hooks of layer-wise updates were not there in this backward pass, so the gradients of the matrices are "
        "not averaged over the processes: call optimizer.train() before each forward, as Trainer.training_step does."
    )


def _initialised_late() -> str:
    return (
        "torch.distributed was initialised after the hooks of layer-wise updates were installed, so that gradients "
        "would not be averaged: initialise it first, or call optimizer.train() before the first forward."
    )

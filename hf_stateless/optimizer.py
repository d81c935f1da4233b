"""`StatelessOptimizer`: one optimizer, one `step()`, one rule per parameter group."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .adamw import adamw_state, adamw_update_
from .algorithms import ALGORITHMS, RELEASED, complete_group
from .batching import alike, of_one_shape
from .checkpoint import apply_options, check_same_groups, options_of
from .distributed import shares_whitening, update_together_
from .int8.weight import Int8Weight
from .layerwise import LayerwiseUpdates, unhook
from .lora import update_group_
from .matrix_update import MatrixUpdate
from .rounding import rounding_keys
from .sharding import finite_gradients, is_sharded, local_shard, shard_number, whole_if_tiny
from .signal_guard import measure_signal, new_history, refuse_layerwise
from .skipped import UnreadFlags
from .update_rules import Workspace, multinorm_update_, sinkhorn_momentum_update_, takes_kernels


logger = logging.getLogger(__name__)

_NOT_OF_THE_RULE = ("split_whitening", "min_signal")  # when and where multinorm groups are updated, not how


class StatelessOptimizer(torch.optim.Optimizer):
    r"""Multi-normalized gradients for matrices, AdamW for the rest; every group names its algorithm.

    For W in R^{m x n} (m = out_features) with gradient G: W <- (1 - lr weight_decay) W - lr lr_scale X with
    X = multi_normalize(G). State kept: a one-element `step` for each matrix (FSDP2 cannot save parameters without
    state); two moments for AdamW groups, one buffer for `sinkhorn_momentum`. Everything is read from the group at each
    step, so any scheduler works. A zero gradient, lr = 0 and a step before any backward change nothing; a gradient
    with NaN or infinity leaves its parameter unchanged, with a warning that names it.

    Args:
        params: groups (dicts) with `params` and `algorithm`, see `hf_stateless.algorithms.ALGORITHMS` for what else.
            `create_optimizer` makes them from a model.
        lr: learning rate of groups that have none.
        layerwise: update in backward and free each gradient: `matrices`, or `all` for the AdamW part too; None for
            updates in `step()`. The hooks are installed by `train()`, which the Trainer calls before each forward.
        order: for layer-wise updates, the names of the parameters as the model defines them; DDP needs it to save
            memory.

    Raises:
        ValueError: a group without `algorithm` or with unknown or invalid values.

    Example:
        >>> import torch
        >>> from hf_stateless import StatelessOptimizer
        >>> W = torch.nn.Parameter(torch.zeros(2, 3))
        >>> optimizer = StatelessOptimizer([{"params": [W], "algorithm": "multinorm", "lr_scale": 1.0}], lr=0.1)
        >>> W.grad = torch.tensor([[1.0, -2.0, 4.0], [2.0, -4.0, 8.0]])
        >>> optimizer.step()
        >>> W.data.round(decimals=4)
        tensor([[-0.1000,  0.1000, -0.1000],
                [-0.1000,  0.1000, -0.1000]])
        >>> [tuple(t.shape) for t in optimizer.state[W].values()]
        [(1,)]

    References:
        SWAN, https://huggingface.co/papers/2412.13148, Algorithm 1; SinkGD, https://huggingface.co/papers/2502.06742,
        Algorithm 4.
    """

    layerwise: LayerwiseUpdates | None = None
    held_steps: int = 0
    """Steps of this process in which `min_signal` held matrices back."""
    _workspace: Workspace | None = None
    _unread: UnreadFlags | None = None

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        layerwise: str | None = None,
        order: Sequence[str] = (),
    ) -> None:
        super().__init__(params, {"lr": lr})  # type: ignore[arg-type]
        if layerwise not in (None, *RELEASED):
            raise ValueError(f"layerwise={layerwise!r}: expected None, {' or '.join(RELEASED)}.")
        if layerwise:
            refuse_layerwise(self.param_groups)
            self.layerwise = LayerwiseUpdates(self, everything=layerwise == "all", order=order)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking it and filling in the defaults of its algorithm.

        Raises:
            ValueError: no or unknown `algorithm`, an unknown key, or a learning rate that is negative or not finite.
        """
        super().add_param_group(complete_group(param_group, self.defaults["lr"]))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss, as for any torch optimizer.

        Returns:
            The loss of the closure, if there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.layerwise:
            self.layerwise.finish()
        self._workspace = self._workspace or Workspace()
        work, first = [], 0
        for group in self.param_groups:
            work.append((group, [(first + i, p) for i, p in enumerate(group["params"]) if p.grad is not None]))
            first += len(group["params"])
        self._update(self._with_signal(work), alone=False)
        for index in self._unread.read() if self._unread else ():
            self._warn_skipped(index)
        self._workspace = None
        return loss

    def _with_signal(
        self, work: list[tuple[dict[str, Any], list[tuple[int, Tensor]]]]
    ) -> list[tuple[dict[str, Any], list[tuple[int, Tensor]]]]:
        """Leave out what its group's `min_signal` holds back: a weak gradient must not become a full-size step."""
        guarded = [p for group in self.param_groups if group.get("min_signal") for p in group["params"]]
        grads = [p.grad for p in guarded if p.grad is not None]
        if not grads:
            return work
        self._step_of(guarded[0])
        history = self.state[guarded[0]].setdefault("recent_norms", new_history(guarded[0]))
        signal = measure_signal(grads, history)
        held = [entry for group, active in work if signal < group.get("min_signal", 0) for entry in active]
        if not held:
            return work
        for _, p in held:
            self._step_of(p)  # a checkpoint of FSDP2 needs it
        if signal:
            self.held_steps += 1
            if self.held_steps.bit_count() == 1:  # the 1st, 2nd, 4th, 8th...
                logger.warning(
                    "min_signal holds the matrices back, for the %d. time: the norm of their gradients is %.2g times "
                    "that of informative steps.",
                    self.held_steps,
                    signal,
                )
        return [(group, [] if signal < group.get("min_signal", 0) else active) for group, active in work]

    def train(self) -> None:
        """Install the hooks of layer-wise updates on the parameters of now; called by the Trainer before each forward.

        Hooks that another optimizer has on them are taken off.
        """
        if self.layerwise:
            self.layerwise.install()
        else:  # a layer-wise optimizer may have trained this model before
            unhook(p for group in self.param_groups for p in group["params"])

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which backward only accumulates, for all but the last of several passes in one step.

        Example:
            >>> import torch
            >>> from hf_stateless import StatelessOptimizer
            >>> W = torch.nn.Parameter(torch.ones(2, 2))
            >>> optimizer = StatelessOptimizer([{"params": [W], "algorithm": "multinorm"}], layerwise="matrices")
            >>> optimizer.train()
            >>> with optimizer.hold():
            ...     W.sum().backward()
            >>> W.sum().backward()  # updates W with the sum of both gradients
            >>> W.grad is None
            True
        """
        return self.layerwise.hold() if self.layerwise else contextlib.nullcontext()

    def released_norm(self) -> Tensor | None:
        """Return the norm of the gradients that backward has released since the last step; None if there are none."""
        return self.layerwise.released_norm() if self.layerwise else None

    @torch.no_grad()
    def update_parameters(self, indices: Sequence[int]) -> None:
        """Apply the rules of their groups to some parameters; under FSDP2 a collective, for all of them together.

        Args:
            indices: positions, counted over all groups; on all ranks the same in the same order.
        """
        located = [(index, *self._locate(index)) for index in indices]
        # Fresh pages are dear on CPU, so its buffers last until `step()`; a GPU's allocator keeps what it frees.
        if any(p.device.type == "cpu" for _, _, p in located):
            self._workspace = self._workspace or Workspace()
        of_groups = alike(located, lambda entry: id(entry[1]))
        self._update([(same[0][1], [(i, p) for i, _, p in same]) for same in of_groups], alone=True)

    def name_of(self, index: int) -> str:
        """Return the name of a parameter for messages.

        Args:
            index: position, counted over all groups.
        """
        group, p = self._locate(index)
        position = next(i for i, other in enumerate(group["params"]) if other is p)
        return str(group["param_names"][position]) if "param_names" in group else f"parameter {index}"

    def _locate(self, index: int) -> tuple[dict[str, Any], Tensor]:
        for group in self.param_groups:
            if index < len(group["params"]):
                return group, group["params"][index]
            index -= len(group["params"])
        raise IndexError(f"There is no parameter {index}.")

    def _update(self, work: list[tuple[dict[str, Any], list[tuple[int, Tensor]]]], *, alone: bool) -> None:
        """Update parameters, given with their positions by group; what ranks do together comes last, all at once."""
        work = [(group, [(index, p) for index, p in active if p.numel()]) for group, active in work]
        rest = [entry for group, active in work if "norms" not in group for entry in active]
        together, finite = [], self._finite(rest)
        for group, active in work:
            if group["algorithm"] == "multinorm":
                shared = {i for i, p in active if is_sharded(p) or (not alone and shares_whitening(group))}
                self._multinorm(group, [entry for entry in active if entry[0] not in shared])
                together += [self._shared(group, entry) for entry in active if entry[0] in shared]
            elif group["algorithm"] == "lora_product":
                update_group_(group, active, self._step_of, self._keys, self._count)
            elif kept := [entry for entry in active if entry[0] in finite]:
                rule = self._sinkhorn_momentum if group["algorithm"] == "sinkhorn_momentum" else self._adamw
                rule(group, kept)
        update_together_([update for _, _, update in together], self._workspace)
        for index, step, update in together:
            self._count(update.options, index, step, update.finite)

    def _multinorm(self, group: dict[str, Any], active: list[tuple[int, Tensor]]) -> None:
        rule = {key: group[key] for key in ALGORITHMS["multinorm"] if key not in _NOT_OF_THE_RULE}
        for batch in of_one_shape(active, lambda params: takes_kernels(params, **rule)):
            indices, params = zip(*batch, strict=True)
            steps = [self._step_of(p) for p in params]
            finite = multinorm_update_(
                params,
                [p.grad for p in params],
                self._keys(group, batch, steps),
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                workspace=self._workspace,
                **rule,
            )
            if isinstance(finite, Tensor):
                self._unread = self._unread or UnreadFlags()
                self._unread.count(indices, steps, finite, group["lr"])
            else:
                for index, step, good in zip(indices, steps, finite, strict=True):
                    self._count(group, index, step, good)

    def _shared(self, group: dict[str, Any], entry: tuple[int, Tensor]) -> tuple[int, Tensor, MatrixUpdate]:
        step = self._step_of(entry[1])
        keys = self._keys(group, [entry], [step])
        return entry[0], step, MatrixUpdate(entry[1], group, keys[0] if keys else None)

    def _step_of(self, p: Tensor) -> Tensor:
        return self._state(p, lambda p: {"step": torch.zeros(1, device=p.device)})["step"]

    def _count(self, group: Mapping[str, Any], index: int, step: Tensor, finite: bool) -> None:
        if not finite:
            self._warn_skipped(index)
        elif group["lr"] != 0:  # torch's checkpoint code makes the state by a step at lr = 0, which must not count
            step += 1

    def _adamw(self, group: dict[str, Any], active: list[tuple[int, Tensor]]) -> None:
        bits = 8 if group["algorithm"] == "adamw_8bit" else 32
        states = [self._state(p, lambda p: adamw_state(p, bits=bits)) for _, p in active]
        keys = self._keys(group, active, [state["step"] for state in states])
        beta1, beta2 = group["betas"]
        adamw_update_(
            [local_shard(p) for _, p in active],
            [local_shard(p.grad) for _, p in active],  # type: ignore[arg-type]
            [{name: local_shard(t) for name, t in s.items()} for s in states],
            keys,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _sinkhorn_momentum(self, group: dict[str, Any], active: list[tuple[int, Tensor]]) -> None:
        options = {key: group[key] for key in ("lr", "weight_decay", *ALGORITHMS["sinkhorn_momentum"])}
        for index, p in active:
            state = self._state(
                p, lambda p: {"step": torch.zeros(1, device=p.device), "momentum_buffer": torch.zeros_like(p)}
            )
            keys = self._keys(group, [(index, p)], [state["step"]])
            with whole_if_tiny(p, p.grad, state["momentum_buffer"]) as (weight, grad, buffer):  # type: ignore[arg-type]
                sinkhorn_momentum_update_(weight, grad, buffer, keys[0] if keys else None, **options)
            state["step"] += 1

    def _state(self, p: Tensor, make: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the state of a parameter, made at its first update: FSDP2 swaps parameters after construction."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state.update(make(p))
        return state

    def _keys(
        self, group: Mapping[str, Any], batch: list[tuple[int, Tensor]], steps: list[Tensor]
    ) -> list[Tensor] | None:
        """Return the rounding keys of bf16 and 8-bit parameters, or None where nothing is rounded stochastically."""
        indices, params = zip(*batch, strict=True)
        rounded = any(p.dtype == torch.bfloat16 or isinstance(p, Int8Weight) for p in params)
        if not group["stochastic_rounding"] or not rounded:
            return None
        seeds = [group["seed"] + 0x01000193 * shard_number(p) for p in params]
        return rounding_keys(seeds, indices, [s.to(p.device) for p, s in zip(params, steps, strict=True)])

    def _finite(self, active: list[tuple[int, Tensor]]) -> set[int]:
        """Return the positions of parameters whose gradient is finite everywhere, with one synchronisation for all."""
        finite = dict(zip((index for index, _ in active), finite_gradients([p for _, p in active]), strict=True))
        for index in (index for index, good in finite.items() if not good):
            self._warn_skipped(index)
        return {index for index, good in finite.items() if good}

    def _warn_skipped(self, index: int) -> None:
        logger.warning(
            "The gradient of %s has NaN or infinite entries: it is left unchanged in this step. "
            "Look at the loss and the learning rate if this goes on.",
            self.name_of(index),
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, keep the dtypes of its tensors, and keep the options of this optimizer.

        torch casts every state tensor but `step` to the dtype of its parameter, and lets the saved groups win; here
        8-bit codes stay codes, and an option that was changed since the checkpoint was written is applied, with a
        warning. The learning rate is the scheduler's and comes from the checkpoint.

        Raises:
            ValueError: the state was written by another optimizer, or for other groups of parameters.
        """
        check_same_groups(state_dict["param_groups"], self.param_groups)
        options = options_of(self.param_groups)
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved_ids, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[p][name] = value.to(p.device, copy=value.numel() == 1)
        apply_options(self.param_groups, options)

"""`StatelessOptimizer`: one optimizer, one `step()`, one rule per parameter group."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..ranks.matrix_update import MatrixUpdate
from ..ranks.placement import check_gradients, is_sharded, local_shard, whole_if_tiny
from ..ranks.ways import shares_whitening, update_together_
from ..update.batches import alike, of_one_shape
from ..update.rules import Workspace, multinorm_update_, sinkhorn_momentum_update_, takes_kernels
from .adamw import adamw_state, adamw_update_
from .checkpoint import apply_options, as_saved, check_same_groups, options_of
from .groups import ALGORITHMS, RELEASED, complete_group
from .lora_product import update_group_
from .min_signal import measure_signal, new_history, refuse_layerwise, tell_held
from .momentum import add_momentum_, fit_momentum_, has_momentum, momentum_direction_
from .release import LayerwiseUpdates, unhook
from .rounding_keys import key_of, keys_of
from .unread_flags import UnreadFlags
from .width import scaled_for_width


logger = logging.getLogger(__name__)

# Parameters that are at work, with their positions among all; and groups with those of them.
_Entries: TypeAlias = list[tuple[int, Tensor]]
_Work: TypeAlias = list[tuple[dict[str, Any], _Entries]]
# Options of multinorm groups that say when, where and from what they are updated, not how.
_NOT_OF_THE_RULE = ("split_whitening", "min_signal", "momentum", "momentum_dtype", "width_rule")


class StatelessOptimizer(torch.optim.Optimizer):
    r"""Multi-normalized gradients for matrices, AdamW for the rest; every group names its algorithm.

    For W in R^{m x n} (m = out_features) with gradient G: W <- (1 - lr weight_decay) W - lr lr_scale X with
    X = multi_normalize(G). State kept: a one-element `step` for each matrix (FSDP2 cannot save parameters without
    state), and an average of its gradients if it has `momentum`; two moments for AdamW groups, one buffer for
    `sinkhorn_momentum`. Everything is read from the group at each step, so any scheduler works. A zero gradient and a
    step before any backward change nothing, lr = 0 no weight; a gradient with NaN or infinity leaves its parameter
    unchanged, with a warning that names it.

    Args:
        params: groups (dicts) with `params` and `algorithm`, see `ALGORITHMS` in `hf_stateless.optimizer.groups` for
            what else. `create_optimizer` makes them from a model.
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

    def _with_signal(self, work: _Work) -> _Work:
        """Leave out what its group's `min_signal` holds back: a weak gradient must not become a full-size step."""
        guarded = [p for group in self.param_groups if group.get("min_signal") for p in group["params"]]
        grads = [p.grad for p in guarded if p.grad is not None]
        if not grads:
            return work
        self._step_of(guarded[0])
        history = self.state[guarded[0]].setdefault("recent_norms", new_history(guarded[0]))
        signal = measure_signal(grads, history)
        held = [entry for group, active in work if signal < group.get("min_signal", 0) for entry in active]
        for _, p in held:
            self._step_of(p)  # a checkpoint of FSDP2 needs it
        if held and signal:
            self.held_steps += 1
            tell_held(self.held_steps, signal)
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

    def _update(self, work: _Work, *, alone: bool) -> None:
        """Update parameters, given with their positions by group; what ranks do together comes last, all at once."""
        together = []
        for group, active in self._usable([(g, [(i, p) for i, p in active if p.numel()]) for g, active in work]):
            if group["algorithm"] == "multinorm":
                shared = {i for i, p in active if is_sharded(p) or (not alone and shares_whitening(group))}
                self._multinorm(group, [entry for entry in active if entry[0] not in shared])
                together += [self._shared(group, entry) for entry in active if entry[0] in shared]
            elif group["algorithm"] == "lora_product":
                update_group_(group, active, self._step_of, self._count)
            elif active:
                rule = self._sinkhorn_momentum if group["algorithm"] == "sinkhorn_momentum" else self._adamw
                rule(group, active)
        update_together_([update for _, _, update in together], self._workspace)
        for index, step, update in together:
            self._count(update.options, index, step, update.finite)

    def _usable(self, work: _Work) -> _Work:
        """Leave out gradients that must not reach a moment: not finite, or under momentum of a matrix, zero."""
        checked = [(g, *entry) for g, active in work if "norms" not in g or has_momentum(g) for entry in active]
        out, checks = set(), check_gradients([p for *_, p in checked])
        for (group, index, p), (finite, nonzero) in zip(checked, checks, strict=True):
            if has_momentum(group):
                self._step_of(p)  # a checkpoint of FSDP2 needs all state
                add_momentum_(self.state[p], p, group["momentum_dtype"])
            if not finite:
                self._warn_skipped(index)
            if not finite or (has_momentum(group) and not nonzero):
                out.add(index)
        return [(group, [entry for entry in active if entry[0] not in out]) for group, active in work]

    def _direction(self, group: Mapping[str, Any], index: int, p: Tensor) -> Tensor:
        """Return the gradient of a matrix, or what stands for it under momentum."""
        if not has_momentum(group):
            return p.grad  # type: ignore[return-value]
        key = key_of(group, index, p, self._step_of(p)) if group["stochastic_rounding"] else None
        return momentum_direction_(p, p.grad, self.state[p], key, group["momentum"])  # type: ignore[arg-type]

    def _multinorm(self, group: Mapping[str, Any], active: _Entries) -> None:
        rule = {key: group[key] for key in ALGORITHMS["multinorm"] if key not in _NOT_OF_THE_RULE}
        # Directions of momentum are copies: not of all matrices at once.
        for batch in of_one_shape(active, lambda params: not has_momentum(group) and takes_kernels(params, **rule)):
            indices, params = zip(*batch, strict=True)
            steps = [self._step_of(p) for p in params]
            rule["lr_scale"] = scaled_for_width(group, params[0].shape)["lr_scale"]
            finite = multinorm_update_(
                params,
                [self._direction(group, *entry) for entry in batch],
                keys_of(group, batch, steps),
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
        index, p = entry
        step, options = self._step_of(p), scaled_for_width(group, p.shape)
        keys = keys_of(group, [entry], [step])
        return index, step, MatrixUpdate(p, options, keys[0] if keys else None, self._direction(group, index, p))

    def _step_of(self, p: Tensor) -> Tensor:
        return self._state(p, lambda p: {"step": torch.zeros(1, device=p.device)})["step"]

    def _count(self, group: Mapping[str, Any], index: int, step: Tensor, finite: bool) -> None:
        if not finite:
            self._warn_skipped(index)
        elif group["lr"] != 0:  # torch's checkpoint code makes the state by a step at lr = 0, which must not count
            step += 1

    def _adamw(self, group: dict[str, Any], active: _Entries) -> None:
        bits = 8 if group["algorithm"] == "adamw_8bit" else 32
        states = [self._state(p, lambda p: adamw_state(p, bits=bits)) for _, p in active]
        keys = keys_of(group, active, [state["step"] for state in states])
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

    def _sinkhorn_momentum(self, group: dict[str, Any], active: _Entries) -> None:
        options = {key: group[key] for key in ("lr", "weight_decay", *ALGORITHMS["sinkhorn_momentum"])}
        for index, p in active:
            state = self._state(
                p, lambda p: {"step": torch.zeros(1, device=p.device), "momentum_buffer": torch.zeros_like(p)}
            )
            keys = keys_of(group, [(index, p)], [state["step"]])
            with whole_if_tiny(p, p.grad, state["momentum_buffer"]) as (weight, grad, buffer):  # type: ignore[arg-type]
                sinkhorn_momentum_update_(weight, grad, buffer, keys[0] if keys else None, **options)
            state["step"] += 1

    def _state(self, p: Tensor, make: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the state of a parameter, made at its first update: FSDP2 swaps parameters after construction."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state.update(make(p))
        return state

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
        apply_options(self.param_groups, options)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for i, p in zip(saved["params"], group["params"], strict=True):
                if i in state_dict["state"]:
                    self.state[p].update(as_saved(state_dict["state"][i], p))
                    fit_momentum_(self.state[p], p, group)

"""`StatelessOptimizer`: one optimizer, one `step()`, one rule per parameter group."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..ranks.placement import align_gradients_, fill_gradients_
from ..update.batches import alike
from ..update.kernels.choice import Verdict
from ..update.write import Workspace
from ..weights.noise import TensorCache
from .checkpoint import (
    apply_options,
    check_same_groups,
    check_state,
    checked_states,
    fitted_state,
    options_of,
    tell_rates,
)
from .followed import Otherwise, followed, tell_followed, without_others
from .held_back import SkipCounts, without_bad_gradients, without_weak_gradients
from .live import unhook
from .min_signal import refuse_release
from .momentum import fit_momentum_, has_momentum
from .release import RELEASES, Release
from .rule import Entry, state_on_meta
from .rules import RULES, complete_group, named_alike
from .unread_flags import UnreadFlags


logger = logging.getLogger(__name__)


class StatelessOptimizer(SkipCounts, torch.optim.Optimizer):
    r"""Multi-normalized gradients for matrices, AdamW for the rest; every group names its algorithm.

    For W in R^{m x n} (m = out_features) with gradient G: W <- (1 - lr weight_decay) W - lr lr_scale X with
    X = multi_normalize(G). State kept: a one-element `step` for each matrix (FSDP2 cannot save parameters without
    state), and an average of its gradients if it has `momentum`; two moments for AdamW groups, one buffer for
    `sinkhorn_momentum`, averages of rows or columns for `row_moment` and its like. Everything is read from the group
    at each step, so any scheduler works. A zero gradient and a step before any backward change nothing, lr = 0 no
    weight; a gradient with NaN or infinity leaves its parameter unchanged, with a warning that names it.

    Args:
        params: groups (dicts) with `params` and `algorithm`, see `RULES` in `hf_stateless.optimizer.rules` for what
            else. `create_optimizer` makes them from a model.
        lr: learning rate of groups that have none.
        release: update in backward and free each gradient: `matrices`, or `all` for the AdamW part too; None for
            updates in `step()`. The hooks are installed by `train()`, which the Trainer calls before each forward.
        order: for `release`, the names of the parameters as the model defines them; DDP needs it to save memory.
        otherwise: groups whose rule nobody has asked for, by position: they take that of a checkpoint.

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

    release: Release | None = None
    """What updates in backward, if anything does."""
    otherwise: Otherwise = MappingProxyType({})
    """Groups that take the rule of a checkpoint, by position, with what they would hold under each."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        release: str | None = None,
        order: Sequence[str] = (),
        otherwise: Otherwise | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr})  # type: ignore[arg-type]
        self._make_tools()
        if otherwise:
            self.otherwise = otherwise
        if release not in (None, *RELEASES):
            raise ValueError(f"release={release!r}: expected None, {' or '.join(RELEASES)}.")
        if release:
            refuse_release(self.param_groups)
            self.release = Release(self, release, order)

    def _make_tools(self) -> None:
        """Make what is shared by steps and never saved."""
        self.cache, self.workspace, self.unread = TensorCache(), Workspace(), UnreadFlags()
        self._checked: set[tuple[Any, ...]] = set()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_tools()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking it and filling in the defaults of its algorithm.

        Raises:
            ValueError: no or unknown `algorithm`, an unknown key, a learning rate that is negative or not finite, or a
                complex parameter for a rule that cannot update it.
        """
        group = named_alike(complete_group(param_group, self.defaults["lr"]), self.param_groups)
        super().add_param_group(group)
        complex_one = next((p for p in group["params"] if p.is_complex()), None)
        if complex_one is not None and not RULES[group["algorithm"]].takes_complex:
            name = self._name_of(complex_one, self.param_groups.pop())
            raise ValueError(
                f"{name} is complex, and {group['algorithm']} is for real parameters: leave it out by "
                "optim_target_modules, so that AdamW updates it, or freeze it."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss, as for any torch optimizer.

        Returns:
            The loss of the closure, if there is one.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if self.release:
            self.release.finish()
        every = [p for _, p, _ in self._located()]
        align_gradients_(every)
        hooked = self.release.hooked if self.release else set()
        filled = fill_gradients_(p for p in every if id(p) not in hooked)
        self.apply(without_weak_gradients(list(self._entries(filled)), self))
        for p in (p for p in every if id(p) in filled):
            p.grad = None
        return loss

    def apply(self, entries: list[Entry]) -> None:
        """Update parameters by their rules, and warn of gradients that were not finite: what is left of a step."""
        self._update(entries)
        self.hear()
        self.workspace.free()

    def _update(self, entries: list[Entry]) -> None:
        """Update parameters by their rules, all of one rule together: ranks meet in as few collectives as possible."""
        for entry in entries:
            self.refuse_sparse(entry.index, entry.grad)
        for same in alike(without_bad_gradients(entries, self), lambda entry: entry.group["algorithm"]):
            RULES[same[0].group["algorithm"]].update(same, self)

    def refuse_sparse(self, index: int, grad: Tensor) -> None:
        """Raise a ValueError for a gradient that is not dense, with the name of its parameter."""
        if grad.layout != torch.strided:
            raise ValueError(
                f"The gradient of {self.name_of(index)} is sparse, and dense ones are expected: "
                "type sparse=False where the embedding is made."
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, and what an unfinished backward has done of this step: the next one starts anew."""
        super().zero_grad(set_to_none)
        if self.release:
            self.release.forget()

    def train(self) -> None:
        """Hook the parameters of now for layer-wise updates, and nobody else's; the Trainer does so each forward."""
        if self.release:
            self.release.install()
        else:  # an optimizer that updates in backward may have trained this model before
            unhook(p for _, p, _ in self._located())

    def eval(self) -> None:
        """Let backward leave weights and gradients alone until `train()` or `step()`, as after `Trainer.train()`."""
        self.hear(wait=True)
        if self.release:
            self.release.asleep = True

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which backward only accumulates, for all but the last of several passes in one step.

        Example:
            >>> import torch
            >>> from hf_stateless import StatelessOptimizer
            >>> W = torch.nn.Parameter(torch.ones(2, 2))
            >>> optimizer = StatelessOptimizer([{"params": [W], "algorithm": "multinorm"}], release="matrices")
            >>> optimizer.train()
            >>> with optimizer.hold():
            ...     W.sum().backward()
            >>> W.sum().backward()  # updates W with the sum of both gradients
            >>> W.grad is None
            True
        """
        return self.release.hold() if self.release else contextlib.nullcontext()

    def released_norm(self) -> Tensor | None:
        """Return the norm of the gradients that backward has released since the last step; None if there are none."""
        return self.release.released_norm() if self.release else None

    @torch.no_grad()
    def update_parameters(self, indices: Sequence[int], usable: Tensor | None = None) -> None:
        """Apply the rules of their groups to some parameters; under FSDP2 a collective, for all of them together.

        Args:
            indices: positions, counted over all groups; on all ranks the same in the same order.
            usable: a flag on the device, where nothing of them moves unless it is set.
        """
        entries = [self.entry(index, in_backward=True) for index in indices]
        align_gradients_([entry.param for entry in entries])
        for entry in entries:
            entry.usable = usable
        self._update([entry for entry in entries if entry.param.numel()])
        # Allocating fresh pages is slow on CPU, so its buffers last until `step()`; a GPU's allocator keeps them.
        if all(entry.param.device.type != "cpu" for entry in entries):
            self.workspace.free()

    def _entries(self, filled: set[int]) -> Iterator[Entry]:
        """Yield all parameters with a gradient; zero stands for that of some, by identity."""
        index = 0
        for group in self.param_groups:
            for position, p in enumerate(group["params"]):
                if p.grad is not None and p.numel():
                    yield Entry(index, p, group, self.state_of(p, group), position=position, filled=id(p) in filled)
                index += 1

    def entry(self, index: int, *, in_backward: bool = False) -> Entry:
        """Return a parameter by its position, with its state, made where there is none.

        Args:
            index: position, counted over all groups.
            in_backward: it is updated in backward, where replicas cannot share the work.
        """
        group, position = self._locate(index)
        p = group["params"][position]
        return Entry(index, p, group, self.state_of(p, group), in_backward, position)

    def name_of(self, index: int) -> str:
        """Return the name of a parameter for messages.

        Args:
            index: position, counted over all groups.
        """
        group, position = self._locate(index)
        return str(group["param_names"][position]) if "param_names" in group else f"parameter {index}"

    def _name_of(self, p: Tensor, group: Mapping[str, Any]) -> str:
        position = next(i for i, other in enumerate(group["params"]) if other is p)
        if "param_names" in group:
            return str(group["param_names"][position])
        return f"parameter {next(index for index, other, _ in self._located() if other is p)}"

    def count(self, entries: Sequence[Entry], verdicts: Sequence[Verdict]) -> None:
        """Count the step of each parameter whose gradient was finite, and warn of the others.

        Args:
            entries: the parameters.
            verdicts: for each whether its gradient was finite; a tensor on the device is read later.
        """
        unread = [(entry, flag) for entry, flag in zip(entries, verdicts, strict=True) if isinstance(flag, Tensor)]
        for same in alike(unread, lambda pair: (id(pair[0].group), pair[1].device)):
            some, flags = zip(*same, strict=True)
            indices, steps, usable = zip(*((e.index, e.step, e.usable) for e in some), strict=True)
            self.unread.count(indices, steps, torch.stack(flags), some[0].group["lr"], usable)
        for entry, flag in zip(entries, verdicts, strict=True):
            if isinstance(flag, Tensor):
                continue
            if not flag:
                self.warn_skipped(entry.index)
            elif entry.group["lr"] != 0:  # torch's checkpoint code makes state by a step at lr = 0: not counted
                entry.step.add_(1)

    def _located(self) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """Yield all parameters with their positions and groups."""
        every = ((p, group) for group in self.param_groups for p in group["params"])
        yield from ((index, p, group) for index, (p, group) in enumerate(every))

    def _locate(self, index: int) -> tuple[dict[str, Any], int]:
        """Return the group of a parameter, and its position there."""
        for group in self.param_groups:
            if index < len(group["params"]):
                return group, index
            index -= len(group["params"])
        raise IndexError(f"There is no parameter {index}.")

    def state_of(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter, made at its first update: FSDP2 swaps parameters after construction."""
        state: dict[str, Tensor] = self.state[p]
        if "step" not in state or (has_momentum(group) and "momentum_buffer" not in state):
            made = RULES[group["algorithm"]].state(p, group)
            state.update({name: tensor for name, tensor in made.items() if name not in state})
        self._check_shapes(state, p, group)
        return state

    def _check_shapes(self, state: Mapping[str, Tensor], p: Tensor, group: Mapping[str, Any]) -> None:
        """Refuse a state of another shape than its parameter's, before anything is written; equal cases are known."""
        shapes = tuple((name, tensor.shape) for name, tensor in state.items() if name != "recent_norms")
        case = (group["algorithm"], has_momentum(group), p.shape, shapes)
        if case not in self._checked:
            made = state_on_meta(RULES[group["algorithm"]], p, group)
            check_state(state, made, self._name_of(p, group), advice="")
            self._checked.add(case)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does; what the device has not told yet is waited for and warned of."""
        self.hear(wait=True)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, keep the dtypes of its tensors, and keep the options of this optimizer.

        torch casts every state tensor but `step` to the dtype of its parameter, and lets the saved groups win; here
        8-bit codes stay codes, and an option that was changed since the checkpoint was written is applied, with a
        warning. Tables whose rule nobody has asked for go on with the rule of the checkpoint, with a warning too. The
        learning rate is the scheduler's and comes from the checkpoint, with a warning if the run asks for another.

        Raises:
            ValueError: the state was written by another optimizer, for other groups or shapes of parameters, or has
                values that would make a weight NaN. Nothing is loaded then.
        """
        before, saved_groups = self.param_groups, state_dict["param_groups"]
        groups = followed(before, saved_groups, self.otherwise)
        check_same_groups(saved_groups, groups)
        made = checked_states(state_dict, groups, self.name_of)
        super().load_state_dict(without_others(state_dict, made, self.otherwise))
        apply_options(self.param_groups, options_of(groups))
        tell_followed(groups, before)
        tell_rates(saved_groups, before)
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            for i, p in zip(saved["params"], group["params"], strict=True):
                if i in state_dict["state"]:
                    self.state[p].update(fitted_state(state_dict["state"][i], p, made[i]))
                    fit_momentum_(self.state[p], p, group)

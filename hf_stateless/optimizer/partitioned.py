"""`PartitionedOptimizer`: the same updates where DeepSpeed has put flat float32 parts in the place of parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ranks.flat import FlatCut, flat_cut
from ..ranks.slices import SliceCut, is_sliced, shapes_shown, slice_cut
from .momentum import has_momentum
from .optimizer import StatelessOptimizer
from .rule import Entry


_RULES = ("multinorm", "adamw")
Cut = FlatCut | SliceCut
_Pieces = list[tuple[Tensor, Tensor]]


class PartitionedOptimizer(StatelessOptimizer):
    r"""`StatelessOptimizer` under ZeRO-1, -2 and -3: each rank updates its part of the float32 weights.

    DeepSpeed averages, accumulates, unscales and clips, leaves out steps that overflow, and then calls `step()` with
    its parts. At stages 1 and 2 a matrix that lies across two parts has its gradient put together by the ranks that
    hold it; at stage 3 all ranks gather the gradients of some matrices after others. AdamW works on parts as they are.
    At the first step, and after loading a checkpoint, parts are compared with the model.

    Args:
        params: groups with `param_names`, of whole parameters, or of those that `zero.Init` has cut already.
        settings: those of `StatelessOptimizer`.

    Raises:
        ValueError: a rule that needs more than a gradient, or parts that are not those of these stages.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float = 1e-3, **settings: Any) -> None:
        groups = list(params)
        with shapes_shown(p for group in groups for p in group["params"]):
            super().__init__(groups, lr, **settings)
            refuse_rules(self.param_groups)
            self._whole: dict[str, Tensor] = {
                str(name): p
                for group in self.param_groups
                for name, p in zip(group["param_names"], group["params"], strict=True)
            }
            self._shapes = {name: p.shape for name, p in self._whole.items()}
        self._numbers = {name: index for index, name in enumerate(self._whole)}
        self._cuts: dict[int, tuple[Cut, list[str]]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update what this rank holds; DeepSpeed calls this on all ranks, for one part after the other or for all."""
        shown = [group for group in self.param_groups if group["params"]]
        if closure is not None or not any(self._is_part(group) for group in shown):
            return None if self._makes_state() else super().step(closure)
        refuse_rules(self.param_groups)  # a checkpoint may have chosen others
        for group in shown:
            if not self._is_part(group) or group["algorithm"] != "multinorm":
                self.apply(self._as_they_are(group))
                continue
            for entries, pieces in self._matrices(group):
                self.apply(entries)
                for held, updated in pieces:
                    held.copy_(updated)
        return None

    def name_of(self, index: int) -> str:
        """Return the name of a parameter for messages; DeepSpeed shows `step()` some of the groups only."""
        return list(self._whole)[index]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this rank's parts; they are compared with the model again at the next step."""
        super().load_state_dict(state_dict)
        self._cuts.clear()

    def _makes_state(self) -> bool:
        """Tell whether DeepSpeed only wants moments to be made: it steps with zeros when it wraps us at stage 0.

        There it has put float32 copies in the place of parameters in half precision. AdamW would count the step.
        """
        every = [p for group in self.param_groups for p in group["params"]]
        copies = not self.state and all(p is not q for p, q in zip(every, self._whole.values(), strict=True))
        return copies and all(p.grad is not None and not p.grad.any() for p in every)

    def _is_part(self, group: Mapping[str, Any]) -> bool:
        return [p.shape for p in group["params"]] != [self._shapes[name] for name in group["param_names"]]

    def _as_they_are(self, group: dict[str, Any]) -> list[Entry]:
        """Return entries of what is not cut, or is updated entry by entry."""
        numbers = [self._numbers[name] for name in group["param_names"]]
        return [
            Entry(numbers[i], p, group, self.state_of(p, group), in_backward=True, position=i)
            for i, p in enumerate(group["params"])
            if p.grad is not None and p.numel()
        ]

    def _matrices(self, group: dict[str, Any]) -> Iterator[tuple[list[Entry], _Pieces]]:
        """Yield entries of matrices that this rank holds something of, and which pieces to write back afterwards."""
        for part in group["params"]:
            cut, names = self._cut_of(part, group)
            if part.grad is None:
                continue
            state = self.state_of(part, group)
            steps = state["step"].clone()
            if group["lr"] != 0:
                state["step"].add_(1)
            average = state.get("momentum_buffer") if has_momentum(group) else None
            averages = itertools.repeat({}) if average is None else cut.batches(average)
            first = group["param_names"].index(names[0])
            for grads, averaged in zip(cut.batches(part.grad), averages, strict=False):
                entries, pieces = [], []
                for i, grad in grads.items():
                    shape, place = self._shapes[names[i]], slice(*cut.place(i))
                    whole = held = cut.piece(part.detach(), i)
                    if held.numel() != grad.numel():
                        whole = torch.zeros_like(grad)
                        whole[place] = held
                        pieces.append((held, whole[place]))
                    param = whole.view(shape)
                    param.grad = grad.view(shape)
                    # The counter of the part stands for those of its matrices.
                    of_matrix = {"step": steps.clone()}
                    if average is not None:
                        of_matrix["momentum_buffer"] = averaged[i].view(shape)
                        pieces.append((cut.piece(average, i), averaged[i][place]))
                    number = self._numbers[names[i]]
                    entries.append(Entry(number, param, group, of_matrix, not cut.shared, first + i))
                yield entries, pieces

    def _cut_of(self, part: Tensor, group: Mapping[str, Any]) -> tuple[Cut, list[str]]:
        """Return how a part is cut, and the names of its parameters."""
        if id(part) not in self._cuts:
            names, first = list(group["param_names"]), group["param_names"][0]
            find: Callable[[Tensor, Sequence[Tensor]], Cut | None] = flat_cut
            if is_sliced(self._whole[first]):
                # A group may be in several parts, which DeepSpeed shows in the order of their parameters.
                known = {name for _, of_part in self._cuts.values() for name in of_part}
                names, find = [name for name in names if name not in known], slice_cut
            cut = find(part, [self._whole[name] for name in names])
            if cut is None or part.dtype != torch.float32:
                raise ValueError(
                    f"DeepSpeed hands the optimizer {tuple(part.shape)} {part.dtype} for {first} and others, "
                    "expected an equal float32 part of them on each rank: set zero_optimization.stage to 1, 2 or 3 "
                    "without offload, tensor, pipeline or expert parallelism and low-precision masters, or shard "
                    "with FSDP2."
                )
            self._cuts[id(part)] = cut, names[: len(cut)]
        return self._cuts[id(part)]


def refuse_rules(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what needs more than gradients, and averages of them, of each matrix.

    Raises:
        ValueError: with what to type.

    Example:
        >>> from hf_stateless.optimizer.partitioned import refuse_rules
        >>> refuse_rules([{"algorithm": "row_moment"}])
        Traceback (most recent call last):
            ...
        ValueError: Under DeepSpeed algorithm=row_moment works on whole tables or pairs: leave it out, or use FSDP2.
    """
    for group in groups:
        rule = group["algorithm"]
        if rule not in _RULES:
            raise ValueError(
                f"Under DeepSpeed algorithm={rule} works on whole tables or pairs: leave it out, or use FSDP2."
            )
        if group.get("min_signal"):
            raise ValueError(
                f"Under DeepSpeed min_signal={group['min_signal']} is not supported: leave min_signal out, or shard "
                "with FSDP2."
            )
        if has_momentum(group) and group["momentum_dtype"] == "int8":
            raise ValueError(
                "momentum_dtype=int8 has scales for groups of a row, and DeepSpeed cuts weights anywhere: type "
                "momentum_dtype=bfloat16, or shard with FSDP2."
            )

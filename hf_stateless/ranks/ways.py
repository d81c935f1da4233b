r"""The ways in which a matrix gets its update, alone on a rank or together: the same numbers as one process would get.

What a chain of norms needs decides how: SR-Sinkhorn sends vectors, a chain that is local to what a rank holds sends
one number for each matrix, and every other chain sends whole matrices to their owners. Which way is taken depends on
what all ranks know alike, never on a rank's own data, so that all of them meet in the same collectives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..norms.chain import Chain
from ..update.batches import BATCH_BYTES, alike, bounded
from ..update.reads import both
from ..update.write import Judged, Workspace, judged
from ..weights.cuts import Split, whole_tensor
from .alone import Alone, Apart, is_stored_stack, matrices_of
from .matrix_update import MatrixUpdate
from .operator_norms import operator_factors
from .owners import Agreement, Exchanges, Load, same_on_replicas, shared_updates, whitening_cost
from .sinkhorn import ShardedMatrices, iterate, keep_squares


EXCHANGE_BYTES = 1 << 30
"""Bytes of whole gradients that an owner takes at once."""


class Way(Protocol):
    """How some of the updates are computed and written."""

    def takes(self, update: MatrixUpdate) -> bool:
        """Tell whether an update can go this way: the same on all ranks."""

    def run(self, updates: Sequence[MatrixUpdate], workspace: Workspace) -> None:
        """Apply the updates that go this way; `finite` is set."""


def apply_(updates: Sequence[MatrixUpdate], workspace: Workspace) -> None:
    """Apply updates, each in its way; all ranks of a mesh have to call this with the same parameters.

    Args:
        updates: in the same order on all ranks; `finite` is set.
        workspace: buffers shared with other calls of the same step.
    """
    chosen = [next(way for way in WAYS if way.takes(update)) for update in updates]
    for way in WAYS:
        mine = [update for update, its_way in zip(updates, chosen, strict=True) if its_way is way]
        if mine:
            way.run(mine, workspace)


def shares_whitening(group: Mapping[str, Any]) -> bool:
    """Tell whether replicas share the work on a matrix: asked for, a whitening, and other processes to share it with.

    Args:
        group: a parameter group with `split_whitening` and the fields of a chain.
    """
    if not (group["split_whitening"] and dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size() > 1 and Chain.of(group).whitens


class Sinkhorn:
    """SR-Sinkhorn on parts of matrices: per iteration and mesh dimension one all-reduce of vectors for all of them."""

    def takes(self, update: MatrixUpdate) -> bool:
        if not (update.chain.is_sinkhorn and update.splits and update.layout.scales) or None in update.cuts:
            return False
        # What estimates operator norms knows of one cut, in one piece.
        return update.chain.scale != "operator" or (len(update.splits) == 1 and update.splits[0].pieces == 1)

    def run(self, updates: Sequence[MatrixUpdate], workspace: Workspace) -> None:
        batches, held = [], 0
        stacks = [
            stack
            for of_class in alike(updates, lambda update: update.shape_class)
            for stack in bounded(of_class, _whole_bytes, BATCH_BYTES if of_class[0].part.device.type != "cpu" else 0)
        ]
        for stack in stacks:
            matrices, first = [update.matrix for update in stack], stack[0]
            sizes = first.layout.sizes(first.param.shape)
            assert sizes is not None
            keep = keep_squares(held, matrices)
            held += sum(matrix.numel() for matrix in matrices) if keep else 0
            batches.append(ShardedMatrices(matrices, _splits(first), first.cuts, sizes, keep_squares=keep))
        iterate(batches, [int(stack[0].chain.num_iterations) for stack in stacks])
        sizes_of_all = torch.cat([batch.size.to(batches[0].size.device) for batch in batches])
        verdicts = judged(sizes_of_all.unsqueeze(1), updates[0].weight.device)
        factors = self._operator_factors(stacks, batches)
        for i, (stack, batch) in enumerate(zip(stacks, batches, strict=True)):
            rows, columns = batch.scalings()
            rows = rows * factors[i].unsqueeze(-1) if i in factors else rows
            for update, row, column in zip(stack, rows, columns, strict=True):
                update.write_scaled(row, column, verdicts.pop(0), workspace)

    def _operator_factors(
        self, stacks: Sequence[Sequence[MatrixUpdate]], batches: Sequence[ShardedMatrices]
    ) -> dict[int, Tensor]:
        """Return the factors of the batches that are scaled by their operator norms, by position."""
        measured = [i for i, stack in enumerate(stacks) if stack[0].chain.scale == "operator"]
        factors: dict[int, Tensor] = {}
        for of_group in alike(measured, lambda i: batches[i].split.members):
            factors |= zip(of_group, operator_factors([batches[i] for i in of_group]), strict=True)
        return factors


class Local:
    """The chain needs nothing that is cut: a rank normalises its part; small all-reduces tell the norms."""

    def takes(self, update: MatrixUpdate) -> bool:
        needs = {0: set(), -2: {"columns"}, -1: {"rows"}}  # type: ignore[var-annotated]
        if not update.splits:
            return False
        return all(cut in needs and not needs[cut] & update.chain.needs for cut in update.cuts)

    def run(self, updates: Sequence[MatrixUpdate], workspace: Workspace) -> None:
        for some in _exchanged_at_once(updates):
            splits = _splits(some[0])
            parts = [update.normalized(update.part) if update.part.numel() else update.part for update in some]
            norms = torch.stack([update.layout.norms(part) for update, part in zip(some, parts, strict=True)])
            norms = norms.to(splits[0].device)
            for split in splits:
                dist.all_reduce(norms, group=split.group)
            verdicts = judged(norms, some[0].weight.device)
            for update, part, verdict in zip(some, parts, verdicts, strict=True):
                update.write(part, verdict)


class Owned:
    """One rank normalises each matrix: for each cut one all-to-all of gradients, and one of updates."""

    def takes(self, update: MatrixUpdate) -> bool:
        return bool(update.splits)

    def run(self, updates: Sequence[MatrixUpdate], workspace: Workspace) -> None:
        load: Load = {}
        for some in _exchanged_at_once(updates):
            if len(some) > 1:
                self._exchange(some, load)
            else:  # an owner would send it to the others while they wait: they may as well compute it
                Gathered().run(some, workspace)

    def _exchange(self, updates: Sequence[MatrixUpdate], load: Load) -> None:
        costs = [whitening_cost(tuple(update.param.shape)) for update in updates]
        exchange = Exchanges([_splits(update) for update in updates], costs, load)
        whole = exchange.to_owners([update.part for update in updates])
        normalized = _normalize([updates[i] for i in exchange.mine], whole)
        # All are of one class, so that they have one layout.
        parts, norms = exchange.to_parts(normalized, [update.part for update in updates], updates[0].layout)
        for update, part, verdict in zip(updates, parts, judged(norms, updates[0].weight.device), strict=True):
            update.write(part, verdict)


class Replicated:
    """Each replica normalises some of the matrices, if all have the same gradients: one all-gather of updates."""

    def takes(self, update: MatrixUpdate) -> bool:
        return not update.is_sharded

    def run(self, updates: Sequence[MatrixUpdate], workspace: Workspace) -> None:
        group = dist.group.WORLD
        grads = [update.part for update in updates]
        agreement = workspace.notes.setdefault("replicas", Agreement())
        if group is None or not agreement.holds(same_on_replicas(grads, group)):
            Alone().run(updates, workspace)
            return
        stacks = {id(update): list(matrices_of(update)) for update in updates if is_stored_stack(update)}
        self._share([one for update in updates for one in stacks.get(id(update), [update])], agreement, group)
        for update in updates:
            for one in stacks.get(id(update), ()):
                update.finite = update.finite & one.finite  # type: ignore[operator]

    def _share(self, updates: Sequence[MatrixUpdate], agreement: Agreement, group: dist.ProcessGroup) -> None:
        grads = [update.part for update in updates]

        def compute(positions: list[int]) -> list[Tensor]:
            return _normalize([updates[i] for i in positions], [grads[i] for i in positions])

        shapes = [tuple(grad.shape) for grad in grads]
        for i, part in shared_updates(shapes, compute, group, like=grads[0], batch_bytes=BATCH_BYTES):
            updates[i].allowed = both(updates[i].allowed, agreement.flag)
            updates[i].write(part, _judged_alone(updates[i], part))


class Gathered:
    """Every rank gathers and normalises the whole matrix: for the only one of a shape, and for unknown cuts."""

    def takes(self, update: MatrixUpdate) -> bool:
        return True

    def run(self, updates: Sequence[MatrixUpdate], workspace: Workspace) -> None:
        for update in updates:
            normalized = update.normalized(whole_tensor(update.direction))
            update.write(normalized, _judged_alone(update, normalized), whole=True)


WAYS: tuple[Way, ...] = (Alone(), Apart(), Sinkhorn(), Local(), Owned(), Replicated(), Gathered())
"""An update goes the first of these that takes it; they run in this order on all ranks."""


def _normalize(updates: Sequence[MatrixUpdate], grads: Sequence[Tensor]) -> list[Tensor]:
    """Normalise whole gradients; on an accelerator, matrices of one shape and chain as one batch."""
    if not grads or grads[0].device.type == "cpu":
        return [update.normalized(grad) for update, grad in zip(updates, grads, strict=True)]
    done: dict[int, Tensor] = {}
    for positions in alike(range(len(grads)), lambda i: (updates[i].shape_class, grads[i].shape)):
        if updates[positions[0]].layout.stacks:
            batch = updates[positions[0]].normalized(torch.stack([grads[i] for i in positions]))
            done |= dict(zip(positions, batch, strict=True))
        else:
            done |= {i: updates[i].normalized(grads[i]) for i in positions}
    return [done[i] for i in range(len(grads))]


def _judged_alone(update: MatrixUpdate, normalized: Tensor) -> Judged:
    return judged(update.layout.norms(normalized).unsqueeze(0), update.weight.device)[0]


def _splits(update: MatrixUpdate) -> tuple[Split, ...]:
    assert update.splits
    return update.splits


def _exchanged_at_once(updates: Sequence[MatrixUpdate]) -> Iterator[list[MatrixUpdate]]:
    """Yield updates of one shape, as many as hold about `EXCHANGE_BYTES` on each rank: all ranks cut alike."""
    for of_class in alike(updates, lambda update: update.shape_class):
        ranks = math.prod(split.ranks for split in _splits(of_class[0]))
        yield from bounded(of_class, _whole_bytes, EXCHANGE_BYTES * ranks)


def _whole_bytes(update: MatrixUpdate) -> int:
    """Return the size of the whole gradient: the same number on all ranks, whatever they hold of it."""
    return update.param.numel() * update.part.element_size()

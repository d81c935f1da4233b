"""Whole matrices for norm projections that no rank can compute on its part, such as the whitening.

Each matrix is handed to one rank, its owner, which normalises it and hands the update back: one packed all-to-all each
way. Replicas, which have all gradients already, only share the updates: one all-gather.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..update.layout import Layout
from ..update.reads import Later, reads_at_once
from ..weights.cuts import Split
from .placement import wide_norm


logger = logging.getLogger(__name__)

Load = dict[tuple[int, ...], list[int]]
"""What each rank of a process group has had to do so far, by the group's members."""


def assign_owners(costs: Sequence[int], load: list[int]) -> list[int]:
    """Choose the owner of each of some matrices that are computed at the same time.

    The most expensive remaining matrix goes to the least loaded rank; among equals, to the one that has had the least
    to do so far.

    Args:
        costs: of each matrix, in any unit.
        load: of each rank so far, added to.

    Returns:
        The owner's rank for each matrix.

    Example:
        >>> from hf_stateless.ranks.owners import assign_owners
        >>> load = [5, 0, 0]
        >>> assign_owners([4, 4, 1, 4], load), load
        ([1, 2, 1, 0], [9, 5, 4])
    """
    now = [0] * len(load)
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner = min(range(len(load)), key=lambda rank: (now[rank], load[rank]))
        owners[i] = owner
        now[owner] += costs[i]
        load[owner] += costs[i]
    return owners


class Exchange:
    """Takes parts of matrices to their owners and parts of updates back; both ways are collectives.

    Args:
        among: a split over the process group; there may be no matrix for it.
        splits: how each matrix is cut, all over that group.
        owners: the owner of each.
    """

    def __init__(self, among: Split, splits: Sequence[Split], owners: Sequence[int]) -> None:
        self.splits = splits
        self._group, self._rank, self._device = among.group, among.rank, among.device
        self._ranks = range(among.ranks)
        self._owned = [[i for i, owner in enumerate(owners) if owner == rank] for rank in self._ranks]
        self.mine = self._owned[self._rank]
        """Positions of the matrices that this rank owns."""

    def to_owners(self, parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Send this rank's part of every matrix, and return the matrices that it owns, on the group's device."""
        send = [[parts[i] for i in owned] for owned in self._owned]
        shapes = [[self.splits[i].part(rank) for i in self.mine] for rank in self._ranks]
        received = self._send(send, shapes, dtype)
        return [self.splits[i].whole([pieces[k] for pieces in received]) for k, i in enumerate(self.mine)]

    def to_parts(
        self, updates: Sequence[Tensor], norms: Sequence[Tensor], dtype: torch.dtype, blocks: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Send the updates of the matrices that this rank owns, each with its norms.

        Args:
            updates: one for each of `mine`.
            norms: of each of them, (blocks,).
            dtype: in which they are sent.
            blocks: how many norms a matrix has.

        Returns:
            For every matrix, this rank's part of the update, and its norms, on the group's device.
        """
        cut = [self.splits[i].parts(update.to(dtype)) for i, update in zip(self.mine, updates, strict=True)]
        send = [[t for k in range(len(cut)) for t in (norms[k], cut[k][rank])] for rank in self._ranks]
        shapes = [[s for i in owned for s in ((blocks,), self.splits[i].part(self._rank))] for owned in self._owned]
        received = self._send(send, shapes, dtype)
        back = {
            i: (pieces[2 * k + 1], pieces[2 * k])
            for pieces, owned in zip(received, self._owned, strict=True)
            for k, i in enumerate(owned)
        }
        return [back[i][0] for i in range(len(back))], [back[i][1] for i in range(len(back))]

    def _send(
        self,
        send: Sequence[Sequence[Tensor]],
        shapes: Sequence[Sequence[tuple[int, ...]]],
        dtype: torch.dtype,
    ) -> list[list[Tensor]]:
        """Send a list of tensors to each rank, and return those that came from each rank, in the given shapes."""
        flat = [t.reshape(-1).to(self._device, dtype) for tensors in send for t in tensors]
        packed = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=self._device)
        counts = [[_numel(shape) for shape in of_rank] for of_rank in shapes]
        received = packed.new_empty(sum(map(sum, counts)))
        dist.all_to_all_single(
            received,
            packed,
            output_split_sizes=[sum(of_rank) for of_rank in counts],
            input_split_sizes=[sum(t.numel() for t in tensors) for tensors in send],
            group=self._group,
        )
        return [
            [piece.view(shape) for piece, shape in zip(pieces.split_with_sizes(of_rank), of_rank_shapes, strict=True)]
            for pieces, of_rank, of_rank_shapes in zip(
                received.split_with_sizes([sum(of_rank) for of_rank in counts]), counts, shapes, strict=True
            )
        ]


class Exchanges:
    """The same for matrices that are cut in several ways, one after the other: each rank passes on what it was given.

    Args:
        splits: how each matrix is cut, in the order in which that is undone; all over the same process groups.
        costs: of each matrix, in any unit.
        load: of the ranks so far, added to.
    """

    def __init__(self, splits: Sequence[Sequence[Split]], costs: Sequence[int], load: Load) -> None:
        self.mine = list(range(len(splits)))
        """Positions of the matrices that this rank owns."""
        self._exchanges: list[Exchange] = []
        for level, split in enumerate(splits[0]):
            of_group = load.setdefault(split.members, [0] * split.ranks)
            owners = assign_owners([costs[i] for i in self.mine], of_group)
            exchange = Exchange(split, [splits[i][level] for i in self.mine], owners)
            self._exchanges.append(exchange)
            self.mine = [self.mine[k] for k in exchange.mine]

    def to_owners(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send this rank's part of every matrix, and return the whole matrices that it owns, on the group's device."""
        held = list(parts)
        for exchange in self._exchanges:
            held = exchange.to_owners(held, parts[0].dtype)
        return held

    def to_parts(
        self, updates: Sequence[Tensor], like: Sequence[Tensor], layout: Layout
    ) -> tuple[list[Tensor], Tensor]:
        """Send the updates of the matrices that this rank owns.

        Args:
            updates: one for each of `mine`.
            like: this rank's part of every matrix, for dtype and device.
            layout: of every matrix.

        Returns:
            For every matrix, this rank's part of the update, and the norms of the whole update, (matrices, blocks).
        """
        dtype = torch.promote_types(like[0].dtype, torch.float32)
        norms = [layout.norms(update).to(dtype) for update in updates]
        held = list(updates)
        for exchange in reversed(self._exchanges):
            held, norms = exchange.to_parts(held, norms, dtype, layout.blocks)
        parts = [part.to(one.device) for part, one in zip(held, like, strict=True)]
        return parts, torch.stack(norms).to(like[0].device)


def same_on_replicas(grads: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Tell whether all ranks have these gradients, as DDP leaves them: by their norms (a collective).

    Gradients that differ, say of local SGD between two synchronisations, must not be mixed.
    """
    norms = torch.stack([wide_norm(grad) for grad in grads])
    norms = norms.nan_to_num(-1.0, -1.0)  # what is not finite on one rank is so on all
    extremes = torch.cat([norms, -norms])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes.chunk(2)
    return (largest == -smallest).all()


class Agreement:
    """Whether replicas have the same gradients: what decides which collectives they meet in.

    Where the host may read, it is what holds now. On an accelerator the first step is waited for; later ones go by
    the step before, and where that was wrong nothing moves: gradients of different processes are never mixed.
    """

    def __init__(self) -> None:
        self.flag: Tensor | None = None
        """On an accelerator, whether they are the same now; None where the host knows it."""
        self._known: bool | None = None
        self._later = Later()

    def holds(self, same: Tensor) -> bool:
        """Tell whether to share the work of this step: the same on all ranks.

        Args:
            same: from `same_on_replicas`.
        """
        if reads_at_once(same.device):
            return bool(same)
        self._later.read(wait=True)  # for the step before, which is no wait for what is queued now
        self.flag = same
        self._later.tell(same, self._learn)
        self._later.send()
        if self._known is None:
            self._later.read(wait=True)
        return bool(self._known)

    def _learn(self, values: Sequence[float]) -> None:
        same = bool(values[0])
        if self._known and not same:
            logger.warning(
                "The gradients of the processes differ: in the step where that began, the matrices that they share "
                "were left unchanged; from now on each process normalises its own. Type split_whitening=false to "
                "share none."
            )
        self._known = same


def shared_updates(
    shapes: Sequence[tuple[int, ...]],
    compute: Callable[[list[int]], list[Tensor]],
    group: dist.ProcessGroup,
    *,
    like: Tensor,
    batch_bytes: int,
) -> Iterator[tuple[int, Tensor]]:
    """Compute some of the updates on each replica, and yield all of them with their positions (collectives).

    Args:
        shapes: of all updates.
        compute: returns the updates at some positions.
        group: the replicas.
        like: for the device, and in at least float32 the dtype, of the updates.
        batch_bytes: what a rank computes before the updates are shared, unless one alone is larger.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    dtype = torch.promote_types(like.dtype, torch.float32)
    order = sorted(range(len(shapes)), key=lambda i: (-whitening_cost(shapes[i]), shapes[i]))
    while order:
        turn = ranks * max(1, batch_bytes // max(1, _numel(shapes[order[0]]) * dtype.itemsize))
        now, order = order[:turn], order[turn:]
        owned = [now[owner::ranks] for owner in range(ranks)]
        length = max(sum(_numel(shapes[i]) for i in positions) for positions in owned)
        mine = like.new_zeros(length, dtype=dtype)
        updates = [update.reshape(-1) for update in compute(owned[rank])] if owned[rank] else []
        if updates:
            mine[: sum(update.numel() for update in updates)] = torch.cat(updates)
        gathered = list(mine.new_empty(ranks, length).unbind())
        dist.all_gather(gathered, mine, group=group)
        for positions, flat in zip(owned, gathered, strict=True):
            sizes = [_numel(shapes[i]) for i in positions]
            for i, update in zip(positions, flat[: sum(sizes)].split_with_sizes(sizes), strict=True):
                yield i, update.view(shapes[i])


def whitening_cost(shape: tuple[int, ...]) -> int:
    """Return what whitening a matrix or a stack costs: multiplications of the smaller side's Gram matrix."""
    return _numel(shape) * min(shape[-2:]) if len(shape) > 1 else _numel(shape)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())

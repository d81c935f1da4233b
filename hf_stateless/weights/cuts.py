"""How a parameter is cut: into a part for each rank of one process group, or of several one after the other.

FSDP2 cuts rows. Tensor parallelism cuts rows of some matrices and columns of others, expert parallelism cuts between
the matrices of a stack, and each of them has its own dimension of a device mesh.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard


@dataclass(frozen=True)
class Split:
    """One dimension of a tensor cut into a part for each rank of a process group; parts may be uneven or empty.

    Example:
        >>> from hf_stateless.weights.cuts import Split
        >>> split = Split(group=None, rank=1, shape=(5, 3), dim=0, ranks=4, device="cpu")
        >>> [split.part(rank) for rank in range(4)]
        [(2, 3), (2, 3), (1, 3), (0, 3)]
    """

    group: dist.ProcessGroup
    """The ranks that hold the parts; replicas of a part are in other groups."""
    rank: int
    """This rank's number in the group."""
    ranks: int
    shape: tuple[int, ...]
    """Of what is cut: the whole tensor, or this rank's part of it by another split."""
    dim: int
    """Which dimension is cut."""
    device: torch.device
    """Where tensors have to be for the group to send them; a CPU-offloaded shard is elsewhere."""
    pieces: int = 1
    """How many tensors lie packed in the dimension, of each of which a rank has a part: gate and up projection."""

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks of the group: groups of two meshes that have the same members are one for us."""
        return _members(self.group)

    def part(self, rank: int) -> tuple[int, ...]:
        """Return the shape of the part of one rank: cut as `torch.chunk` does, missing chunks are empty."""
        return (*self.shape[: self.dim], sum(self._sizes(rank)), *self.shape[self.dim + 1 :])

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Return the part of each rank; views of the whole tensor, unless several are packed in it."""
        sizes = [self._sizes(rank) for rank in range(self.ranks)]
        in_order = iter(
            whole.split_with_sizes([of_rank[i] for i in range(self.pieces) for of_rank in sizes], self.dim)
        )
        by_piece = [[next(in_order) for _ in range(self.ranks)] for _ in range(self.pieces)]
        return [_joined(list(of_rank), self.dim) for of_rank in zip(*by_piece, strict=True)]

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """Return what was cut from the parts of all ranks, in their order."""
        cut = [part.split_with_sizes(self._sizes(rank), self.dim) for rank, part in enumerate(parts)]
        return torch.cat([of_rank[i] for i in range(self.pieces) for of_rank in cut], self.dim)

    def _sizes(self, rank: int) -> list[int]:
        """Return how much of each piece a rank has."""
        return [length for _, length in runs_of(self.shape[self.dim], self.pieces, self.ranks, rank)]


def runs_of(size: int, pieces: int, ranks: int, rank: int) -> tuple[tuple[int, int], ...]:
    """Return where in a dimension the part of a rank begins in each of the pieces, and how much of it that is.

    Args:
        size: of the dimension.
        pieces: how many tensors lie packed in it, see `Split`.
        ranks: how many have a part of each piece, cut as `torch.chunk` does.
        rank: one of them.

    Example:
        >>> from hf_stateless.weights.cuts import runs_of
        >>> runs_of(12, pieces=2, ranks=4, rank=1), runs_of(5, pieces=1, ranks=4, rank=3)
        (((2, 2), (8, 2)), ((5, 0),))
    """
    piece, runs = -(-size // pieces), []
    for i in range(pieces):
        start = min(i * piece, size)
        length = min(piece, size - start)
        chunk = -(-length // ranks)
        first = min(rank * chunk, length)
        runs.append((start + first, min(chunk, length - first)))
    return tuple(runs)


def splits_of(param: Tensor) -> tuple[Split, ...] | None:
    """Describe how a parameter is cut: nothing for what each rank has as a whole.

    Its gradient has to be cut in the same way. Further mesh dimensions may replicate it.

    Returns:
        The splits in the order in which they are undone: the first puts this rank's part together with those of other
        ranks, the last makes the whole tensor. None where the cut is of a kind that is not known here.
    """
    grad = param.grad if isinstance(param, DTensor) else None
    if isinstance(param, DTensor) and (
        not isinstance(grad, DTensor) or grad.device_mesh != param.device_mesh or grad.placements != param.placements
    ):
        return None
    return cuts_of(param)


def cuts_of(tensor: Tensor) -> tuple[Split, ...] | None:
    """Describe how any tensor is cut, as `splits_of` does."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements
    cut = [i for i, one in enumerate(placements) if not one.is_replicate() and mesh.size(i) > 1]
    if any(type(placements[i]) not in (Shard, _StridedShard) for i in cut):
        return None
    splits, shape = [], tuple(tensor.shape)
    for i, dim, pieces in _as_applied(tensor, cut):
        one = Split(
            group=mesh.get_group(i),
            rank=mesh.get_local_rank(i),
            ranks=mesh.size(i),
            shape=shape,
            dim=dim,
            device=torch.device(mesh.device_type),
            pieces=pieces,
        )
        splits.append(one)
        shape = one.part(one.rank)
    return tuple(reversed(splits)) if shape == tuple(tensor.to_local().shape) else None


def _as_applied(param: DTensor, cut: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the mesh dimensions that cut, with the dimension and the pieces of it, in the order in which they do.

    That is their order in the mesh, but FSDP2 cuts what tensor parallelism has left: where both cut one dimension,
    DTensor writes the one that comes first in the mesh and cuts last as strided, by the number of the parts before.
    """
    order: list[tuple[int, int, int]] = []
    for i in reversed(cut):
        placement = param.placements[i]
        dim, factor = placement.dim % param.ndim, getattr(placement, "split_factor", 1)  # type: ignore[attr-defined]
        before = math.prod(param.device_mesh.size(j) for j, other, _ in order if other == dim)
        if factor > 1 and factor == before:
            order.append((i, dim, 1))
        else:
            order.insert(0, (i, dim, factor))
    return order


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the gathered tensor (a collective on all ranks of its mesh); a plain tensor is returned as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    sendable = tensor.to(tensor.device_mesh.device_type)  # what is offloaded to the CPU cannot be sent from there
    assert isinstance(sendable, DTensor)
    splits = cuts_of(sendable) or ()
    if all(split.pieces == 1 for split in splits):
        return sendable.full_tensor()
    whole = sendable.to_local()  # packed projections, which DTensor of torch 2.11 cannot gather
    for split in splits:
        whole = split.whole(_parts_of_all(whole, split))
    return whole


def _parts_of_all(part: Tensor, split: Split) -> list[Tensor]:
    """Return the parts of all ranks; they are sent at one size, though some may be smaller."""
    shapes = [torch.Size(split.part(rank)) for rank in range(split.ranks)]
    length = max(shape.numel() for shape in shapes)
    sent = torch.nn.functional.pad(part.reshape(-1), (0, length - part.numel()))
    gathered = list(sent.new_empty(split.ranks, length).unbind())
    dist.all_gather(gathered, sent, group=split.group)
    return [flat[: shape.numel()].view(shape) for flat, shape in zip(gathered, shapes, strict=True)]


def groups_of(tensors: Sequence[Tensor]) -> Iterator[dist.ProcessGroup]:
    """Yield the process groups among which any of some tensors is cut, each once and in one order on all ranks."""
    seen = set()
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            continue
        mesh = tensor.device_mesh
        for i, placement in enumerate(tensor.placements):
            if placement.is_replicate() or mesh.size(i) == 1:
                continue
            group = mesh.get_group(i)
            if _members(group) not in seen:
                seen.add(_members(group))
                yield group


def _members(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(sorted(dist.get_process_group_ranks(group)))


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)

"""Matrices in a flat buffer of which each rank holds an equal part, as ZeRO-1 and -2 of DeepSpeed leave them.

A part holds most of its matrices whole. Only those that lie across the border of two parts are exchanged, between the
ranks that hold something of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


# DeepSpeed pads a buffer so that each part is a multiple of this many elements.
_ALIGNED = 2


@dataclass(frozen=True)
class FlatCut:
    """Where the parameters of a buffer lie, and which part of it this rank holds.

    Example:
        >>> from hf_stateless.ranks.flat import FlatCut
        >>> cut = FlatCut(rank=0, ranks=2, size=8, spans=((0, 6), (6, 12)))
        >>> [cut.held(i) for i in range(2)], [cut.holders(i) for i in range(2)]
        ([(0, 6), (6, 8)], [[0], [0, 1]])
    """

    rank: int
    ranks: int
    size: int
    """Elements of a part."""
    spans: tuple[tuple[int, int], ...]
    """First element of each parameter in the buffer, and the one after its last."""

    shared = False
    """Whether all ranks come to have the same whole gradients; here each has those of its own part."""

    def __len__(self) -> int:
        """Return how many parameters lie in the buffer."""
        return len(self.spans)

    def held(self, position: int, rank: int | None = None) -> tuple[int, int]:
        """Return which elements of the buffer a rank holds of a parameter; first and last are equal for none."""
        begin = (self.rank if rank is None else rank) * self.size
        start, stop = (min(max(edge, begin), begin + self.size) for edge in self.spans[position])
        return start, stop

    def holders(self, position: int) -> list[int]:
        """Return the ranks that hold something of a parameter."""
        start, stop = self.spans[position]
        return list(range(start // self.size, (stop - 1) // self.size + 1)) if stop > start else []

    def mine(self) -> list[int]:
        """Return the positions of the parameters of which this rank holds something."""
        return [i for i in range(len(self.spans)) if self.rank in self.holders(i)]

    def place(self, position: int) -> tuple[int, int]:
        """Return which elements of a parameter this rank holds: the first, and the one after the last."""
        start, stop = self.held(position)
        return start - self.spans[position][0], stop - self.spans[position][0]

    def piece(self, part: Tensor, position: int) -> Tensor:
        """Return this rank's piece of a parameter, as a view of its part."""
        start, stop = self.held(position)
        return part[start - self.rank * self.size : stop - self.rank * self.size]

    def batches(self, part: Tensor) -> Iterator[dict[int, Tensor]]:
        """Yield once what this rank holds something of, whole and flat: views of its part, or put together.

        Args:
            part: this rank's part of a buffer, such as that of the gradients. All ranks have to call this.
        """
        whole, messages = {}, []
        for i in self.mine():
            whole[i] = piece = self.piece(part, i)
            if len(self.holders(i)) == 1:
                continue
            first = self.spans[i][0]
            whole[i] = part.new_empty(self.spans[i][1] - first)
            for rank in self.holders(i):
                start, stop = (edge - first for edge in self.held(i, rank))
                there = whole[i][start:stop]
                if rank == self.rank:
                    there.copy_(piece)
                else:
                    messages += [dist.P2POp(dist.isend, piece, rank), dist.P2POp(dist.irecv, there, rank)]
        for work in dist.batch_isend_irecv(messages) if messages else ():
            work.wait()
        yield whole


def flat_cut(part: Tensor, params: Sequence[Tensor]) -> FlatCut | None:
    """Find how the parameters of a model lie in a buffer, or return None if a part is not what that says.

    The parameters are views of the buffer in the precision of the model, whole on all ranks. The part is compared with
    them, on all ranks together, so that nothing about the sharding is taken on trust.

    Args:
        part: this rank's part of the buffer, in the precision of the optimizer.
        params: all parameters of the buffer.
    """
    rank, ranks = place_among_ranks()
    offsets = [int(p.storage_offset()) for p in params]
    starts = [offset - min(offsets) for offset in offsets]
    spans = tuple((start, start + p.numel()) for start, p in zip(starts, params, strict=True))
    total = max(stop for _, stop in spans)
    cut = FlatCut(rank, ranks, part.numel(), spans)
    alike = part.ndim == 1 and total <= ranks * part.numel() < total + _ALIGNED * ranks
    alike = alike and len({p.untyped_storage().data_ptr() for p in params}) == 1
    alike = (
        alike and all(p.is_contiguous() for p in params) and all(_same(cut, i, part, params[i]) for i in cut.mine())
    )
    return cut if on_all(alike, part) else None


def place_among_ranks() -> tuple[int, int]:
    """Return the number of this rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_all(held: bool, like: Tensor) -> bool:
    """Tell whether something holds on all ranks (a collective), by a flag on the device of a tensor."""
    if place_among_ranks()[1] == 1:
        return held
    flag = torch.tensor([int(held)], device=like.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _same(cut: FlatCut, position: int, part: Tensor, param: Tensor) -> bool:
    start, stop = (edge - cut.spans[position][0] for edge in cut.held(position))
    return torch.equal(param.detach().view(-1)[start:stop], cut.piece(part, position).to(param.dtype))

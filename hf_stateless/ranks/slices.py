"""Parameters of which each rank holds an equal slice, as ZeRO-3 of DeepSpeed leaves them: gathered a few at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from ..update.batches import bounded
from .flat import on_all, place_among_ranks


GATHERED_BYTES = 1 << 28
"""What is gathered at once, unless one parameter alone is larger."""


@dataclass(frozen=True)
class SliceCut:
    """How some parameters lie in a part: of each, flat, the slice of this rank, one slice after the other.

    Example:
        >>> from hf_stateless.ranks.slices import SliceCut
        >>> cut = SliceCut(rank=1, ranks=2, sizes=(6, 5))
        >>> [cut.width(i) for i in range(2)], [cut.place(i) for i in range(2)], cut.size
        ([3, 3], [(3, 6), (3, 5)], 6)
    """

    rank: int
    ranks: int
    sizes: tuple[int, ...]
    """Elements of each parameter as a whole."""

    shared = True
    """Whether all ranks come to have the same whole gradients, so that they can share the work on them."""

    def width(self, position: int) -> int:
        """Return the elements of a slice; that of the last ranks is filled up."""
        return -(-self.sizes[position] // self.ranks)

    def __len__(self) -> int:
        """Return how many parameters lie in a part."""
        return len(self.sizes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each slice begins in a part, and where the last one ends."""
        return tuple(accumulate(map(self.width, range(len(self))), initial=0))

    @property
    def size(self) -> int:
        """The elements of a part."""
        return self.starts[-1]

    def place(self, position: int) -> tuple[int, int]:
        """Return which elements of a parameter this rank holds: the first, and the one after the last."""
        start = min(self.rank * self.width(position), self.sizes[position])
        return start, min(start + self.width(position), self.sizes[position])

    def piece(self, part: Tensor, position: int) -> Tensor:
        """Return this rank's slice of a parameter, as a view of its part."""
        first = self.starts[position]
        start, stop = self.place(position)
        return part[first : first + stop - start]

    def batches(self, part: Tensor) -> Iterator[dict[int, Tensor]]:
        """Yield some parameters after others, whole and flat (a collective for each batch).

        Which are together does not depend on the dtype of the part.
        """
        limit = GATHERED_BYTES // torch.float32.itemsize
        for some in bounded(range(len(self)), self.sizes.__getitem__, limit):
            widths = [self.width(i) for i in some]
            mine = part[self.starts[some[0]] : self.starts[some[-1] + 1]]
            slices = part.new_empty(self.ranks, len(mine))
            if self.ranks > 1:
                dist.all_gather_into_tensor(slices.view(-1), mine)
            else:
                slices[0] = mine
            whole = zip(some, slices.split_with_sizes(widths, dim=1), strict=True)
            yield {i: of_one.reshape(-1)[: self.sizes[i]] for i, of_one in whole}


def slice_cut(part: Tensor, params: Sequence[Tensor]) -> SliceCut | None:
    """Find how the first of some parameters lie in a part, or return None if the part is not what that says.

    DeepSpeed puts each of them together in turn, and its values are compared with the part, on all ranks together, so
    that nothing about the sharding is taken on trust.

    Args:
        part: this rank's part, in the precision of the optimizer.
        params: parameters of the model that DeepSpeed has cut, in the order of the part; the part may end before them.
    """
    import deepspeed

    rank, ranks = place_among_ranks()
    sizes = tuple(int(p.ds_numel) for p in params)  # type: ignore[attr-defined]
    ends = SliceCut(rank, ranks, sizes).starts[1:]
    count = next((n for n, end in enumerate(ends, start=1) if end >= part.numel()), 0)
    cut = SliceCut(rank, ranks, sizes[:count])
    if not on_all(part.ndim == 1 and cut.size == part.numel(), part):
        return None
    alike = True
    for i in range(count):
        with deepspeed.zero.GatheredParameters([params[i]]):
            whole = params[i].detach().reshape(-1)
            start, stop = cut.place(i)
            same = torch.equal(whole[start:stop], cut.piece(part, i).to(whole.dtype))
            alike = alike and len(whole) == cut.sizes[i] and same
    return cut if on_all(alike, part) else None


@contextlib.contextmanager
def shapes_shown(params: Iterable[Tensor]) -> Iterator[None]:
    """Let parameters that ZeRO-3 has cut show the shapes they have as a whole; their values are zeros meanwhile.

    Args:
        params: of a model; those that DeepSpeed has not cut stay as they are.
    """
    hidden = {p: p.data for p in params if is_sliced(p) and p.shape != p.ds_shape}  # type: ignore[attr-defined]
    for p in hidden:
        p.data = p.data.new_zeros(1).expand(p.ds_shape)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for p, data in hidden.items():
            p.data = data


def is_sliced(param: Tensor) -> bool:
    """Tell whether ZeRO-3 has cut a parameter."""
    return hasattr(param, "ds_shape")

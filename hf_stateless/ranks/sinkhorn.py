r"""SR-Sinkhorn on sharded matrices: each rank works on its own part, and only vectors are sent.

Of X = diag(r) G diag(c) with G in R^{m x n} cut by rows, r is a rank's own business and c needs sums over all ranks:
one all-reduce of n numbers in each iteration. Cut by columns it is the other way round. All matrices of the optimizer
go through the iterations together, so that each iteration is one all-reduce, however many parameters there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..norms.projections import power_of_two_inverse
from ..norms.sinkhorn import matvec, smallest_sum
from .placement import Split


# Bytes of squared gradients that are kept between iterations; the squares of what goes beyond are formed each time.
_KEPT_BYTES = 256 << 20


class ShardedMatrices:
    """This rank's parts of matrices of one shape, between two iterations.

    Args:
        grads: the parts, each viewed as (..., rows, columns); stacked if there are several.
        split: how the matrices are cut.
        along: the dimension of the view that is cut: -2 for rows, -1 for columns, or 0 for a stack of matrices of
            which each is whole on one rank.
        sizes: (m, n) of the whole matrices.
        keep_squares: hold the float32 squares of the gradients from one iteration to the next.
    """

    def __init__(
        self, grads: Sequence[Tensor], split: Split, along: int, sizes: tuple[int, int], *, keep_squares: bool
    ) -> None:
        self.grads, self.split, self.along = grads, split, along
        self.rows, self.columns = sizes
        self._exact = torch.promote_types(grads[0].dtype, torch.float32)
        empty = grads[0].numel() == 0  # and then there may be no entry to take the maximum of
        self._row_scale = torch.stack(
            [g.new_ones(g.shape[:-1], dtype=self._exact) if empty else _row_scale(g, self._exact) for g in grads]
        )
        self._squares = self._square() if keep_squares else None
        self._u = torch.ones_like(self._row_scale)
        self._v = self._row_scale.new_ones(len(grads), *grads[0].shape[:-2], grads[0].shape[-1])
        self._row_sums, self._column_sums = self._u, self._v
        self._local_size = self._row_scale.new_zeros(len(grads))
        self.size = self._local_size

    @property
    def first_column(self) -> int:
        """Where this rank's columns begin, where columns are cut."""
        widths = [self.split.part(rank)[self.split.dim] for rank in range(self.split.rank)]
        return sum(widths)

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype in which sums over ranks are safe.

        Sums over columns are of numbers that all ranks scale alike. The row scales of a matrix that is cut by columns
        differ over ranks, so that its row sums are sent unscaled and need the range of float64.
        """
        return torch.float64 if self.along == -1 else self._exact

    def local_sums(self) -> Tensor:
        """Do what can be done alone, and return what the ranks have to add up, flat."""
        squares = self._square() if self._squares is None else self._squares
        if self.along == -1:
            return (_times(squares, self._v).double() / self._row_scale.double().square()).flatten()
        self._row_sums = _times(squares, self._v)
        self._u = self._row_sums.clamp_min(smallest_sum(self.columns)).reciprocal().mul_(self.columns)
        column_sums = _times(squares.mT, self._u)
        # Whether a gradient is zero or not finite may show on one rank only: the sizes travel with the sums.
        size = _largest(self._row_factors())
        if self.along == -2:
            return torch.cat([column_sums.flatten(), size])
        self._set_columns(column_sums)
        return size + 0 * _largest(self._column_factors())

    def take_sums(self, total: Tensor) -> None:
        """Go on with the sums over all ranks, flat as `local_sums` returned them."""
        if self.along == -1:
            row_sums = total.view_as(self._row_scale)
            tiny = torch.finfo(row_sums.dtype).tiny
            self._unscaled_u = torch.where(row_sums < tiny, 0, self.columns / row_sums)
            self._u = (self._unscaled_u / self._row_scale.double().square()).to(self._exact)
            squares = self._square() if self._squares is None else self._squares
            self._set_columns(_times(squares.mT, self._u))
            self.size = (_largest(self._row_factors()) + 0 * _largest(row_sums)).to(self._exact)
            return
        total = total.to(self._exact)
        count = len(self.grads)
        if self.along == -2:
            self._set_columns(total[:-count].view_as(self._column_sums))
        self.size = total[-count:] + 0 * _largest(self._column_factors())

    def scalings(self) -> tuple[Tensor, Tensor]:
        """Return r and c of this rank's parts, stacked."""
        return self._row_factors(), self._column_factors()

    def _set_columns(self, column_sums: Tensor) -> None:
        self._column_sums = column_sums
        self._v = column_sums.clamp_min(smallest_sum(self.rows)).reciprocal().mul_(self.rows)

    def _row_factors(self) -> Tensor:
        if self.along == -1:
            r = self._unscaled_u.sqrt().to(self._exact)
        else:
            r = self._u.sqrt().masked_fill_(self._row_sums <= smallest_sum(self.columns), 0).mul_(self._row_scale)
        return r.masked_fill_(r == torch.inf, 0)  # a row of denormal numbers counts as zero

    def _column_factors(self) -> Tensor:
        return self._v.sqrt().masked_fill_(self._column_sums <= smallest_sum(self.rows), 0)

    def _square(self) -> Tensor:
        squares = torch.stack([grad.to(self._exact) for grad in self.grads])
        return squares.mul_(self._row_scale.unsqueeze(-1)).square_()


def iterate(batches: Sequence[ShardedMatrices], num_iterations: Sequence[int]) -> None:
    """Run SR-Sinkhorn on the matrices of one process group, with one all-reduce in each iteration (a collective).

    Args:
        batches: the parts of this rank, in an order that is the same on all ranks.
        num_iterations: L of each.
    """
    split = batches[0].split
    for iteration in range(max(num_iterations)):
        running = [batch for batch, last in zip(batches, num_iterations, strict=True) if iteration < last]
        dtype = torch.float32
        for batch in running:
            dtype = torch.promote_types(dtype, batch.sum_dtype)
        sums = [batch.local_sums().to(split.device, dtype) for batch in running]
        flat = torch.cat(sums)
        dist.all_reduce(flat, group=split.group)
        for batch, total in zip(running, flat.split_with_sizes([part.numel() for part in sums]), strict=True):
            batch.take_sums(total.to(batch.grads[0].device))


def keep_squares(held: int, grads: Sequence[Tensor]) -> bool:
    """Tell whether the squares of these gradients may be kept, beside so many elements that are kept already."""
    return 4 * (held + sum(grad.numel() for grad in grads)) <= _KEPT_BYTES


def _row_scale(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return power_of_two_inverse(grad.abs().amax(-1).to(dtype))


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return matrices @ vectors; for a single one as a product that is fast on CPU, where bmm is slow."""
    if matrices.ndim == 3 and len(matrices) == 1:
        return matvec(matrices[0], vectors[0]).unsqueeze(0)
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def _largest(factors: Tensor) -> Tensor:
    """Return the largest factor of each matrix, 0 where this rank holds none; NaN and infinity stay."""
    flat = factors.flatten(1)
    return flat.amax(1) if flat.shape[1] else flat.new_zeros(len(flat))

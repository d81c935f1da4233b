r"""SR-Sinkhorn on sharded matrices: each rank works on its own part, and only vectors are sent.

Of X = diag(r) G diag(c) with G in R^{m x n} cut by rows, r is a rank's own business and c needs sums over all ranks:
one all-reduce of n numbers in each iteration. Cut by columns it is the other way round, and cut by both, r is added up
over one mesh dimension and then c over the other. All matrices of the optimizer go through the iterations together, so
that each iteration is one all-reduce for each mesh dimension, however many parameters there are.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..norms.projections import power_of_two_inverse
from ..norms.sinkhorn import matvec, scaled, smallest_sum, sr_sinkhorn
from ..weights.cuts import Split


# Bytes of squared gradients that are kept between iterations; the squares of what goes beyond are formed each time.
_KEPT_BYTES = 256 << 20


@dataclass
class _Sum:
    """What the ranks of some groups have to add up."""

    over: list[Split]
    part: Tensor
    more: bool = False
    """Whether another sum over other groups follows in the same iteration."""


class ShardedMatrices:
    """This rank's parts of matrices of one shape, between two iterations.

    Args:
        grads: the parts, each viewed as (..., rows, columns); stacked if there are several.
        splits: how the matrices are cut, in any order.
        cuts: what each split cuts of the view: -2 its rows, -1 its columns, or 0 a stack of matrices between them.
        sizes: (m, n) of the whole matrices.
        keep_squares: hold the float32 squares of the gradients from one iteration to the next.
    """

    def __init__(
        self,
        grads: Sequence[Tensor],
        splits: Sequence[Split],
        cuts: Sequence[int | None],
        sizes: tuple[int, int],
        *,
        keep_squares: bool,
    ) -> None:
        self.grads, self.split, self.along = grads, splits[0], cuts[0]
        self._over = {
            along: [split for split, cut in zip(splits, cuts, strict=True) if cut == along] for along in (-2, -1, 0)
        }
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
        self.size = self._row_scale.new_zeros(len(grads))

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
        return torch.float64 if self._over[-1] else self._exact

    def iteration(self, *, last: bool, half: bool = False) -> Generator[_Sum, Tensor, None]:
        """Do one iteration; yield what the ranks have to add up, flat, and take in each sum.

        Whether a gradient is zero or not finite may show on one rank only: the sizes travel with the sums.

        Args:
            last: no whole iteration follows.
            half: stop after the rows.
        """
        squares = self._kept_or_new_squares()
        sums = _times(squares, self._v)
        if self._over[-1]:
            del squares  # or those of all batches would be held while they wait for each other
            sent = (sums.double() / self._row_scale.double().square()).flatten()
            size = self._take_unscaled((yield _Sum(self._over[-1], sent, bool(self._over[-2]))))
            squares = self._kept_or_new_squares()
        else:
            self._row_sums = sums
            self._u = sums.clamp_min(smallest_sum(self.columns)).reciprocal().mul_(self.columns)
            size = _largest(self._row_factors())
        if half:
            return
        sums = _times(squares.mT, self._u)
        del squares
        if self._over[-2]:
            total = yield _Sum(self._over[-2], torch.cat([sums.flatten(), size]))
            sums, size = total[: sums.numel()].view_as(sums), total[sums.numel() :]
        self._set_columns(sums.to(self._exact))
        size = size.to(self._exact) + 0 * _largest(self._column_factors())
        if self._over[0] and last:
            size = yield _Sum(self._over[0], size)
        self.size = size.to(self._exact)

    def _take_unscaled(self, total: Tensor) -> Tensor:
        """Take in the sums of rows that are cut, and return the sizes."""
        row_sums = total.view_as(self._row_scale)
        tiny = torch.finfo(row_sums.dtype).tiny
        self._unscaled_u = torch.where(row_sums < tiny, 0, self.columns / row_sums)
        self._u = (self._unscaled_u / self._row_scale.double().square()).to(self._exact)
        return (_largest(self._row_factors()) + 0 * _largest(row_sums)).to(self._exact)

    def scalings(self) -> tuple[Tensor, Tensor]:
        """Return r and c of this rank's parts, stacked."""
        return self._row_factors(), self._column_factors()

    def _set_columns(self, column_sums: Tensor) -> None:
        self._column_sums = column_sums
        self._v = column_sums.clamp_min(smallest_sum(self.rows)).reciprocal().mul_(self.rows)

    def _row_factors(self) -> Tensor:
        if self._over[-1]:
            r = self._unscaled_u.sqrt().to(self._exact)
        else:
            r = self._u.sqrt().masked_fill_(self._row_sums <= smallest_sum(self.columns), 0).mul_(self._row_scale)
        return r.masked_fill_(r == torch.inf, 0)  # a row of denormal numbers counts as zero

    def _column_factors(self) -> Tensor:
        return self._v.sqrt().masked_fill_(self._column_sums <= smallest_sum(self.rows), 0)

    def _kept_or_new_squares(self) -> Tensor:
        return self._square() if self._squares is None else self._squares

    def _square(self) -> Tensor:
        squares = torch.stack([grad.to(self._exact) for grad in self.grads])
        return squares.mul_(self._row_scale.unsqueeze(-1)).square_()


def iterate(batches: Sequence[ShardedMatrices], num_iterations: Sequence[float]) -> None:
    """Run SR-Sinkhorn, with one all-reduce in each iteration for each mesh dimension that cuts (a collective).

    Args:
        batches: the parts of this rank, in an order that is the same on all ranks.
        num_iterations: L of each; a half (5.5) adds a last row step.
    """
    half_steps = [round(2 * number) for number in num_iterations]
    for iteration in range((max(half_steps) + 1) // 2):
        asked = [
            _Asked(batch, batch.iteration(last=iteration + 1 == steps // 2, half=2 * iteration + 1 == steps))
            for batch, steps in zip(batches, half_steps, strict=True)
            if 2 * iteration < steps
        ]
        while asked := [one for one in asked if one.asks()]:
            _add_up(asked)


@dataclass
class _Asked:
    """A batch in the midst of an iteration, and the sum that it waits for."""

    batch: ShardedMatrices
    steps: Generator[_Sum, Tensor, None]
    sum: _Sum | None = None
    groups: dict[tuple[int, ...], Split] = field(default_factory=dict)
    """Over which its part is not yet added up, by their members."""

    def asks(self) -> bool:
        """Go on as far as possible without a collective; return whether there is one to wait for."""
        while not self.groups:
            try:
                part = None if self.sum is None else self.sum.part.to(self.batch.grads[0].device)
                self.sum = self.steps.send(part)  # type: ignore[arg-type]
            except StopIteration:
                return False
            self.groups = {split.members: split for split in self.sum.over}
        return True


def _add_up(asked: Sequence[_Asked]) -> None:
    """Add up what waits for one group: one for which others wait that have more to ask for, or that most wait for."""
    sums = [(one, one.sum) for one in asked if one.sum is not None]
    first = [one for one, its in sums if its.more] or asked
    wanted = [members for one in first for members in one.groups]
    members = max(dict.fromkeys(wanted), key=wanted.count)
    mine = [(one, its) for one, its in sums if members in one.groups]
    split, dtype = mine[0][0].groups[members], torch.float32
    for one, _ in mine:
        dtype = torch.promote_types(dtype, one.batch.sum_dtype)
    parts = [its.part.to(split.device, dtype) for _, its in mine]
    flat = torch.cat(parts)
    dist.all_reduce(flat, group=split.group)
    for (one, its), total in zip(mine, flat.split_with_sizes([part.numel() for part in parts]), strict=True):
        its.part = total
        del one.groups[members]


def sinkhorn_of_part(part: Tensor, splits: Sequence[Split], sizes: tuple[int, int], num_iterations: float) -> Tensor:
    """Return this rank's part of SR-Sinkhorn of one matrix (a collective where it is cut).

    Args:
        part: (rows, columns) of the matrix, in at least float32.
        splits: how it is cut; nothing for what this rank has as a whole.
        sizes: (m, n) of the whole matrix.
        num_iterations: L; a half (5.5) adds a last row step.

    Example:
        >>> import torch
        >>> from hf_stateless.ranks.sinkhorn import sinkhorn_of_part
        >>> sinkhorn_of_part(torch.tensor([[1.0, 2.0], [3.0, -6.0]]), (), (2, 2), 5).round(decimals=4)
        tensor([[ 1.,  1.],
                [ 1., -1.]])
    """
    if not splits:
        return sr_sinkhorn(part, num_iterations)
    batch = ShardedMatrices([part], splits, [split.dim - 2 for split in splits], sizes, keep_squares=True)
    iterate([batch], [num_iterations])
    rows, columns = batch.scalings()
    del batch  # with the squares
    return scaled(part, rows[0], columns[0])


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

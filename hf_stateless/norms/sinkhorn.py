r"""SR-Sinkhorn in its diagonal form: X_L = diag(r) G diag(c), so the gradient is read and never rewritten.

The squares of the entries follow the classical Sinkhorn iteration: with P = G * G, u_i = n / sum_j P_ij v_j and
v_j = m / sum_i P_ij u_i, started at v = 1, give r = sqrt(u) and c = sqrt(v). The vectors are float32 whatever the
gradient's dtype: 2e-7 relative error where iterating on a bf16 matrix has 5e-3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .projections import power_of_two_inverse


# Sums of squares below this are made of denormal numbers and have lost their digits: entries smaller than about
# 1e-18 of their row's largest count as zero.
_SMALLEST_SUM = 1e-36


def smallest_sum(size: int) -> float:
    """Return the sum of squares below which a row or column of a given length counts as zero.

    Above `size` / float32's maximum, so that `size` / sum stays finite: infinity times a zero entry would be NaN.
    """
    return max(_SMALLEST_SUM, size * 4e-39)


# Row sums of squares between these need no scaling by row: what underflows is below 1e-16 of its row's norm.
SAFE_SUMS = (1e-4, 1e30)
# Elements from which on a second thread saves more than the call costs.
_WORTH_A_THREAD = 1 << 16
# Numbers that BLAS adds up on CPU before their sum goes to the others: sums across rows are added one by one, and of
# 200,000 in float32 the last two digits would be lost; those along rows have several lanes.
_LONGEST_SUMS = (1 << 11, 1 << 15)


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return matrix @ vector for (..., m, n) and (..., n); on CPU a loop, since bmm is slow with one column.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.sinkhorn import matvec
        >>> matvec(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 1.0]))
        tensor([12., 34.])
    """
    if matrix.device.type != "cpu":
        return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
    if matrix.ndim == 2:
        return _in_short_sums(matrix, vector)
    flat, vectors = matrix.reshape(-1, *matrix.shape[-2:]), vector.reshape(-1, vector.shape[-1])
    return torch.stack([_in_short_sums(a, b) for a, b in zip(flat, vectors, strict=True)]).view(matrix.shape[:-1])


def _in_short_sums(matrix: Tensor, vector: Tensor) -> Tensor:
    longest = _LONGEST_SUMS[matrix.is_contiguous()]
    if len(vector) <= longest:
        return _matvec_in_threads(matrix, vector)
    parts = zip(torch.split(matrix, longest, 1), torch.split(vector, longest), strict=True)
    return torch.stack([_matvec_in_threads(*part) for part in parts]).sum(0)


def _matvec_in_threads(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return matrix @ vector on CPU: `mv` has one thread, bmm with one row has one for each block of rows."""
    rows_first = matrix.is_contiguous()
    stored = matrix if rows_first else matrix.mT
    blocks = math.gcd(len(stored), torch.get_num_threads())
    if blocks == 1 or stored.numel() < _WORTH_A_THREAD or not stored.is_contiguous():
        return torch.mv(matrix, vector)
    parts = stored.view(blocks, -1, stored.shape[1])
    if rows_first:
        return torch.bmm(vector.expand(blocks, 1, -1), parts.mT).view(-1)
    return torch.bmm(vector.view(blocks, 1, -1), parts).sum((0, 1))


def _squares_(grad: Tensor, squares: Tensor) -> tuple[Tensor | float, Tensor]:
    """Write the squares of a gradient whose rows are scaled by powers of two; return the factors and the row sums.

    On CPU the row sums tell whether the scaling can be left out; on an accelerator reading them would cost a
    synchronisation, and the scaling costs little.
    """
    ones = torch.ones_like(squares[..., 0, :])
    if grad.device.type == "cpu" and squares.dtype == torch.float32 and grad.ndim == 2:
        # One power of two, from the first row, brings most gradients to size one without a pass of its own.
        scale = power_of_two_inverse(grad[0].abs().amax().float())
        if grad.dtype == squares.dtype:
            torch.mul(grad, scale, out=squares).square_()
        else:
            squares.copy_(grad).mul_(scale).square_()
        sums = matvec(squares, ones)
        least, most = torch.aminmax(sums)
        if SAFE_SUMS[0] < least and most < SAFE_SUMS[1]:
            return scale, sums
    row_scale = power_of_two_inverse(squares.copy_(grad).abs_().amax(-1))
    squares.mul_(row_scale.unsqueeze(-1)).square_()
    return row_scale, matvec(squares, ones)


def sinkhorn_scalings(
    grad: Tensor, num_iterations: float = 5, *, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return the vectors r in R^m and c in R^n with SR-Sinkhorn(G) = diag(r) G diag(c), for G in R^{m x n}.

    State kept: none. Temporary: one float32 matrix of G's size. A zero row or column gets 0; a gradient that is not
    finite gives NaN in r or c.

    Args:
        grad: (..., m, n) gradient in any floating dtype, m = out_features.
        num_iterations: L, each one row and one column step. A half (5.5) adds a last row step.
        scratch: buffer of G's shape, float32 (float64 for a float64 gradient), that is overwritten.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.sinkhorn import sinkhorn_scalings
        >>> G = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> r, c = sinkhorn_scalings(G)
        >>> (r[:, None] * G * c).round(decimals=4)
        tensor([[1., 1.],
                [1., 1.]])

    References:
        https://huggingface.co/papers/2502.06742, Algorithm 3 (SR-Sinkhorn).
    """
    grad = grad.detach()
    m, n = grad.shape[-2:]
    squares = scratch
    if squares is None:
        squares = torch.empty_like(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    row_scale, row_sums = _squares_(grad, squares)
    transposed, column_sums = squares.mT, torch.ones_like(squares[..., 0, :])
    u, v = torch.ones_like(row_sums), column_sums
    # As tensors, since `n / tensor` would be two operations.
    rows, columns = (torch.tensor(float(size), dtype=torch.float32) for size in (m, n))
    for half_step in range(round(2 * num_iterations)):
        if half_step % 2 == 0:
            row_sums = (matvec(squares, v) if half_step else row_sums).clamp_min(smallest_sum(n))
            u = torch.div(columns, row_sums)
        else:
            column_sums = matvec(transposed, u).clamp_min(smallest_sum(m))
            v = torch.div(rows, column_sums)
    r = u.sqrt().masked_fill_(row_sums <= smallest_sum(n), 0).mul_(row_scale)
    c = v.sqrt().masked_fill_(column_sums <= smallest_sum(m), 0)
    r.masked_fill_(r == torch.inf, 0)  # a row of denormal numbers: its factor is beyond float32, so it counts as zero
    return r, c


# Elements of a block that is in float32 at once, as in `int8.update`.
_BLOCK = 1 << 22


def row_blocks(matrix: Tensor) -> list[slice]:
    """Return the blocks of rows in which a matrix is worked on: one, unless it is as large as an embedding.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.sinkhorn import row_blocks
        >>> row_blocks(torch.empty(4, 8)), len(row_blocks(torch.empty(32000, 1024, device="meta")))
        ([slice(0, 4, None)], 8)
    """
    rows = matrix.shape[0]
    if matrix.ndim != 2 or matrix.numel() < 4 * _BLOCK:
        return [slice(0, rows)]
    # A GPU is through with a smaller block before the host has sent the next one.
    block = _BLOCK if matrix.device.type in ("cpu", "meta") else 4 * _BLOCK
    at_once = max(1, block // matrix.shape[1])
    return [slice(first, min(first + at_once, rows)) for first in range(0, rows, at_once)]


def scalings_by_blocks(grad: Tensor, num_iterations: float, blocks: list[slice]) -> tuple[Tensor, Tensor]:
    r"""Return what `sinkhorn_scalings` does, up to the order of sums, with a float32 copy of one block at a time.

    Both half steps of an iteration take one pass over the gradient: the sums of the columns need u of the block alone.

    Args:
        grad: (m, n) gradient in any floating dtype.
        num_iterations: L, as for `sinkhorn_scalings`.
        blocks: from `row_blocks`.
    """
    grad = grad.detach()
    m, n = grad.shape
    dtype = torch.promote_types(grad.dtype, torch.float32)
    row_scale = power_of_two_inverse(torch.cat([grad[rows].abs().amax(-1) for rows in blocks]).to(dtype))
    v = column_sums = torch.ones(n, dtype=dtype, device=grad.device)
    u, row_sums = torch.ones_like(row_scale), torch.ones_like(row_scale)
    buffer = torch.empty(max(rows.stop - rows.start for rows in blocks), n, dtype=dtype, device=grad.device)
    half_steps = round(2 * num_iterations)
    for half_step in range(0, half_steps, 2):
        sums = torch.zeros_like(v)
        for rows in blocks:
            squares = buffer[: rows.stop - rows.start].copy_(grad[rows]).mul_(row_scale[rows].unsqueeze(-1)).square_()
            row_sums[rows] = matvec(squares, v)
            u[rows] = row_sums[rows].clamp_min(smallest_sum(n)).reciprocal_().mul_(n)
            sums += matvec(squares.mT, u[rows])
        if half_step + 1 < half_steps:
            column_sums = sums
            v = column_sums.clamp_min(smallest_sum(m)).reciprocal_().mul_(m)
    r = u.sqrt().masked_fill_(row_sums <= smallest_sum(n), 0)
    c = v.sqrt().masked_fill_(column_sums <= smallest_sum(m), 0)
    r.mul_(row_scale)
    return r.masked_fill_(r == torch.inf, 0), c


def sr_sinkhorn(grad: Tensor, num_iterations: float = 5, *, dtype: torch.dtype | None = None) -> Tensor:
    r"""Alternate row and column l2 normalisation L times: the SinkGD update, G in R^{m x n}.

    The fixed point has all row norms sqrt(n), all column norms sqrt(m) and entry RMS 1; the last step is the columns'.
    State kept: none.

    Args:
        grad: (..., m, n) gradient, m = out_features.
        num_iterations: L (paper: 5).
        dtype: dtype of the result; default that of `grad`.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.sinkhorn import sr_sinkhorn
        >>> sr_sinkhorn(torch.tensor([[1.0, 2.0], [3.0, -6.0]])).round(decimals=4)
        tensor([[ 1.,  1.],
                [ 1., -1.]])

    References:
        https://huggingface.co/papers/2502.06742, Algorithm 3 (SR-Sinkhorn).
    """
    scratch = torch.empty_like(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    row, column = sinkhorn_scalings(grad, num_iterations, scratch=scratch)
    scale_rows_(grad.detach(), row, scratch).mul_(column.unsqueeze(-2))
    return scratch.to(dtype or grad.dtype)


def scaled(grad: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return diag(r) G diag(c) in the dtype of r, for (..., m, n), (..., m) and (..., n)."""
    return scale_rows_(grad, row, torch.empty_like(grad, dtype=row.dtype)).mul_(column.unsqueeze(-2))


def scale_rows_(grad: Tensor, row: Tensor, out: Tensor) -> Tensor:
    """Write diag(r) G into a buffer of at least float32: of order one whatever the scale of G, unlike G diag(c)."""
    if grad.dtype == out.dtype:
        return torch.mul(grad, row.unsqueeze(-1), out=out)
    return out.copy_(grad).mul_(row.unsqueeze(-1))  # a product of mixed dtypes is three times slower on CPU

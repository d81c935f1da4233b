r"""The size of an update: entries of root mean square 1, as the norms leave it, or an operator norm.

A white matrix X in R^{m x n}, whose singular values are all equal, has the operator norm sqrt(max(m, n)) where the
root mean square of its entries is 1. No other matrix of that root mean square has a smaller one: gradients of language
models have 5 to 18 times as much after `row_l2` or SR-Sinkhorn. With `operator` an update is made smaller until its
operator norm is that of a white one, so that one learning rate means one thing for white and other updates.

The norm is estimated from below: eight fixed vectors V go through one power iteration W = X^T X V, and the estimate is
the largest ||X w|| / ||w||. Eight starts are closer than a second iteration of one start, and miss a direction that a
single one is nearly orthogonal to: 0.73 to 1.0 of the norm on gradients of SmolLM2-135M, 0.95 in the middle. An
estimate that is too small cannot make an update larger than its entries say, since no factor is above 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .sinkhorn import scaled


UPDATE_SCALES = ("rms", "operator")
"""What the size of an update is measured by; the first is the default."""
# The vectors are i^3 a_j mod p with a_j = (40503 j + 12345)^2: exact on every device, and as far from each other as
# random ones, which multiples of one number are not.
_VECTORS, _PRIME, _FACTOR, _SHIFT = 8, 65521, 40503, 12345


def start_vectors(sizes: tuple[int, int], like: Tensor) -> Tensor:
    """Return V^T in R^{8 x n} for matrices in R^{m x n}: the same numbers in every process, of a size 1 / (m n).

    As rows, since products with eight columns are 4 to 50 times as slow on CPU. Of that size, X^T X V and its squares
    are far from the end of float32, whatever the singular values of X.

    Args:
        sizes: m and n.
        like: for the dtype, in at least float32, and the device.
    """
    m, n = sizes
    numbers = torch.arange(1, n + 1, device=like.device)
    multipliers = (torch.arange(_VECTORS, device=like.device) * _FACTOR + _SHIFT) ** 2 % _PRIME
    hashed = numbers * numbers % _PRIME * numbers % _PRIME * multipliers[:, None] % _PRIME
    vectors = hashed.to(torch.promote_types(like.dtype, torch.float32)) / _PRIME - 0.5
    vectors[0] = 1  # the mean is what gradients have most in common
    return vectors / (m * n)


def operator_factor(image_squares: Tensor, squares: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Return the factor that gives matrices the operator norm of a white one, at most 1.

    Args:
        image_squares: (..., 8) squared norms of X w.
        squares: (..., 8) squared norms of w.
        sizes: m and n.

    Returns:
        (...) factors: 1 for a zero matrix, NaN for one that is not finite.
    """
    ratios = image_squares / squares.masked_fill(squares == 0, 1)
    return (math.sqrt(max(sizes)) / ratios.amax(-1).sqrt()).clamp_max(1)


def scale_to_operator(x: Tensor) -> Tensor:
    """Return matrices whose entries have root mean square 1 (or less) with at most the operator norm of white ones.

    Args:
        x: (..., m, n) in at least float32.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.scale import scale_to_operator
        >>> torch.ones(2, 8).norm(), scale_to_operator(torch.ones(2, 8)).norm()  # of rank 1: the operator norm too
        (tensor(4.), tensor(2.8284))
    """
    return x * _factor(x)[..., None, None]


def factor_of_scaled(grad: Tensor, row: Tensor, column: Tensor, blocks: Sequence[slice]) -> Tensor:
    """Return the factor of `operator_factor` for diag(row) G diag(column), with a copy of one block at a time.

    Args:
        grad: (m, n), or (..., m, n) as one block.
        row: (..., m) in at least float32.
        column: (..., n).
        blocks: of rows, from `row_blocks`.
    """
    sizes = (grad.shape[-2], grad.shape[-1])
    vectors = start_vectors(sizes, row)
    if len(blocks) == 1:
        return _factor(scaled(grad, row, column))
    w, images = torch.zeros_like(vectors), vectors.new_zeros(_VECTORS)
    for rows in blocks:
        x = scaled(grad[rows], row[rows], column)
        w += vectors @ x.mT @ x
    for rows in blocks:
        images += (w @ scaled(grad[rows], row[rows], column).mT).square().sum(-1)
    return operator_factor(images, w.square().sum(-1), sizes)


def _factor(x: Tensor) -> Tensor:
    sizes = (x.shape[-2], x.shape[-1])
    w = start_vectors(sizes, x) @ x.mT @ x
    return operator_factor((w @ x.mT).square().sum(-1), w.square().sum(-1), sizes)

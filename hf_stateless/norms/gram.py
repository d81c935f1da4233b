"""What the whitenings share: the matrix with its shorter side first, and symmetric products of half the work."""

from __future__ import annotations

import torch
from torch import Tensor


# Devices that sum in float64; elsewhere gradients of a norm below 1e-19 count as zero.
_WITH_FLOAT64 = ("cpu", "cuda", "meta")
_LARGEST_FACTOR = 2.0**126
# Rows of a symmetric product that are computed at once: of its upper triangle only what lies in these blocks.
_STRIP = 128


def check_dtype(name: str | None, whitening: str, valid: tuple[str, ...]) -> None:
    """Refuse what a whitening does not compute its products in.

    Raises:
        ValueError: with what it does.
    """
    if name is not None and name not in valid:
        raise ValueError(f"{whitening} takes no ns_dtype={name}. Valid: {', '.join(valid)}.")


def wide_unit(grad: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, bool]:
    """Return the matrix with m <= n over its Frobenius norm, and whether it was transposed.

    Args:
        grad: (..., m, n).
        dtype: of the result; that of the gradient, at least float32, where it is None.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.gram import wide_unit
        >>> wide_unit(torch.tensor([[3.0], [4.0]]))
        (tensor([[0.6000, 0.8000]]), True)
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    x = grad.detach().to(wide)
    # Sums in float64: one over a whole matrix in float32 is off by 3e-5, which the iterations amplify, and squares of
    # 1e-30 would vanish in it.
    sums = torch.float64 if x.device.type in _WITH_FLOAT64 else wide
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=sums)
    factor = torch.where(norm == 0, 1, 1 / norm).clamp_max(_LARGEST_FACTOR).to(wide)
    unit = torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype or wide))
    tall = unit.shape[-2] > unit.shape[-1]
    return (unit.mT if tall else unit), tall


def restore(x: Tensor, tall: bool) -> Tensor:
    """Undo the transposition of `wide_unit`."""
    return x.mT if tall else x


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """Return A B^T for matrices (..., m, n) where it is known to be symmetric, as X X^T and powers of it are.

    On a CPU the blocks below the diagonal are computed and mirrored, little more than half of the products. Elsewhere
    small products cost as much as what they save, up to sizes that nobody has measured here.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.gram import symmetric_product
        >>> X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> symmetric_product(X, X)
        tensor([[ 5., 11.],
                [11., 25.]])
    """
    if a.device.type != "cpu":
        return a @ b.mT
    product = _lower(a, b)
    for top in range(_STRIP, a.shape[-2], _STRIP):
        rows = slice(top, top + _STRIP)
        product[..., :top, rows] = product[..., rows, :top].mT
    return product


def quadratic(gram: Tensor, b: float, c: float) -> Tensor:
    """Return b A + c A^2 for symmetric matrices A, a batch of them but on a CPU.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.gram import quadratic
        >>> quadratic(torch.diag(torch.tensor([2.0, 3.0])), 1.0, 10.0)
        tensor([[42.,  0.],
                [ 0., 93.]])
    """
    if gram.device.type == "cpu":
        return symmetric_product(gram, gram).mul_(c).add_(gram, alpha=b)
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)


def _lower(a: Tensor, b: Tensor) -> Tensor:
    """Return A B^T with zeros above the diagonal, but for what lies in the strips."""
    product = a.new_zeros(*a.shape[:-1], a.shape[-2])
    for top in range(0, a.shape[-2], _STRIP):
        end = top + _STRIP
        product[..., top:end, :end] = a[..., top:end, :] @ b[..., :end, :].mT
    return product


def decompose_gram(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which matrices are finite, and the eigenvalues (at least 0) and eigenvectors of X X^T of these.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.gram import decompose_gram
        >>> decompose_gram(torch.diag(torch.tensor([2.0, 3.0])))[1]
        tensor([4., 9.])
    """
    gram = _lower(x, x)  # which is all that eigh reads
    # LAPACK refuses NaN for the whole batch: decompose 0 there and give NaN back for that matrix alone.
    finite = gram.isfinite().all(dim=-1).all(dim=-1)[..., None, None]
    eigenvalues, vectors = torch.linalg.eigh(gram.masked_fill_(~finite, 0))
    return finite, eigenvalues.clamp_min(0), vectors

"""What the whitenings share: the matrix with its shorter side first, and symmetric products of half the work."""

from __future__ import annotations

import torch
from torch import Tensor


# Rows of a symmetric product that are computed at once: of its upper triangle only what lies in these blocks.
_STRIP = 128


def check_dtype(name: str | None, whitening: str, valid: tuple[str, ...]) -> None:
    """Refuse what a whitening does not compute its products in.

    Raises:
        ValueError: with what it does.
    """
    if name is not None and name not in valid:
        raise ValueError(f"{whitening} takes no ns_dtype={name}. Valid: {', '.join(valid)}.")


def wide_unit(grad: Tensor) -> tuple[Tensor, bool]:
    """Return the matrix with m <= n in at least float32, over its Frobenius norm, and whether it was transposed.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.gram import wide_unit
        >>> wide_unit(torch.tensor([[3.0], [4.0]]))
        (tensor([[0.6000, 0.8000]]), True)
    """
    x = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
    # The norm of the row norms: one sum over a whole matrix in float32 is off by 3e-5, which the iterations amplify.
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1, keepdim=True), dim=-2, keepdim=True)
    unit = x / torch.where(norm == 0, 1, norm)
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

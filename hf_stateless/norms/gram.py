"""What the whitenings share: the matrix with its shorter side first, and symmetric products of half the work."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .parts import as_batch, parts_in_cache


# Devices that sum in float64; elsewhere gradients of a norm below 1e-19 count as zero.
_WITH_FLOAT64 = ("cpu", "cuda", "meta")
_LARGEST_FACTOR = 2.0**126
# Rows of a symmetric product that are computed at once: of its upper triangle only what lies in these blocks.
_STRIP = 128
# Rows up to which one product takes less time than its blocks (measured with one thread and with two).
_WHOLE_UP_TO = 256


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
    tall = grad.shape[-2] > grad.shape[-1]
    x = grad.detach().to(wide)
    norm = _norm(x)
    factor = torch.where(norm == 0, 1, 1 / norm).clamp_max(_LARGEST_FACTOR).to(wide)
    if x.device.type != "cpu":
        unit = torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype or wide))
        return restore(unit, tall), tall
    unit = torch.empty(x.shape, dtype=dtype or wide)
    units, flat, factors = as_batch(unit), as_batch(x), as_batch(factor)
    for matrices, rows in parts_in_cache(flat):  # or in bfloat16 there would be a copy of the whole in between
        units[matrices, rows] = flat[matrices, rows] * factors[matrices]
    return in_order(restore(unit, tall)), tall


def _norm(x: Tensor) -> Tensor:
    """Return the Frobenius norms (..., 1, 1) of matrices."""
    # Sums in float64: one over a whole matrix in float32 is off by 3e-5, which the iterations amplify, and squares of
    # 1e-30 would vanish in it.
    sums = torch.float64 if x.device.type in _WITH_FLOAT64 else x.dtype
    if x.device.type == "cpu":  # in parts, or there would be a copy of the whole in float64
        of_rows, flat = torch.empty(*x.shape[:-1], 1, dtype=sums), as_batch(x)
        norms = as_batch(of_rows)
        for part in parts_in_cache(flat):
            norms[part] = torch.linalg.vector_norm(flat[part], dim=-1, keepdim=True, dtype=sums)
        x = of_rows
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=sums)
    return norm


def restore(x: Tensor, tall: bool) -> Tensor:
    """Undo the transposition of `wide_unit`."""
    return x.mT if tall else x


def in_order(x: Tensor) -> Tensor:
    """Return a matrix in the order of memory on a CPU, where whatever follows is faster with it."""
    return x.contiguous() if x.device.type == "cpu" else x


def symmetric_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return A B^T for matrices (..., m, n) where it is known to be symmetric, as X X^T and powers of it are.

    On a CPU the blocks below the diagonal are computed and mirrored, little more than half of the products, unless
    products are so fast that to copy costs more: small ones, and those in bfloat16 with AMX. Elsewhere small products
    cost as much as what they save, up to sizes that nobody has measured here.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.gram import symmetric_product
        >>> X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> symmetric_product(X, X)
        tensor([[ 5., 11.],
                [11., 25.]])
    """
    if not _pays_in_blocks(a):
        return a @ b.mT if out is None else (torch.mm if a.ndim == 2 else torch.bmm)(a, b.mT, out=out)
    product = _lower(a, b, out)
    for top in range(_STRIP, a.shape[-2], _STRIP):
        rows = slice(top, top + _STRIP)
        product[..., :top, rows] = product[..., rows, :top].mT
    return product


def quadratic(gram: Tensor, b: float, c: float, out: Tensor | None = None) -> Tensor:
    """Return b A + c A^2 for a symmetric matrix A or a batch of them.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.gram import quadratic
        >>> quadratic(torch.diag(torch.tensor([2.0, 3.0])), 1.0, 10.0)
        tensor([[42.,  0.],
                [ 0., 93.]])
    """
    if _pays_in_blocks(gram):
        return symmetric_product(gram, gram, out).mul_(c).add_(gram, alpha=b)
    return add_product(gram, gram, gram, b, c, out)


def add_product(x: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Return beta X + alpha A B for matrices or batches of them.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.gram import add_product
        >>> add_product(torch.ones(2, 2), torch.eye(2), torch.ones(2, 2), beta=2.0)
        tensor([[3., 3.],
                [3., 3.]])
    """
    return (torch.addmm if x.ndim == 2 else torch.baddbmm)(x, a, b, beta=beta, alpha=alpha, out=out)


def _pays_in_blocks(a: Tensor) -> bool:
    fast = a.dtype == torch.bfloat16 and cpu_has("amx_bf16")
    return a.device.type == "cpu" and a.shape[-2] > _WHOLE_UP_TO and not fast


@functools.cache
def cpu_has(*instructions: str) -> bool:
    """Tell whether this CPU has one of some instructions, by torch's names for them.

    Example:
        >>> from hf_stateless.norms.gram import cpu_has
        >>> cpu_has("an instruction of no CPU")
        False
    """
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return any(capabilities.get(name) for name in instructions)


def _lower(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return A B^T with zeros above the diagonal, but for what lies in the strips."""
    product = a.new_zeros(*a.shape[:-1], a.shape[-2]) if out is None else out.zero_()
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

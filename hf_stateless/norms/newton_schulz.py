"""The polynomial of the SWAN paper: coupled Newton-Schulz, by products or on eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import check_dtype, decompose_gram, restore, wide_unit
from .parts import as_batch


NEWTON_SCHULZ_DTYPES = ("float32", "float16")
"""What the products may be computed in; the first is the default. bfloat16 is too coarse: a cosine of 0.7 to 0.9."""
# Newton-Schulz applies Z to X and forms a new Gram matrix after at most this many steps: rounded to float32, X X^T has
# lost singular values below 3e-4 of the largest, which all ten steps would amplify into an error of up to 5 %.
_STAGE = 5
# The same in float16, which rounds 8000 times as coarsely; before that two steps are done in float32, since what is
# lost in rounding the gradient itself would be amplified by all ten.
_HALF_STAGE = 4
_STEPS_BEFORE_HALF = 2
# On CPUs an eigendecomposition in float64 is cheaper than products in float32 from this many rows on.
_EIGENVALUES_FROM = 256
# Above this amplification of vanishing singular values Z is not rounded to float32; that of the default is 6340.
_AMPLIFIED_IN_FLOAT32 = 1e4


def newton_schulz(grad: Tensor, *, ns_steps: int = 10, ns_beta: float = 0.8, ns_dtype: str | None = None) -> Tensor:
    r"""SWAN's GradWhitening: (G G^T)^{-1/2} G by the coupled Newton-Schulz iteration with step size beta.

    With X = G / ||G||_F in R^{m x n}, m <= n (the transpose is taken otherwise), Y_0 = X X^T and Z_0 = I:
    Y <- beta Y (3I - Z Y), Z <- beta (3I - Z Y) Z, and the result is Z_k X. It is a polynomial of X that takes each
    singular value s to s z_k(s^2). For beta = 0.8 there is no stable fixed point: singular values end in [0.56, 1.60].

    On CPUs, from 256 rows and 6 steps on, z_k is evaluated on the eigenvalues of X X^T in float64, which is cheaper
    than products and exact. Elsewhere only products are used: Y and Z commute, so T = Z Y <- beta^2 T (3I - T)^2 is
    iterated, two steps at a time, and X multiplied by Z every two (n < 1.5 m) or five steps.
    State kept: none. Temporaries: copies of G, and five m x m matrices, or on CPUs the space of eight in float32.

    Args:
        grad: (..., m, n) gradient.
        ns_steps: number k of iterations (paper: 10).
        ns_beta: step size beta (paper: 0.8; 0.5 is the convergent textbook iteration).
        ns_dtype: `float32` (None), or `float16` for products in float16 from the third step on, with sizes padded to
            multiples of 8: for GPUs, where it has a cosine of at least 0.999 to float32 on the gradients of language
            models.

    Raises:
        ValueError: another `ns_dtype`.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.whitening import newton_schulz
        >>> newton_schulz(torch.diag(torch.tensor([4.0, 1.0])), ns_steps=20, ns_beta=0.5).round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]])

    References:
        SWAN, https://huggingface.co/papers/2412.13148, Algorithm 2 (GradWhitening).
    """
    check_dtype(ns_dtype, "newton_schulz", NEWTON_SCHULZ_DTYPES)
    x, tall = wide_unit(grad)
    if ns_dtype == "float16":
        white = _by_products_in_half(x, ns_steps, ns_beta)
    elif x.device.type == "cpu" and ns_steps > _STAGE and x.shape[-2] >= _EIGENVALUES_FROM:
        white = _by_eigenvalues(x, ns_steps, ns_beta)
    else:
        white = _by_products(x, ns_steps, ns_beta, _STAGE)
    return restore(white, tall)


def _by_eigenvalues(x: Tensor, steps: int, beta: float) -> Tensor:
    """Return Z X with Z = V z(Lambda) V^T from X X^T = V Lambda V^T."""
    finite, t, vectors = decompose_gram(x.double())
    z = torch.ones_like(t)
    for _ in range(steps):
        s = 3 - t
        t, z = beta**2 * t * s.square(), beta * s * z
    factor = (vectors * z.unsqueeze(-2)) @ vectors.mT  # V rounded to float32 would not be orthogonal enough
    # Rounding Z to float32 leaves errors of 6e-8 of its largest value in directions that X has not.
    exact = (3 * beta) ** steps <= _AMPLIFIED_IN_FLOAT32
    white = factor.to(x.dtype) @ x if exact else (factor @ x.double()).to(x.dtype)
    return torch.where(finite, white, torch.nan)


def _by_products(x: Tensor, steps: int, beta: float, longest: int) -> Tensor:
    """Iterate by matrix products alone, in the dtype of X, with a new Gram matrix after at most `longest` steps."""
    # A stage costs two products with X, and all but its first two steps two and a half Gram-sized ones more.
    length = 2 if x.shape[-1] < 1.5 * x.shape[-2] else longest
    y = as_batch(x)
    for start in range(0, steps, length):
        y = _stage(y, min(length, steps - start), beta)
    return y.reshape(x.shape)


def _stage(x: Tensor, steps: int, beta: float) -> Tensor:
    """Return Z X after some steps from T = X X^T, for a batch (b, m, n)."""
    t, z = x @ x.mT, None
    for left in range(steps, 0, -2):
        factor = _two_steps(t, beta) if left > 1 else _add_identity(-beta * t, 3 * beta)
        z = factor if z is None else factor @ z
        if left > 2:
            t = factor @ t @ factor
    return x if z is None else z @ x


def _two_steps(t: Tensor, beta: float) -> Tensor:
    """Return beta^2 (3I - T_1)(3I - T), the factor of two steps on Z, by two products instead of three."""
    u = torch.baddbmm(t, t, t, beta=3, alpha=-1)  # T (3I - T)
    s = _add_identity(-3 * t, 9)
    return s.baddbmm_(s - u, u, beta=beta**2, alpha=-(beta**4))


def _add_identity(t: Tensor, scale: float) -> Tensor:
    t.diagonal(dim1=-2, dim2=-1).add_(scale)
    return t


def _by_products_in_half(x: Tensor, steps: int, beta: float) -> Tensor:
    """Iterate in float16 after the first steps; zero rows and columns make the sizes multiples of 8."""
    m, n = x.shape[-2:]
    y = _by_products(x, min(_STEPS_BEFORE_HALF, steps), beta, _STAGE)
    y = torch.nn.functional.pad(y.half(), (0, -n % 8, 0, -m % 8))
    y = _by_products(y, max(steps - _STEPS_BEFORE_HALF, 0), beta, _HALF_STAGE)
    return y[..., :m, :n].to(x.dtype)

"""Ways to compute the spectral norm projection: matrices whose singular values are moved towards one.

All functions map (..., m, n) to (..., m, n) in the input's floating dtype (half inputs are computed and returned in
float32), keep nothing, and do not rescale their output: `norms.spectral` does that. They work on the Gram matrix of
the smaller side, so a batch of equal shapes is one batch of matmuls.

These are *different* maps, not faster versions of one: on real gradients the result is set by how much an iteration
amplifies small singular values (see the table in norms/README.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


# Minimax-optimal odd polynomials p(s) = a s + b s^3 + c s^5 for singular values in [1e-3, 1], from the table of
# https://huggingface.co/papers/2505.16932 (Algorithm 1); the last row is the fixed point and may be repeated.
_POLAR_EXPRESS_COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
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
# Rows of a Gram matrix that are computed at once: of its upper triangle only what lies in these blocks.
_STRIP = 128
# Keeps rounding errors from pushing a singular value above the interval each polynomial was made for.
_POLAR_EXPRESS_SAFETY = 1.01


def _wide_unit(grad: Tensor) -> tuple[Tensor, bool]:
    """Return the matrix with m <= n in at least float32, over its Frobenius norm, and whether it was transposed."""
    x = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    # The norm of the row norms: one sum over a whole matrix in float32 is off by 3e-5, which the iterations amplify.
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1, keepdim=True), dim=-2, keepdim=True)
    return x / torch.where(norm == 0, 1, norm), tall


def _restore(x: Tensor, tall: bool) -> Tensor:
    return x.mT if tall else x


def newton_schulz(grad: Tensor, *, ns_steps: int = 10, ns_beta: float = 0.8, ns_dtype: str = "float32") -> Tensor:
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
        ns_dtype: `float32`, or `float16` for products in float16 from the third step on, with sizes padded to
            multiples of 8: for GPUs, where it has a cosine of at least 0.999 to float32 on the gradients of language
            models. bfloat16 is too coarse (cosine 0.7 to 0.9).

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
    if ns_dtype not in NS_DTYPES:
        raise ValueError(f"Unknown ns_dtype {ns_dtype!r}. Valid: {', '.join(NS_DTYPES)}.")
    x, tall = _wide_unit(grad)
    if ns_dtype == "float16":
        white = _by_products_in_half(x, ns_steps, ns_beta)
    elif x.device.type == "cpu" and ns_steps > _STAGE and x.shape[-2] >= _EIGENVALUES_FROM:
        white = _by_eigenvalues(x, ns_steps, ns_beta)
    else:
        white = _by_products(x, ns_steps, ns_beta, _STAGE)
    return _restore(white, tall)


def _by_eigenvalues(x: Tensor, steps: int, beta: float) -> Tensor:
    """Return Z X with Z = V z(Lambda) V^T from X X^T = V Lambda V^T."""
    finite, t, vectors = _decompose_gram(x.double())
    z = torch.ones_like(t)
    for _ in range(steps):
        s = 3 - t
        t, z = beta**2 * t * s.square(), beta * s * z
    factor = (vectors * z.unsqueeze(-2)) @ vectors.mT  # V rounded to float32 would not be orthogonal enough
    # Rounding Z to float32 leaves errors of 6e-8 of its largest value in directions that X has not.
    exact = (3 * beta) ** steps <= _AMPLIFIED_IN_FLOAT32
    white = factor.to(x.dtype) @ x if exact else (factor @ x.double()).to(x.dtype)
    return torch.where(finite, white, torch.nan)


def _decompose_gram(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which matrices are finite, and the eigenvalues (at least 0) and eigenvectors of X X^T of these."""
    gram = x.new_zeros(*x.shape[:-1], x.shape[-2])
    for top in range(0, x.shape[-2], _STRIP):  # the lower triangle, which is all that eigh reads
        end = top + _STRIP
        gram[..., top:end, :end] = x[..., top:end, :] @ x[..., :end, :].mT
    # LAPACK refuses NaN for the whole batch: decompose 0 there and give NaN back for that matrix alone.
    finite = gram.isfinite().all(dim=-1).all(dim=-1)[..., None, None]
    eigenvalues, vectors = torch.linalg.eigh(gram.masked_fill_(~finite, 0))
    return finite, eigenvalues.clamp_min(0), vectors


def _by_products(x: Tensor, steps: int, beta: float, longest: int) -> Tensor:
    """Iterate by matrix products alone, in the dtype of X, with a new Gram matrix after at most `longest` steps."""
    # A stage costs two products with X, and all but its first two steps two and a half Gram-sized ones more.
    length = 2 if x.shape[-1] < 1.5 * x.shape[-2] else longest
    y = x.reshape(-1, *x.shape[-2:])
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


def nsds(grad: Tensor, *, ns_steps: int = 2, ns_beta: float = 0.4) -> Tensor:
    r"""Newton-Schulz with diagonal substitution: only the Gram matrix and the last product are matmuls.

    With D(.) the diagonal part: Y <- beta Y D(3 - diag(Z) diag(Y)), Z <- beta (3I - D(Z) Y) D(Z), result Z_k X for
    X = G / ||G||_F in R^{m x n}, m <= n. Under this scaling it stays close to G itself (cosine 0.996 on synthetic
    gradients): an experimental variant, not a cheap replacement of `newton_schulz`. State kept: none.

    Args:
        grad: (..., m, n) gradient.
        ns_steps: number of iterations.
        ns_beta: step size beta.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.whitening import nsds
        >>> nsds(torch.diag(torch.tensor([4.0, 3.0])), ns_steps=10).round(decimals=2)
        tensor([[0.7100, 0.0000],
                [0.0000, 0.7100]])

    References:
        SWAN, https://huggingface.co/papers/2412.13148, the NSDS variant.
    """
    x, tall = _wide_unit(grad)
    y = x @ x.mT
    z = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device).expand_as(y)
    identity3 = 3 * z
    for _ in range(ns_steps):
        dy, dz = y.diagonal(dim1=-2, dim2=-1), z.diagonal(dim1=-2, dim2=-1)
        y, z = (
            ns_beta * y * (3 - dz * dy).unsqueeze(-2),
            ns_beta * (identity3 - dz.unsqueeze(-1) * y) * dz.unsqueeze(-2),
        )
    return _restore(z @ x, tall)


def eigh(grad: Tensor) -> Tensor:
    r"""The polar factor U V^T of G = U S V^T by an eigendecomposition in float64, null directions left out.

    For G in R^{m x n}, m <= n: (G G^T)^{-1/2} G, where singular values below max(m, n) * eps * s_max (eps of the
    input's dtype) count as zero. A centred square matrix is always singular, so without this cut rounding noise would
    be blown up to full size. The reference form, and on CPUs the cheapest exact one; slow on GPUs. State kept: none.

    Args:
        grad: (..., m, n) gradient.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.whitening import eigh
        >>> eigh(torch.diag(torch.tensor([4.0, -1.0])))
        tensor([[ 1.,  0.],
                [ 0., -1.]])

    References:
        SWAN, https://huggingface.co/papers/2412.13148, Equation of GradWhitening in closed form.
    """
    x, tall = _wide_unit(grad)
    wide = x.double()
    finite, eigenvalues, vectors = _decompose_gram(wide)
    singular = eigenvalues.sqrt()
    floor = max(x.shape[-2:]) * torch.finfo(x.dtype).eps * singular[..., -1:]
    inverse = torch.where(singular > floor, 1 / singular, 0)
    polar = (vectors * inverse.unsqueeze(-2)) @ (vectors.mT @ wide)
    return _restore(torch.where(finite, polar, torch.nan).to(x.dtype), tall)


def polar_express(grad: Tensor, *, ns_steps: int = 5) -> Tensor:
    r"""The polar factor by Polar Express: minimax quintics X <- a X + b (X X^T) X + c (X X^T)^2 X.

    G in R^{m x n}, m <= n, starts as X = G / (1.01 ||G||_F). It amplifies small singular values about 990 times in
    five steps where SWAN's polynomial reaches 6340, so it is another optimizer: cosine 0.83 to 0.87 to `newton_schulz`
    on real gradients. State kept: none.

    Args:
        grad: (..., m, n) gradient.
        ns_steps: number of quintic steps; after eight the last one is repeated.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.whitening import polar_express
        >>> polar_express(torch.diag(torch.tensor([4.0, 1.0])), ns_steps=8).round(decimals=2)
        tensor([[1., 0.],
                [0., 1.]])

    References:
        Polar Express, https://huggingface.co/papers/2505.16932, Algorithm 1.
    """
    x, tall = _wide_unit(grad)
    x = x / _POLAR_EXPRESS_SAFETY
    last = len(_POLAR_EXPRESS_COEFFICIENTS) - 1
    for step in range(ns_steps):
        a, b, c = _POLAR_EXPRESS_COEFFICIENTS[min(step, last)]
        if step < last:
            a, b, c = a / _POLAR_EXPRESS_SAFETY, b / _POLAR_EXPRESS_SAFETY**3, c / _POLAR_EXPRESS_SAFETY**5
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return _restore(x, tall)


NS_DTYPES = ("float32", "float16")
"""What `newton_schulz` computes its products in; the first is the default."""
WHITENINGS: dict[str, Callable[..., Tensor]] = {
    "newton_schulz": newton_schulz,
    "nsds": nsds,
    "eigh": eigh,
    "polar_express": polar_express,
}

# What each whitening takes, with the default it has on its own: the single source for option validation.
WHITENING_DEFAULTS: dict[str, dict[str, Any]] = {
    "newton_schulz": {"ns_steps": 10, "ns_beta": 0.8, "ns_dtype": "float32"},
    "nsds": {"ns_steps": 2, "ns_beta": 0.4},
    "eigh": {},
    "polar_express": {"ns_steps": 5},
}

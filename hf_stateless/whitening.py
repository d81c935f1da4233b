"""Ways to compute the spectral norm projection: matrices whose singular values are moved towards one.

All functions map (..., m, n) to (..., m, n) in the input's floating dtype (half inputs are computed and returned in
float32), keep nothing, and do not rescale their output: `norms.spectral` does that. They work on the Gram matrix of
the smaller side, so a batch of equal shapes is one batch of matmuls.

These are *different* maps, not faster versions of one: on real gradients the result is set by how much an iteration
amplifies small singular values (see the table in the README).
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
# Newton-Schulz applies Z to X and forms a new Gram matrix after this many steps: rounded to float32, X X^T has lost
# singular values below 3e-4 of the largest, which all ten steps would amplify into an error of up to 5 %.
_RESTART = 5
# Keeps rounding errors from pushing a singular value above the interval each polynomial was made for.
_POLAR_EXPRESS_SAFETY = 1.01


def _wide_unit(grad: Tensor) -> tuple[Tensor, bool]:
    """Return the matrix with m <= n in at least float32, over its Frobenius norm, and whether it was transposed."""
    x = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x / torch.where(norm == 0, 1, norm), tall


def _restore(x: Tensor, tall: bool) -> Tensor:
    return x.mT if tall else x


def newton_schulz(grad: Tensor, *, ns_steps: int = 10, ns_beta: float = 0.8) -> Tensor:
    r"""SWAN's GradWhitening: (G G^T)^{-1/2} G by the coupled Newton-Schulz iteration with step size beta.

    With X = G / ||G||_F in R^{m x n}, m <= n (the transpose is taken otherwise), Y_0 = X X^T and Z_0 = I:
    Y <- beta Y (3I - Z Y), Z <- beta (3I - Z Y) Z, and the result is Z_k X. Y and Z are polynomials of the same
    symmetric matrix and commute, so the code iterates T = Z Y <- beta^2 T (3I - T)^2 and Z alone, which needs one
    product less in the first and two less in the last step. For beta = 0.8 there is no stable fixed point: singular
    values end in [0.56, 1.60]. State kept: none. Temporaries: four m x m matrices per matrix.

    Args:
        grad: (..., m, n) gradient.
        ns_steps: number k of iterations (paper: 10).
        ns_beta: step size beta (paper: 0.8; 0.5 is the convergent textbook iteration).

    Example:
        >>> import torch
        >>> from hf_stateless.whitening import newton_schulz
        >>> newton_schulz(torch.diag(torch.tensor([4.0, 1.0])), ns_steps=20, ns_beta=0.5).round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]])

    References:
        SWAN, https://huggingface.co/papers/2412.13148, Algorithm 2 (GradWhitening).
    """
    x, tall = _wide_unit(grad)
    identity3 = 3 * torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for start in range(0, ns_steps, _RESTART):
        t = x @ x.mT
        z = ns_beta * (identity3 - t)
        for _ in range(min(_RESTART, ns_steps - start) - 1):
            s = identity3 - t
            t = ns_beta**2 * (s @ t @ s)
            z = ns_beta * ((identity3 - t) @ z)
        x = z @ x
    return _restore(x, tall)


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
        >>> from hf_stateless.whitening import nsds
        >>> nsds(torch.eye(2)).shape
        torch.Size([2, 2])

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
        >>> from hf_stateless.whitening import eigh
        >>> eigh(torch.diag(torch.tensor([4.0, -1.0])))
        tensor([[ 1.,  0.],
                [ 0., -1.]])

    References:
        SWAN, https://huggingface.co/papers/2412.13148, Equation of GradWhitening in closed form.
    """
    x, tall = _wide_unit(grad)
    wide = x.double()
    gram = wide @ wide.mT
    # LAPACK refuses NaN for the whole batch: decompose the identity there and give NaN back for that matrix alone.
    finite = gram.isfinite().all(dim=-1).all(dim=-1)[..., None, None]
    gram = torch.where(finite, gram, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    eigenvalues, vectors = torch.linalg.eigh(gram)
    singular = eigenvalues.clamp_min(0).sqrt()
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
        >>> from hf_stateless.whitening import polar_express
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


WHITENINGS: dict[str, Callable[..., Tensor]] = {
    "newton_schulz": newton_schulz,
    "nsds": nsds,
    "eigh": eigh,
    "polar_express": polar_express,
}

# What each whitening takes, with the default it has on its own: the single source for option validation.
WHITENING_DEFAULTS: dict[str, dict[str, Any]] = {
    "newton_schulz": {"ns_steps": 10, "ns_beta": 0.8},
    "nsds": {"ns_steps": 2, "ns_beta": 0.4},
    "eigh": {},
    "polar_express": {"ns_steps": 5},
}

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

from .gram import decompose_gram, restore, wide_unit
from .newton_schulz import NEWTON_SCHULZ_DTYPES, newton_schulz
from .polar_express import POLAR_EXPRESS_DTYPES, polar_express


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
    x, tall = wide_unit(grad)
    y = x @ x.mT
    z = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device).expand_as(y)
    identity3 = 3 * z
    for _ in range(ns_steps):
        dy, dz = y.diagonal(dim1=-2, dim2=-1), z.diagonal(dim1=-2, dim2=-1)
        y, z = (
            ns_beta * y * (3 - dz * dy).unsqueeze(-2),
            ns_beta * (identity3 - dz.unsqueeze(-1) * y) * dz.unsqueeze(-2),
        )
    return restore(z @ x, tall)


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
    x, tall = wide_unit(grad)
    wide = x.double()
    finite, eigenvalues, vectors = decompose_gram(wide)
    singular = eigenvalues.sqrt()
    floor = max(x.shape[-2:]) * torch.finfo(x.dtype).eps * singular[..., -1:]
    inverse = torch.where(singular > floor, 1 / singular, 0)
    polar = (vectors * inverse.unsqueeze(-2)) @ (vectors.mT @ wide)
    return restore(torch.where(finite, polar, torch.nan).to(x.dtype), tall)


WHITENINGS: dict[str, Callable[..., Tensor]] = {
    "polar_express": polar_express,
    "newton_schulz": newton_schulz,
    "nsds": nsds,
    "eigh": eigh,
}
# What each whitening takes, with the default it has on its own: the single source for option validation.
WHITENING_DEFAULTS: dict[str, dict[str, Any]] = {
    "polar_express": {"ns_steps": 5, "ns_dtype": None},
    "newton_schulz": {"ns_steps": 10, "ns_beta": 0.8, "ns_dtype": None},
    "nsds": {"ns_steps": 2, "ns_beta": 0.4},
    "eigh": {},
}
NS_DTYPES: dict[str, tuple[str, ...]] = {
    "polar_express": POLAR_EXPRESS_DTYPES,
    "newton_schulz": NEWTON_SCHULZ_DTYPES,
}
"""What whitenings may compute their products in."""

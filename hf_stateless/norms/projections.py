r"""Norm projections: P_g(G) = argmax <G, Z> over g(Z) = 1, scaled so that the entries have root mean square 1.

Each maps (..., m, n) to the same shape and dtype, keeps no state, leaves its input alone, is invariant to positive
scaling and maps 0 to 0. Rows are output features (m = out_features), columns input features. Half inputs are computed
in float32. Every projection but `spectral`, which sums in float64, first divides by a power of two taken from the
largest entry, which is exact, so that squares neither underflow at |G| = 1e-30 nor overflow at 1e30. A non-finite
input gives a non-finite output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .whitening import WHITENINGS


ROWS, COLUMNS = frozenset({"rows"}), frozenset({"columns"})


def _unit_range(grad: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return a copy, scaled by powers of two so that the largest entry over `dim` lies in [0.5, 1)."""
    x = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
    largest = torch.maximum(x.amax(dim, keepdim=True), x.amin(dim, keepdim=True).neg_())
    return x * power_of_two_inverse(largest)


def power_of_two_inverse(largest: Tensor) -> Tensor:
    """Return 2^-e for largest = f 2^e with f in [0.5, 1): an exact divisor (1 where the entry is zero)."""
    exponent = torch.frexp(largest).exponent
    bound = 126 if largest.dtype == torch.float32 else 1022  # keeps the factor itself a normal number
    return torch.ldexp(torch.ones_like(largest), -exponent.clamp(-bound, bound))


def _scale_to_(x: Tensor, norm: Tensor, target: float) -> Tensor:
    """Multiply x by target / norm in place, with 0 where the norm is 0."""
    return x.mul_(torch.where(norm == 0, 0, target / norm))


def row_l2(grad: Tensor) -> Tensor:
    r"""Give every row the l2 norm sqrt(n): sqrt(n) Q(G)^{-1} G with Q = diag(row norms), G in R^{m x n}.

    State kept: none. A zero row stays zero.

    Args:
        grad: (..., m, n) gradient, m = out_features.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.projections import row_l2
        >>> row_l2(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.8485, 1.1314],
                [0.0000, 0.0000]])

    References:
        https://huggingface.co/papers/2502.06742, projection P_g1 of SR-Sinkhorn (Algorithm 3).
    """
    x = _unit_range(grad, (-1,))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return _scale_to_(x, norm, grad.shape[-1] ** 0.5).to(grad.dtype)


def col_l2(grad: Tensor) -> Tensor:
    r"""Give every column the l2 norm sqrt(m): sqrt(m) G R(G)^{-1} with R = diag(column norms), G in R^{m x n}.

    State kept: none. A zero column stays zero.

    Args:
        grad: (..., m, n) gradient, m = out_features.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.projections import col_l2
        >>> col_l2(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
        tensor([[0.8485, 0.0000],
                [1.1314, 0.0000]])

    References:
        https://huggingface.co/papers/2502.06742, projection P_g2 of SR-Sinkhorn (Algorithm 3).
    """
    return row_l2(grad.mT).mT


def row_standardize(grad: Tensor) -> Tensor:
    r"""SWAN's GradNorm: (G - mean) / std over the n input features of each row, std with 1/n, G in R^{m x n}.

    State kept: none. A constant row carries no signal and gives zero. With n = 1 there is nothing to centre and the
    row is normalised as by `row_l2`, since a one-column matrix would otherwise never be trained.

    Args:
        grad: (..., m, n) gradient, m = out_features.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.projections import row_standardize
        >>> row_standardize(torch.tensor([[1.0, 3.0], [5.0, 5.0]])).round()
        tensor([[-1.,  1.],
                [ 0.,  0.]])

    References:
        SWAN, https://huggingface.co/papers/2412.13148, Algorithm 3 (GradNorm).
    """
    n = grad.shape[-1]
    if n == 1:
        return row_l2(grad)
    x = _unit_range(grad, (-1,))
    # Centring leaves rounding noise of a few eps in a constant row: below that a row counts as constant.
    noise = 4 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    x.sub_(x.mean(-1, keepdim=True))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    _scale_to_(x, torch.where(norm <= noise, 0, norm), n**0.5)
    # Whitening amplifies what is left of the mean 6000 times; a second centring takes the rounding of the first out.
    return x.sub_(x.mean(-1, keepdim=True)).to(grad.dtype)


def spectral(
    grad: Tensor,
    *,
    whitening: str = "polar_express",
    ns_steps: int | None = None,
    ns_beta: float | None = None,
    ns_dtype: str | None = None,
) -> Tensor:
    r"""Move all singular values towards one another: (G G^T)^{-1/2} G, rescaled to entry RMS 1, G in R^{m x n}.

    Only `whitening="eigh"` is exact (and idempotent); `newton_schulz` is the polynomial of the SWAN paper.
    State kept: none.

    Args:
        grad: (..., m, n) gradient, m = out_features.
        whitening: one of `polar_express`, `newton_schulz`, `nsds`, `eigh`.
        ns_steps: iterations; the default is that of the whitening (5, 10, 2, not used).
        ns_beta: step size of `newton_schulz` (0.8) and `nsds` (0.4).
        ns_dtype: of the products, `float32`, `bfloat16` (`polar_express`) or `float16` (`newton_schulz`); the default
            is that of the whitening.

    Raises:
        ValueError: unknown `whitening`.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.projections import spectral
        >>> spectral(torch.diag(torch.tensor([3.0, 2.0])), whitening="eigh")
        tensor([[1.4142, 0.0000],
                [0.0000, 1.4142]])

    References:
        SWAN, https://huggingface.co/papers/2412.13148, Algorithm 2, and its norm rescaling in Algorithm 1.
    """
    if whitening not in WHITENINGS:
        raise ValueError(f"Unknown whitening {whitening!r}. Valid: {', '.join(WHITENINGS)}.")
    options = {"ns_steps": ns_steps, "ns_beta": ns_beta, "ns_dtype": ns_dtype}
    given = {key: value for key, value in options.items() if value is not None}
    white = WHITENINGS[whitening](grad, **given)
    return _frobenius_to_(white).to(grad.dtype)


def sign(grad: Tensor) -> Tensor:
    r"""Entrywise sign: the projection for the max norm (signSGD), G in R^{m x n}.

    State kept: none. Zero entries stay zero.

    Args:
        grad: (..., m, n) gradient.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.projections import sign
        >>> sign(torch.tensor([[0.5, -2.0, 0.0]]))
        tensor([[ 1., -1.,  0.]])

    References:
        https://huggingface.co/papers/1802.04434, Algorithm 1 (signSGD).
    """
    return torch.sign(grad) + (grad - grad)  # the difference is 0, or NaN where an entry is not finite


def frobenius(grad: Tensor) -> Tensor:
    r"""Scale the whole matrix to Frobenius norm sqrt(mn): normalised gradient descent, G in R^{m x n}.

    State kept: none.

    Args:
        grad: (..., m, n) gradient.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.projections import frobenius
        >>> frobenius(torch.tensor([[3.0, 4.0]]))
        tensor([[0.8485, 1.1314]])

    References:
        https://huggingface.co/papers/2502.06742, a single-norm instance of MultiNorm (Algorithm 1).
    """
    return _frobenius_to_(_unit_range(grad, (-2, -1))).to(grad.dtype)


def _frobenius_to_(x: Tensor) -> Tensor:
    """Scale matrices to entry RMS 1 in place, whose squares neither underflow nor overflow."""
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return _scale_to_(x, norm, (x.shape[-2] * x.shape[-1]) ** 0.5)


@dataclass(frozen=True)
class Norm:
    """A norm projection, and what a chain has to know of it.

    Example:
        >>> import torch
        >>> from hf_stateless import NORMS
        >>> NORMS["sign"](torch.tensor([[0.5, -2.0]])), sorted(NORMS["row_l2"].needs)
        (tensor([[ 1., -1.]]), ['rows'])
    """

    project: Callable[..., Tensor]
    """Takes G in R^{... x m x n} and returns P(G) with entry RMS 1."""
    needs: frozenset[str] = ROWS | COLUMNS
    """What must be whole where it is computed: on whole rows a rank can compute what needs `rows` alone."""
    options: tuple[str, ...] = ()
    """Keyword arguments of `project` that a chain has values for."""

    def __call__(self, grad: Tensor, **options: Any) -> Tensor:
        """Project a gradient."""
        return self.project(grad, **options)

    @property
    def whitens(self) -> bool:
        """Whether it makes singular values equal, which costs matrix products."""
        return "whitening" in self.options


NORMS: dict[str, Norm] = {
    "row_l2": Norm(row_l2, ROWS),
    "col_l2": Norm(col_l2, COLUMNS),
    "row_standardize": Norm(row_standardize, ROWS),
    "spectral": Norm(spectral, options=("whitening", "ns_steps", "ns_beta", "ns_dtype")),
    "sign": Norm(sign, frozenset()),
    "frobenius": Norm(frobenius),
}

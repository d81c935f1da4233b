"""Multi-normalization: the alternating scheme that asks for several norms at once."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .projections import COLUMNS, NORMS, ROWS
from .scale import UPDATE_SCALES, scale_to_operator
from .sinkhorn import sr_sinkhorn


@dataclass(frozen=True)
class Chain:
    """Norm projections that are applied in turn, `num_iterations` times, with the options of those that have some.

    Example:
        >>> from hf_stateless.norms.chain import Chain
        >>> Chain().is_sinkhorn, Chain(norms=("row_standardize", "spectral"), num_iterations=1).whitens
        (True, True)
    """

    norms: tuple[str, ...] = ("row_l2", "col_l2")
    num_iterations: float = 5
    whitening: str = "polar_express"
    ns_steps: int | None = None
    ns_beta: float | None = None
    ns_dtype: str | None = None
    scale: str = UPDATE_SCALES[0]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Chain:
        """Take the fields of a chain out of other options, such as those of a parameter group."""
        names = [name for name in _FIELDS if name in options]
        values = [tuple(options[name]) if name == "norms" else options[name] for name in names]
        return _made(tuple(names), tuple(values))

    def __post_init__(self) -> None:
        object.__setattr__(self, "norms", tuple(self.norms))

    @property
    def is_sinkhorn(self) -> bool:
        """Whether this is SR-Sinkhorn, which has a diagonal form: diag(r) G diag(c)."""
        return self.norms == ("row_l2", "col_l2")

    @property
    def needs(self) -> frozenset[str]:
        """What must be whole where it is computed: `rows`, `columns`, both or nothing."""
        whole = ROWS | COLUMNS if self.scale == "operator" else frozenset()
        return whole.union(*(NORMS[name].needs for name in self.norms))

    @property
    def whitens(self) -> bool:
        """Whether a norm of the chain is a whitening."""
        return any(NORMS[name].whitens for name in self.norms)

    def normalize(self, grad: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the normalised gradient, see `multi_normalize`.

        Args:
            grad: (..., m, n); not modified.
            dtype: of the result; at least float32 where it is None.
        """
        wide = torch.promote_types(grad.dtype, torch.float32)
        if self.is_sinkhorn:
            x = sr_sinkhorn(grad, self.num_iterations, dtype=wide if self.scale == "operator" else dtype or wide)
        else:
            # Bound to one name throughout, so that no step keeps the matrix before it alive.
            x, pairs = grad.detach().to(wide), self._pairs
            for _ in range(int(self.num_iterations)):
                x = sr_sinkhorn(x, pairs) if pairs else x
                for norm in (NORMS[name] for name in self.norms[2 * pairs :]):
                    x = norm(x, **{option: getattr(self, option) for option in norm.options})
        return (scale_to_operator(x) if self.scale == "operator" else x).to(dtype or wide)

    @property
    def _pairs(self) -> int:
        """Return how many iterations of SR-Sinkhorn begin the chain, written out: they take the diagonal form."""
        pairs = 0
        while self.norms[2 * pairs : 2 * pairs + 2] == ("row_l2", "col_l2"):
            pairs += 1
        return pairs


_FIELDS = tuple(field.name for field in fields(Chain))


@cache
def _made(names: tuple[str, ...], values: tuple[Any, ...]) -> Chain:
    """Make a chain once: a step asks for that of each matrix."""
    return Chain(**dict(zip(names, values, strict=True)))


def multi_normalize(
    grad: Tensor,
    norms: Sequence[str] = ("row_l2", "col_l2"),
    num_iterations: int = 5,
    *,
    whitening: str = "polar_express",
    ns_steps: int | None = None,
    ns_beta: float | None = None,
    ns_dtype: str | None = None,
    scale: str = UPDATE_SCALES[0],
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Project the gradient onto each norm of the chain in turn, `num_iterations` times (MultiNorm).

    X <- G; for l = 1..L: for each norm g of the chain: X <- P_g(X), with G in R^{m x n}, m = out_features, and every
    P_g scaled to entry RMS 1. The chain (row_l2, col_l2) is SR-Sinkhorn and takes its diagonal form.
    State kept: none.

    Args:
        grad: (..., m, n) gradient; leading dimensions are independent matrices. Not modified.
        norms: names from `hf_stateless.NORMS`, applied from left to right.
        num_iterations: L, how often the chain is run.
        whitening: how `spectral` is computed: `polar_express`, `newton_schulz`, `nsds` or `eigh`.
        ns_steps: iterations of the whitening; default is that of the whitening.
        ns_beta: step size of the whitening; default is that of the whitening.
        ns_dtype: of the products, `float32`, `bfloat16` (`polar_express`) or `float16` (`newton_schulz`); the default
            is that of the whitening.
        scale: `rms` leaves entries of root mean square 1; `operator` makes the result smaller until its largest
            singular value is about sqrt(max(m, n)), that of a matrix of equal singular values.
        dtype: dtype of the result; default that of `grad`. Half gradients are computed in float32 in any case.

    Returns:
        Tensor of the shape of `grad`; 0 for a zero gradient, non-finite for a non-finite one.

    Raises:
        ValueError: a gradient of fewer than two dimensions, an unknown norm or scale, or `num_iterations` below 1.

    Example:
        >>> import torch, hf_stateless
        >>> G = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> hf_stateless.multi_normalize(G, norms=("row_l2", "col_l2"), num_iterations=5).round(decimals=4)
        tensor([[1., 1.],
                [1., 1.]])

    References:
        https://huggingface.co/papers/2502.06742, Algorithm 1 (MultiNorm).
    """
    if grad.ndim < 2:
        raise ValueError(f"multi_normalize takes matrices (..., m, n), got shape {tuple(grad.shape)}.")
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}.")
    if scale not in UPDATE_SCALES:
        raise ValueError(f"Unknown scale {scale!r}. Valid: {', '.join(UPDATE_SCALES)}.")
    check_norms(norms)
    chain = Chain(tuple(norms), num_iterations, whitening, ns_steps, ns_beta, ns_dtype, scale)
    return chain.normalize(grad, dtype or grad.dtype)


def check_norms(norms: Sequence[str]) -> None:
    """Raise a ValueError that lists the valid names unless every entry of the chain is one."""
    unknown = [name for name in norms if name not in NORMS]
    if unknown or not norms or isinstance(norms, str):
        raise ValueError(f"Unknown norms {reprlib.repr(norms)}: expected a non-empty list of {', '.join(NORMS)}.")

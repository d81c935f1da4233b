"""Polar Express: quintic steps towards equal singular values, in bfloat16 where that is fast."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .gram import add_product, check_dtype, cpu_has, in_order, quadratic, restore, symmetric_product, wide_unit
from .parts import as_batch


POLAR_EXPRESS_DTYPES = ("float32", "bfloat16")
"""What the products may be computed in. Not float16: the entries of a large X X^T are too small for it."""
# Minimax-optimal odd polynomials p(s) = a s + b s^3 + c s^5 for singular values in [1e-3, 1], from the table of
# https://huggingface.co/papers/2505.16932 (Algorithm 1); the last row is the fixed point and may be repeated.
_COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Keeps rounding errors from pushing a singular value above the interval each polynomial was made for.
_SAFETY = 1.01
# Below this size of the shorter side products are no cost, and float32 is taken everywhere.
_BFLOAT16_FROM = 256


def polar_express(grad: Tensor, *, ns_steps: int = 5, ns_dtype: str | None = None) -> Tensor:
    r"""The polar factor by Polar Express: minimax quintics X <- a X + b (X X^T) X + c (X X^T)^2 X.

    G in R^{m x n}, m <= n (the transpose is taken otherwise), starts as X = G / (1.01 ||G||_F). Five steps amplify
    small singular values about 990 times. They take fifteen products, of which ten are symmetric, as many as Muon's.
    State kept: none. Temporaries: X and its next in the dtype of the products, and two m x m matrices.

    Args:
        grad: (..., m, n) gradient.
        ns_steps: number of quintic steps; after eight the last one is repeated.
        ns_dtype: `float32`, or `bfloat16` for X and products in bfloat16 with float32 accumulation. None takes
            bfloat16 from 256 rows on where the device multiplies fast in it: CUDA from Ampere on, Intel's GPUs, CPUs
            with AVX512-BF16 or AMX. Gradients in float64 are computed in float64.

    Raises:
        ValueError: another `ns_dtype`.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.polar_express import polar_express
        >>> polar_express(torch.diag(torch.tensor([4.0, 1.0])), ns_steps=8).round(decimals=2)
        tensor([[1., 0.],
                [0., 1.]])

    References:
        Polar Express, https://huggingface.co/papers/2505.16932, Algorithm 1.
    """
    check_dtype(ns_dtype, "polar_express", POLAR_EXPRESS_DTYPES)
    unit, tall = wide_unit(grad, _dtype_of_products(grad) if ns_dtype is None else getattr(torch, ns_dtype))
    x = as_batch(unit)
    # A CPU takes longer for a product of batches of one than for that of two matrices.
    if x.device.type == "cpu":
        white = [_steps(one, ns_steps) for one in x]
        x = white[0] if len(white) == 1 else torch.stack(white)
    else:
        x = _steps(x, ns_steps)
    return in_order(restore(x.reshape(unit.shape), tall)).to(torch.promote_types(grad.dtype, torch.float32))


def _steps(x: Tensor, steps: int) -> Tensor:
    """Run the steps on a matrix or a batch of them, which are overwritten: fresh memory costs a CPU much of a step."""
    gram, spare = x.new_empty(*x.shape[:-1], x.shape[-2]), torch.empty_like(x)
    polynomial = torch.empty_like(gram)
    for a, b, c in coefficients(steps):
        symmetric_product(x, x, out=gram)
        x, spare = add_product(x, quadratic(gram, b, c, out=polynomial), x, a, out=spare), x
    return x


def coefficients(steps: int) -> list[tuple[float, float, float]]:
    """Return a, b and c of each step, for X / 1.01, and for singular values that rounding has pushed up to 1.01.

    Example:
        >>> from hf_stateless.norms.polar_express import coefficients
        >>> [tuple(round(value, 2) for value in step) for step in coefficients(1)]
        [(8.12, -22.23, 15.66)]
    """
    last = len(_COEFFICIENTS) - 1
    every = [_COEFFICIENTS[min(step, last)] for step in range(steps)]
    down = [_SAFETY ** ((step == 0) + (step < last)) for step in range(steps)]
    return [(a / s, b / s**3, c / s**5) for s, (a, b, c) in zip(down, every, strict=True)]


def _dtype_of_products(grad: Tensor) -> torch.dtype:
    large = grad.dtype != torch.float64 and min(grad.shape[-2:]) >= _BFLOAT16_FROM
    fast = large and multiplies_in_bfloat16(grad.device.type)
    return torch.bfloat16 if fast else torch.promote_types(grad.dtype, torch.float32)


@functools.cache
def multiplies_in_bfloat16(device_type: str) -> bool:
    """Tell whether products in bfloat16 are faster than in float32 on a device.

    Example:
        >>> from hf_stateless.norms.polar_express import multiplies_in_bfloat16
        >>> multiplies_in_bfloat16("meta")  # which stands for an accelerator that is not here
        True
    """
    if device_type == "cpu":
        return cpu_has("avx512_bf16", "amx_bf16")
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device_type in ("xpu", "meta")

r"""The SinkGD step of a matrix on CPU through `torch.compile`, where HF_STATELESS_COMPILE=1 asks for it.

How a step is run is no option of the optimizer, since it does not change what is computed: nothing about it is saved.
The rows come in blocks, G in R^{b x R x n}: the column sums of a block are taken before the next one is read. Sizes
are dynamic, so that one compilation serves all shapes, and it is done on a small matrix before the first real one.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .rounding import index_hashes, rounding_key
from .sinkhorn import SAFE_SUMS, smallest_sum


logger = logging.getLogger(__name__)

# Smaller matrices gain less than a compiled call costs.
_SMALLEST = 1 << 14
_DTYPES = (torch.float32, torch.bfloat16)
_state = {"failed": False}


def wanted() -> bool:
    """Tell whether compiled steps were asked for by HF_STATELESS_COMPILE=1, and have not failed in this process.

    Example:
        >>> from hf_stateless.compiled import wanted
        >>> wanted()
        False
    """
    return os.environ.get("HF_STATELESS_COMPILE", "0") == "1" and not _state["failed"]


def fits(weight: Tensor, grad: Tensor, layout: str, num_iterations: float) -> bool:
    """Tell whether a compiled step serves this weight: a matrix on CPU, stored as (out, in), in float32 or bf16.

    Example:
        >>> import torch
        >>> from hf_stateless.compiled import fits
        >>> W = torch.ones(256, 256)
        >>> fits(W, W, "out_in", 5), fits(W, W, "in_out", 5), fits(W[:251], W[:251], "out_in", 5)
        (True, False, False)
    """
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and layout == "out_in"
        and weight.ndim == 2
        and weight.device.type == "cpu"
        and weight.numel() >= _SMALLEST
        and weight.dtype in _DTYPES
        and grad.dtype in _DTYPES
        and weight.is_contiguous()
        and grad.is_contiguous()
        and block_rows(weight.shape[0]) > 1
        and num_iterations == int(num_iterations)
    )


@cache
def block_rows(rows: int) -> int:
    """Return the divisor of a number of rows that is nearest to 16, of those up to 64 that leave two blocks or more.

    Example:
        >>> from hf_stateless.compiled import block_rows
        >>> block_rows(1376), block_rows(5461), block_rows(7)
        (16, 43, 1)
    """
    divisors = [size for size in range(1, min(64, rows // 2) + 1) if rows % size == 0]
    return min(divisors, key=lambda size: abs(math.log2(size / 16))) if divisors else 1


def compiled_update_(
    weight: Tensor,
    grad: Tensor,
    key: Tensor | None,
    step_size: float,
    decay: float,
    *,
    num_iterations: float,
    scratch: Tensor,
) -> bool | None:
    r"""Apply W <- decay W - step_size diag(r) G diag(c), with r and c of SR-Sinkhorn(G), through compiled code.

    Args:
        weight: matrix that `fits`, updated in place.
        grad: its gradient.
        key: rounding key of a bf16 weight, or None for rounding to nearest; the noise is that of `rounding_noise`.
        step_size: factor of the normalised gradient.
        decay: factor of the weight.
        num_iterations: L.
        scratch: float32 buffer of the gradient's shape, overwritten.

    Returns:
        Whether the gradient was finite; None where nothing was done: compilation failed, or the rows differ in scale
        by more than squares can hold. Then the eager step has to be taken.

    Example:
        >>> import torch
        >>> from hf_stateless.compiled import compiled_update_
        >>> W, G = torch.zeros(128, 128), torch.zeros(128, 128)  # without signal: left to the eager step
        >>> compiled_update_(W, G, None, 0.1, 1.0, num_iterations=5, scratch=torch.empty(128, 128))

    References:
        https://huggingface.co/papers/2502.06742, Algorithms 3 and 4.
    """
    try:
        with torch.no_grad():
            graphs = _ready(int(num_iterations), weight.dtype)
            return _update_(graphs, weight, grad, key, step_size, decay, scratch)
    except Exception as error:  # a compiler fails in many ways, and each has a working answer: the eager step
        _state["failed"] = True
        logger.warning(
            "HF_STATELESS_COMPILE=1: compilation failed, SinkGD goes on without it (%s: %s).",
            type(error).__name__,
            str(error).strip().splitlines()[0] if str(error).strip() else "no message",
        )
        return None


def _update_(
    graphs: dict[str, Callable[..., Any]],
    weight: Tensor,
    grad: Tensor,
    key: Tensor | None,
    step_size: float,
    decay: float,
    scratch: Tensor,
) -> bool | None:
    m, n = grad.shape
    exact = grad if grad.dtype == torch.float32 else scratch.copy_(grad)
    _, exponent = math.frexp(float(exact[0].abs().amax()))
    scale = torch.tensor(2.0 ** min(max(-exponent, -126), 126))
    row, column, signs = graphs["scalings"](exact.view(-1, block_rows(m), n), scale)
    least, most, size = signs.tolist()
    if not (SAFE_SUMS[0] < least and most < SAFE_SUMS[1] and 0 < size < math.inf):
        return None
    factors = (row, column, torch.tensor(float(step_size)), torch.tensor(float(decay)))
    if weight.dtype == torch.float32:
        graphs["write"](weight, weight, exact, *factors)
        return True
    graphs["write"](scratch, weight, exact, *factors)
    if key is None:
        weight.copy_(scratch)
        return True
    bits = scratch.view(torch.int32)
    graphs["round"](bits, *index_hashes(m, n, key))
    weight.view(torch.int16).copy_(bits)
    return True


@cache
def _ready(num_iterations: int, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """Return the compiled functions for a number of iterations and a dtype of weights, compiled and tried out."""
    start = time.perf_counter()
    graphs = {"scalings": _compiled_scalings(num_iterations), "write": _compile(_write_), "round": _compile(_round_)}
    # No two sizes are equal, since the compiler would take equal ones for one.
    weight, grad = torch.ones(48, 80, dtype=dtype), torch.ones(48, 80, dtype=dtype)
    _update_(graphs, weight, grad, rounding_key(0, 0, torch.ones(1)), 1.0, 1.0, torch.empty(48, 80))
    logger.warning(
        "HF_STATELESS_COMPILE=1: compiled the SinkGD step for %s on CPU, for all shapes, in %.1f s "
        "(once more for rows longer than 4096).",
        str(dtype).removeprefix("torch."),
        time.perf_counter() - start,
    )
    return graphs


@cache
def _compiled_scalings(num_iterations: int) -> Callable[..., Any]:
    return _compile(lambda grad, scale: _scalings(grad, scale, num_iterations))


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True, fullgraph=True)
    return compiled


def _scalings(grad: Tensor, scale: Tensor, num_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return r, c and (least row sum, largest row sum, size) of a matrix in blocks of rows, which fit in cache."""
    blocks, rows, n = grad.shape
    smallest = smallest_sum(1)
    v = torch.ones((), dtype=grad.dtype)
    for iteration in range(num_iterations):
        squares = (grad * scale).square()
        row_sums = (squares * v if iteration else squares).sum(-1)
        if not iteration:
            least, most = row_sums.amin(), row_sums.amax()
        u = _kept(n / row_sums.clamp_min(smallest))
        column_sums = (squares * u.unsqueeze(-1)).sum(1).sum(0)
        v = _kept(blocks * rows / column_sums.clamp_min(smallest))
    r = torch.where(row_sums < smallest, 0, u.sqrt()) * scale
    c = torch.where(column_sums < smallest, 0, v.sqrt())
    return r.view(-1), c, torch.stack([least, most, r.amax() + 0 * c.amax()])


def _kept(vector: Tensor) -> Tensor:
    """Return a vector that the compiler stores: it would divide anew for every element of the matrix."""
    return torch.as_strided(vector, vector.shape, vector.stride())


def _write_(out: Tensor, weight: Tensor, grad: Tensor, r: Tensor, c: Tensor, step_size: Tensor, decay: Tensor) -> None:
    out.copy_(weight * decay - step_size * (grad * r.unsqueeze(1) * c))


def _round_(bits: Tensor, row: Tensor, column: Tensor) -> None:
    """Do to the bits of float32 values what `stochastic_round_` does; the upper half is the bf16 number."""
    bits.copy_((bits + ((row.unsqueeze(1) * column) >> 16) + 0x8000) >> 16)

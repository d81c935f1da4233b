"""SinkGD on CPUs by compiled C: each iteration reads the gradient or its squares once, each thread takes a matrix."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import torch
from torch import Tensor

from ...norms.projections import power_of_two_inverse
from ...norms.sinkhorn import SAFE_SUMS, smallest_sum
from ...weights.noise import RoundingKey
from ..layout import Layout
from .cpu_compiler import compiled


_DTYPES = (torch.float32, torch.bfloat16)
# Below this size the kernel saves less than compiling it costs.
_SMALLEST = 1 << 16
# Squares of larger matrices leave the cache, so they are computed anew: no float32 copy of an embedding is ever whole.
_KEPT = 1 << 22
_ROWS = 4
# Beyond it a factor of a row would leave float32: such gradients, below 1e-30, are left to torch.
_LARGEST_SCALE = 2.0**100
# A thread of the kernel does the work of so many threads of torch.
_WORTH_THREADS = 2


def fits(weights: Sequence[Tensor], grads: Sequence[Tensor], layout: Layout, num_iterations: float) -> bool:
    """Tell whether the C kernel updates these weights of one shape: large plain matrices on CPU, stored as (out, in).

    The first such weights compile it. Threads take whole matrices, so one matrix alone is left to torch where torch
    has many threads.

    Args:
        weights: as for `sinkgd_steps_`.
        grads: their gradients.
        layout: how the weights are stored.
        num_iterations: L.
    """
    return (
        layout.plain
        and num_iterations == round(num_iterations) >= 1
        and weights[0].numel() >= _SMALLEST
        and all(map(_plain, weights))
        and all(map(_plain, grads))
        and torch.get_num_threads() <= _WORTH_THREADS * len(weights)
        and _kernel() is not None
    )


def _plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.ndim == 2
        and tensor.dtype in _DTYPES
        and tensor.is_contiguous()
    )


@cache
def _kernel() -> Callable[..., int] | None:
    library = compiled("cpu_sinkgd")
    if library is None:
        return None
    address, flag, size, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    step: Callable[..., int] | None = getattr(library, "sinkgd_step", None)
    if step is None:  # whatever CC names has made another library
        return None
    step.argtypes = [address, flag, address, flag, address, flag, address, address, flag, *[size] * 3, *[number] * 7]  # type: ignore[attr-defined]
    return step


def sinkgd_steps_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    keys: Sequence[RoundingKey] | None,
    *,
    step_size: float,
    decay: float,
    layout: Layout,
    num_iterations: int,
) -> list[bool | None]:
    r"""W <- decay W - step_size diag(r) G diag(c) for weights of one shape, a thread of torch's number for each.

    What a weight becomes does not depend on the number of threads. Temporary: a float32 matrix for each thread,
    of up to 16 MiB.

    Args:
        weights: for which `fits` is true, updated in place.
        grads: their gradients.
        keys: rounding keys of bf16 weights, or None for rounding to nearest; the noise is that of `rounding_noise`.
        step_size: factor of the normalised gradient.
        decay: factor of the weight.
        layout: how the weights are stored, as `fits` has checked.
        num_iterations: L.

    Returns:
        For each weight True, or None where it is as before, for torch to take: a row has no signal, rows are so far
        apart that their squares leave float32, or the gradient is not finite.

    References:
        https://huggingface.co/papers/2502.06742, Algorithms 3 (SR-Sinkhorn) and 4 (SinkGD).
    """
    update = partial(_step_, step_size=step_size, decay=decay, num_iterations=num_iterations)
    threads = min(torch.get_num_threads(), len(weights))
    m, n = weights[0].shape
    numbers = _squares(m, n) + 2 * m + 5 * n
    scratch = [torch.empty(numbers, dtype=torch.float32) for _ in range(threads)]
    parts = [range(thread, len(weights), threads) for thread in range(threads)]
    updated: list[bool | None] = [None] * len(weights)

    def work(thread: int) -> None:
        for i in parts[thread]:
            updated[i] = update(weights[i], grads[i], None if keys is None else keys[i].value, scratch[thread]) or None

    if threads == 1:
        work(0)
    else:  # made anew each time: threads that wait would not survive a fork
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    return updated


@torch.no_grad()
def _step_(
    weight: Tensor,
    grad: Tensor,
    key: Tensor | None,
    scratch: Tensor,
    *,
    step_size: float,
    decay: float,
    num_iterations: int,
) -> bool:
    m, n = grad.shape
    rounded = key is not None and weight.dtype == torch.bfloat16
    vectors = scratch.data_ptr() + 4 * _squares(m, n)
    scale = float(power_of_two_inverse(grad[0].abs().amax().float()))  # that of the twin
    if scale > _LARGEST_SCALE:
        return False
    kernel = _kernel()
    assert kernel is not None
    left_alone = kernel(
        grad.data_ptr(), grad.dtype == torch.bfloat16, weight.data_ptr(), weight.dtype == torch.bfloat16,
        scratch.data_ptr(), m * n <= _KEPT, vectors, vectors + 4 * (m + 4 * n) if rounded else None,
        int(key) if rounded else 0, m, n, num_iterations,  # type: ignore[arg-type]
        scale, step_size, decay, smallest_sum(n), smallest_sum(m), *SAFE_SUMS,
    )  # fmt: skip
    return not left_alone


def _squares(m: int, n: int) -> int:
    return m * n if m * n <= _KEPT else _ROWS * n

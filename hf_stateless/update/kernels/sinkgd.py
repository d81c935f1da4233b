"""SinkGD by kernels: which matrices go through the iterations together, in which blocks, and with which scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...norms.sinkhorn import smallest_sum
from ...weights.noise import RoundingKey
from ...weights.stored import StoredWeight
from ..batches import alike
from ..layout import Layout
from .int8 import launch_int8
from .launch import DTYPES, aligned, element, on_device, pointer_table, power_of_two, start
from .plain import as_stack, is_stack, launch_update


# Bytes of gradient that go through all iterations before the next ones start. Less would stay in a GPU's second cache,
# but then a launch takes the host longer than the GPU: with 20 MiB steps of 1.3B shapes on an H100 took three to five
# times as long.
CHUNK_BYTES = 512 << 20
# Least elements and rows of gradient that a program takes: for each it writes a line of sums, which is read again.
_PROGRAM, _ROWS = 1 << 16, 32
# Elements of a tile of several rows, of one that takes four warps at most, and of the longest row that is a tile.
_TILE, _FOUR_WARPS, _LONGEST_ROW = 4096, 8192, 16384
# Tiles where rows are longer, and where they lie across memory: then the first dimension is the contiguous one.
_LONG_ROWS, _TURNED = (8, 1024), (64, 64)


def fits(weights: Sequence[Tensor], grads: Sequence[Tensor], layout: Layout, num_iterations: float) -> bool:
    """Tell whether the kernels can update these weights of one shape; the torch twin takes the others."""
    return (
        layout.scales
        and num_iterations == round(num_iterations) >= 1
        and grads[0].numel() > 0
        and all(g.dtype in DTYPES and is_stack(g, layout) for g in grads)
        and all(_writable(w, layout) for w in weights)
    )


def sinkgd_update_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    keys: Sequence[RoundingKey] | None,
    *,
    step_size: float | Tensor,
    decay: float | Tensor,
    layout: Layout,
    num_iterations: int,
) -> list[Tensor]:
    r"""W <- decay W - step_size diag(r) G diag(c) for weights of one shape, in 2 L + 1 launches per chunk.

    Args:
        weights: float tensors or 8-bit weights for which `fits` is true, updated in place.
        grads: their gradients.
        keys: rounding keys, or None for rounding to nearest.
        step_size: factor of X; a one-element float32 tensor is read on the device, so that a graph can be captured.
        decay: factor of W, of the same kind as `step_size`.
        layout: how the weights are stored.
        num_iterations: L.

    Returns:
        For each whether its gradient was finite: on their device, not read back.

    References:
        https://huggingface.co/papers/2502.06742, Algorithms 3 (SR-Sinkhorn) and 4 (SinkGD).
    """
    finite: list[Tensor] = [torch.empty(0)] * len(weights)
    with on_device(grads[0]):
        for same in alike(range(len(weights)), lambda i: (_form(weights[i]), _form(grads[i]))):
            batch = _Batch([weights[i] for i in same], [grads[i] for i in same], layout, num_iterations)
            values = None if keys is None else torch.cat([keys[i].value for i in same])
            flags = batch.update_(values, step_size, decay)
            for i, flag in zip(same, flags.unbind(), strict=True):
                finite[i] = flag
    return finite


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """Return what one launch assumes to be equal for all tensors."""
    if isinstance(tensor, StoredWeight):
        return tensor.kernel, *(t.shape for t in tensor.stored)
    return tensor.shape, tensor.stride(), tensor.dtype


def _writable(weight: Tensor, layout: Layout) -> bool:
    if isinstance(weight, StoredWeight):
        return (
            weight.kernel == "int8"
            and layout.plain
            and weight.ndim == 2
            and all(t.is_contiguous() for t in weight.stored)
        )
    return weight.dtype in DTYPES and is_stack(weight, layout)


class _Batch:
    """Weights and gradients of one shape, dtype and strides, with the vectors of their updates."""

    def __init__(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], layout: Layout, num_iterations: int
    ) -> None:
        self.weights, self.layout, self.num_iterations = weights, layout, num_iterations
        self.grads, self.grad, self.grad_table = grads, as_stack(grads[0], layout), pointer_table(grads)
        self.stack, self.m, self.n = self.grad.shape
        new, count = grads[0].new_empty, len(weights) * self.stack
        self.row = new(count, self.m, dtype=torch.float32)
        self.column = new(count, self.n, dtype=torch.float32)
        self.column_tile = power_of_two(self.n, 64)
        self.states = new(count, -(-self.n // self.column_tile), dtype=torch.int32)

    def update_(self, keys: Tensor | None, step_size: float | Tensor, decay: float | Tensor) -> Tensor:
        """Update all weights, a chunk at a time; the matrices of a tensor that exceeds one are taken in parts."""
        at_once = max(1, CHUNK_BYTES // self.grad[0].nbytes)
        chunk, total = self.stack * max(1, at_once // self.stack), len(self.row)
        for first in range(0, total, chunk):
            end = min(first + chunk, total)
            for part in range(first, end, at_once):
                self._iterate(part, min(at_once, end - part))
            self._apply(first, end - first, keys, step_size, decay)
        return self.states.view(len(self.weights), -1).amax(1) < 2

    def _iterate(self, first: int, count: int) -> None:
        """Compute r and c of some matrices, and the state of their gradients."""
        from .triton_sinkgd import finish_columns, pass_tiled, pass_whole_rows

        grad, m, n = self.grad, self.m, self.n
        turned = grad.stride(-1) != 1 and grad.stride(-2) == 1
        whole = not turned and n <= _LONGEST_ROW
        if whole:
            block_n = power_of_two(n, _LONGEST_ROW)
            block_m = power_of_two(m, max(1, _TILE // block_n))
            tiles = -(-min(max(_ROWS, _PROGRAM // n), m) // block_m)
        else:
            most_m, most_n = _TURNED if turned else _LONG_ROWS
            block_m, block_n, tiles = power_of_two(m, most_m), power_of_two(n, most_n), 1
        blocks = -(-m // (block_m * tiles))
        partials = self.row.new_empty(count * blocks, n)
        strides = (grad.stride(0), grad.stride(1), grad.stride(2))
        options = {
            "DTYPE": element(grad.dtype),
            "ALIGNED": aligned(self.grads),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "num_warps": (4 if block_m * block_n <= _FOUR_WARPS else 16) if whole else 8,
        }
        for iteration in range(1, self.num_iterations + 1):
            ends = {"LAST": iteration == self.num_iterations}
            start(
                pass_whole_rows if whole else pass_tiled, count * blocks,
                self.grad_table, self.row, self.column, partials, first, self.stack, *strides,
                m, n, float(n), smallest_sum(n), blocks, tiles, FIRST=iteration == 1, **ends, **options,
            )  # fmt: skip
            start(
                finish_columns, count * self.states.shape[1],
                partials, self.row, self.column, self.states, first, m, n, float(m), smallest_sum(m), blocks,
                self.states.shape[1], **ends, BLOCK_M=power_of_two(blocks, 32), BLOCK_N=self.column_tile, num_warps=4,
            )  # fmt: skip

    def _apply(
        self, first: int, count: int, keys: Tensor | None, step_size: float | Tensor, decay: float | Tensor
    ) -> None:
        """Write the weights of some matrices."""
        stored, vectors = [w for w in self.weights if isinstance(w, StoredWeight)], (self.row, self.column)
        if stored:
            part = slice(first, first + count)
            launch_int8(stored, self.grad_table, self.grad[0], (*vectors, self.states), keys, step_size, decay, part)
            return
        launch_update(
            self.weights, self.grads, self.grad, self.grad_table, vectors, self.states, keys, (step_size, decay),
            range(first, first + count), self.layout,
        )  # fmt: skip

"""Updates of 8-bit weights: a program reads some groups of codes, changes them in float32 and writes them back."""

from __future__ import annotations

import triton
import triton.language as tl

from ...weights.int8.codes import LARGEST_SCALE, SMALLEST_SCALE
from .triton_arithmetic import column_noise, matrix_at, row_noise, widened
from .triton_sinkgd import state_of


# Names that a kernel reads have to be constexpr.
_SMALLEST_SCALE: tl.constexpr = tl.constexpr(SMALLEST_SCALE)
_LARGEST_SCALE: tl.constexpr = tl.constexpr(LARGEST_SCALE)
# Adding and subtracting 1.5 * 2^23 rounds a float32 to the nearest whole number, ties to even.
_NEAREST: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def requantized(exact, old, noise, STOCHASTIC: tl.constexpr):
    """Return codes and scales of groups (in rows) of exact weights, by the rule of `requantize_`."""
    largest = tl.max(tl.abs(exact), 1)
    bits = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)).to(tl.int32, bitcast=True)
    fresh = ((bits + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    fresh = tl.minimum(tl.maximum(fresh, _SMALLEST_SCALE), _LARGEST_SCALE)
    scale = tl.where((largest >= 126 * old) & (largest <= 127 * old), old, fresh)
    quotient = tl.div_rn(exact, tl.broadcast_to(scale[:, None], exact.shape))
    if STOCHASTIC:
        codes = tl.floor((quotient + noise.to(tl.float32) * 0.0000152587890625) + 0.00000762939453125)
    else:
        codes = (quotient + _NEAREST) - _NEAREST
    return tl.minimum(tl.maximum(codes, -127.0), 127.0), scale


@triton.jit(do_not_specialize=["first", "first_row"])
def apply_int8(
    codes_at, scales_at, updates, row, column, states, keys, step_size, decay, first, first_row, stride_m,
    stride_n, m, n, groups, length, count, programs,
    UPDATE: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr, HYPER_ON_DEVICE: tl.constexpr,
    STOCHASTIC: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_LENGTH: tl.constexpr,
):  # fmt: skip
    """W <- decay W - step_size X on codes and scales, with X = diag(r) G diag(c) or a given matrix."""
    program = tl.program_id(0)
    matrix, block = first + program // programs, program % programs
    state = 1
    if CHECKED:
        state = state_of(states, matrix, count, 128)
    if state == 1:
        group = block * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
        place = tl.arange(0, BLOCK_LENGTH)
        rows = group // groups
        columns = (group % groups)[:, None] * length + place[None, :]
        mask = (rows < m)[:, None] & (place < length)[None, :]
        x = widened(tl.load(
            matrix_at(updates, matrix, 1, 0, UPDATE, False)
            + rows.to(tl.int64)[:, None] * stride_m + columns.to(tl.int64) * stride_n, mask=mask, other=0.0,
        ))  # fmt: skip
        if SCALED:
            r = tl.load(row + matrix.to(tl.int64) * m + rows, mask=rows < m, other=0.0)
            x = x * r[:, None] * tl.load(column + matrix.to(tl.int64) * n + columns, mask=mask, other=0.0)
        if HYPER_ON_DEVICE:
            size, kept = tl.load(step_size), tl.load(decay)
        else:
            size, kept = step_size, decay
        codes = matrix_at(codes_at, matrix, 1, 0, tl.int8, False) + rows.to(tl.int64)[:, None] * n + columns
        scales = matrix_at(scales_at, matrix, 1, 0, tl.bfloat16, False) + group
        old = tl.load(scales, mask=rows < m, other=1.0).to(tl.float32)
        exact = tl.load(codes, mask=mask, other=0).to(tl.float32) * old[:, None] * kept - size * x
        noise = tl.zeros((BLOCK_GROUPS, BLOCK_LENGTH), tl.int32)
        if STOCHASTIC:
            key = tl.load(keys + matrix)
            noise = ((row_noise(first_row + rows, key)[:, None] * column_noise(columns, key)) >> 16) + 0x8000
        new, scale = requantized(tl.where(mask, exact, 0.0), old, noise, STOCHASTIC)
        tl.store(codes, new.to(tl.int8), mask=mask)
        tl.store(scales, scale.to(tl.bfloat16), mask=rows < m)

r"""SinkGD in one read of the gradient per iteration: row step and column sums of a block while it is on the chip.

Matrices of one shape lie behind a table of pointers. A program takes a block of rows, makes its row factors u from
the column factors v of the last iteration, and adds up u_i P_ij over its rows into a line of `partials`; a small
kernel adds the lines in a fixed order and makes the new v. No float matrix is written, and nothing depends on the
order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_arithmetic import column_noise, matrix_at, offsets, power_of_two_inverse, round_to, row_noise, widened


@triton.jit
def _inverse(sums, size, smallest):
    """Return size / sums; a comparison with NaN is false, so that NaN stays, which `maximum` would lose."""
    return tl.div_rn(tl.zeros_like(sums) + size, tl.where(sums < smallest, smallest, sums))


@triton.jit
def _factors(sums, scale, size, smallest, LAST: tl.constexpr):
    """Return u of the iteration from sums of squares, and what is kept of a row: its scale, and at last its factor."""
    u = _inverse(sums, size, smallest)
    if LAST:
        kept = tl.where(sums <= smallest, 0.0, tl.sqrt_rn(u)) * scale
        kept = tl.where(kept == float("inf"), 0.0, kept)  # a row of denormal numbers counts as zero
    else:
        kept = scale
    return u, kept


@triton.jit(do_not_specialize=["first"])
def pass_whole_rows(
    grads, row, column, partials, first, stack, stack_stride, stride_m, stride_n, m, n, size, smallest, blocks, tiles,
    FIRST: tl.constexpr, LAST: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One iteration where a row fits a tile: the tile is loaded once and used twice."""
    program = tl.program_id(0)
    matrix, block = first + program // blocks, program % blocks
    grad = matrix_at(grads, matrix, stack, stack_stride, DTYPE, ALIGNED)
    row += matrix.to(tl.int64) * m
    columns = tl.arange(0, BLOCK_N)
    if FIRST:
        v = tl.full((BLOCK_N,), 1.0, tl.float32)
    else:
        v = tl.load(column + matrix.to(tl.int64) * n + columns, mask=columns < n, other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(tiles):
        rows = (block * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < m)[:, None] & (columns < n)[None, :]
        x = widened(tl.load(grad + offsets(rows, columns, stride_m, stride_n), mask=mask, other=0.0))
        if FIRST:
            scale = power_of_two_inverse(tl.max(tl.abs(x), 1))
        else:
            scale = tl.load(row + rows, mask=rows < m, other=1.0)
        x *= scale[:, None]
        squares = x * x
        u, kept = _factors(tl.sum(squares * v[None, :], 1), scale, size, smallest, LAST)
        tl.store(row + rows, kept, mask=rows < m)
        total += squares * u[:, None]
    tl.store(partials + program.to(tl.int64) * n + columns, tl.sum(total, 0), mask=columns < n)


@triton.jit(do_not_specialize=["first"])
def pass_tiled(
    grads, row, column, partials, first, stack, stack_stride, stride_m, stride_n, m, n, size, smallest, blocks, tiles,
    FIRST: tl.constexpr, LAST: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One iteration where rows are long or lie across memory: what is read again comes from a cache."""
    program = tl.program_id(0)
    matrix, block = first + program // blocks, program % blocks
    grad = matrix_at(grads, matrix, stack, stack_stride, DTYPE, ALIGNED)
    row += matrix.to(tl.int64) * m
    column += matrix.to(tl.int64) * n
    partials += program.to(tl.int64) * n
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if FIRST:
        largest = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, n, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            mask = (rows < m)[:, None] & (columns < n)[None, :]
            x = widened(tl.load(grad + offsets(rows, columns, stride_m, stride_n), mask=mask, other=0.0))
            largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
        scale = power_of_two_inverse(largest)
    else:
        scale = tl.load(row + rows, mask=rows < m, other=1.0)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        mask = (rows < m)[:, None] & (columns < n)[None, :]
        x = widened(tl.load(grad + offsets(rows, columns, stride_m, stride_n), mask=mask, other=0.0))
        x *= scale[:, None]
        if FIRST:
            sums += tl.sum(x * x, 1)
        else:
            v = tl.load(column + columns, mask=columns < n, other=0.0)
            sums += tl.sum(x * x * v[None, :], 1)
    u, kept = _factors(sums, scale, size, smallest, LAST)
    tl.store(row + rows, kept, mask=rows < m)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        mask = (rows < m)[:, None] & (columns < n)[None, :]
        x = widened(tl.load(grad + offsets(rows, columns, stride_m, stride_n), mask=mask, other=0.0))
        x *= scale[:, None]
        tl.store(partials + columns, tl.sum(x * x * u[:, None], 0), mask=columns < n)


@triton.jit(do_not_specialize=["first"])
def finish_columns(
    partials, row, column, states, first, m, n, size, smallest, blocks, tiles,
    LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up column sums and make v of them; at last c, and what this tile shows of the state of its matrix."""
    program = tl.program_id(0)
    matrix, tile = first + program // tiles, program % tiles
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    partials += (program // tiles).to(tl.int64) * blocks * n
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, blocks, BLOCK_M):
        lines = start + tl.arange(0, BLOCK_M)
        mask = (lines < blocks)[:, None] & (columns < n)[None, :]
        total += tl.load(partials + offsets(lines, columns, n, 1), mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    v = _inverse(sums, size, smallest)
    if LAST:
        v = tl.where(sums <= smallest, 0.0, tl.sqrt_rn(v))
        largest = tl.zeros((BLOCK_M * BLOCK_N,), tl.float32)
        row += matrix.to(tl.int64) * m
        for start in range(0, m, BLOCK_M * BLOCK_N):
            rows = start + tl.arange(0, BLOCK_M * BLOCK_N)
            largest = tl.maximum(largest, tl.load(row + rows, mask=rows < m, other=0.0))
        # A bad entry of the gradient makes its row's factor 0 or NaN, and by 0 times infinity its column's NaN.
        bad = tl.max(tl.where((columns < n) & (v - v != 0), 2, 0), 0)
        alive = tl.max(tl.where(largest > 0, 1, 0), 0)
        tl.store(states + matrix.to(tl.int64) * tiles + tile, tl.maximum(bad, alive))
    tl.store(column + matrix.to(tl.int64) * n + columns, v, mask=columns < n)


@triton.jit
def state_of(states, weight, count, BLOCK: tl.constexpr):
    """Return 0 for a weight whose gradient is zero, 1 for an ordinary one, 2 for one with a bad entry."""
    states += weight.to(tl.int64) * count
    state = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        which = start + tl.arange(0, BLOCK)
        state = tl.maximum(state, tl.load(states + which, mask=which < count, other=0))
    return tl.max(state, 0)


@triton.jit(do_not_specialize=["first"])
def apply_update(
    grads, weights, row, column, states, keys, step_size, decay, first, stack, grad_stack_stride, weight_stack_stride,
    grad_m, grad_n, weight_m, weight_n, m, n, count, tiles_m, tiles_n,
    GRAD: tl.constexpr, WEIGHT: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr,
    HYPER_ON_DEVICE: tl.constexpr, STOCHASTIC: tl.constexpr, TURNED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W <- decay W - step_size X, rounded as W asks, X = diag(r) G diag(c) or given; only where the state is 1."""
    program = tl.program_id(0)
    matrix, tile = first + program // (tiles_m * tiles_n), program % (tiles_m * tiles_n)
    if state_of(states, matrix // stack, count, 128) == 1:
        rows = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (rows < m)[:, None] & (columns < n)[None, :]
        grad = matrix_at(grads, matrix, stack, grad_stack_stride, GRAD, ALIGNED)
        x = widened(tl.load(grad + offsets(rows, columns, grad_m, grad_n), mask=mask, other=0.0))
        weight = matrix_at(weights, matrix, stack, weight_stack_stride, WEIGHT, ALIGNED)
        weight += offsets(rows, columns, weight_m, weight_n)
        w = widened(tl.load(weight, mask=mask, other=0.0))
        # Other names than the arguments': a name may not turn from an address into a number.
        if HYPER_ON_DEVICE:
            size, kept = tl.load(step_size), tl.load(decay)
        else:
            size, kept = step_size, decay
        if SCALED:  # by r first: of order one whatever the scale of G, unlike G diag(c)
            r = tl.load(row + matrix.to(tl.int64) * m + rows, mask=rows < m, other=0.0)
            c = tl.load(column + matrix.to(tl.int64) * n + columns, mask=columns < n, other=0.0)
            exact = w * kept - size * (x * r[:, None]) * c[None, :]
        else:
            exact = w * kept - size * x
        noise = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        if STOCHASTIC:
            key = tl.load(keys + matrix // stack)
            layer = matrix % stack
            if TURNED:  # the noise belongs to positions of the tensor as it is stored
                product = column_noise(rows, key)[:, None] * row_noise(layer * n + columns, key)[None, :]
            else:
                product = row_noise(layer * m + rows, key)[:, None] * column_noise(columns, key)[None, :]
            noise = (product >> 16) + 0x8000
        tl.store(weight, round_to(exact, noise, WEIGHT, STOCHASTIC), mask=mask)

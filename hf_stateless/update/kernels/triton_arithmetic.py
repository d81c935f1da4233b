"""What kernels share: reading a matrix behind a table of pointers, exact powers of two, and the rounding noise."""

from __future__ import annotations

import triton
import triton.language as tl


# The constants of `hf_stateless.weights.rounding`, whose noise this is bit for bit.
_MIX_1: tl.constexpr = tl.constexpr(0x7FEB352D)
_MIX_2: tl.constexpr = tl.constexpr(0x846CA68B - (1 << 32))
_GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B9 - (1 << 32))


@triton.jit
def matrix_at(pointers, matrix, stack, stack_stride, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the address of a matrix: of a tensor that holds a stack of them, the table has the first."""
    address = tl.load(pointers + matrix // stack).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, [16])
    return address + (matrix % stack).to(tl.int64) * stack_stride


@triton.jit
def offsets(rows, columns, stride_row, stride_column):
    """Return positions in memory, in 64 bits: a matrix may have more than 2^31 elements."""
    return rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column


@triton.jit
def power_of_two_inverse(largest):
    """Return 2^-e for largest = f 2^e with f in [0.5, 1), as `hf_stateless.norms.projections.power_of_two_inverse`."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return (tl.maximum(253 - exponent, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def widened(x):
    """Return values in float32; of bfloat16 by their bits, since the interpreter's cast loses the smallest numbers."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * _MIX_1
    x = x ^ (x >> 15)
    x = x * _MIX_2
    return x ^ (x >> 16)


@triton.jit
def row_noise(rows, key):
    """Return what the rows of a stored tensor contribute to the noise."""
    return _mix(_mix(rows * _GOLDEN) ^ key) | 1


@triton.jit
def column_noise(columns, key):
    """Return what its columns contribute: the noise is `(row * column >> 16) + 0x8000`."""
    return _mix(_mix(columns * _GOLDEN) ^ (key + _GOLDEN)) | 1


@triton.jit
def round_to(exact, noise, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round float32 to a storage dtype: to nearest, or to bfloat16 by noise in [0, 65535]."""
    if tl.bfloat16 == DTYPE:
        bits = exact.to(tl.int32, bitcast=True)
        if not STOCHASTIC:
            noise = 0x7FFF + ((bits >> 16) & 1)  # up from above the middle, and from the middle to an even number
        rounded = ((bits + noise) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = exact.to(DTYPE)
    return rounded


@triton.jit(do_not_specialize=[f"p{i}" for i in range(16)])
def write_pointers(table, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15):
    """Write sixteen addresses into a table: launch arguments need no copy from the host, and can be captured."""
    tl.store(table + 0, p0)
    tl.store(table + 1, p1)
    tl.store(table + 2, p2)
    tl.store(table + 3, p3)
    tl.store(table + 4, p4)
    tl.store(table + 5, p5)
    tl.store(table + 6, p6)
    tl.store(table + 7, p7)
    tl.store(table + 8, p8)
    tl.store(table + 9, p9)
    tl.store(table + 10, p10)
    tl.store(table + 11, p11)
    tl.store(table + 12, p12)
    tl.store(table + 13, p13)
    tl.store(table + 14, p14)
    tl.store(table + 15, p15)

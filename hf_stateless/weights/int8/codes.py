r"""Symmetric int8 storage of a matrix: W[i, j] = codes[i, j] scale[i, j // length], codes in [-127, 127].

There is no zero point, so a group keeps its accuracy whatever its mean is. Scales are bfloat16 and rounded up: they
have the range of float32 at half its bytes, nothing is clipped, and a code (8 bits) times a scale (8 bits) is exact in
float32. For groups of 128 a weight takes 1 + 2/128 = 1.016 bytes, for groups of 64 it takes 1.031.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..noise import RoundingKey
from ..rounding import stochastic_round_integers_
from ..stored import Lost


# Elements that are in float32 at once while a weight is written; the result does not depend on it.
_BLOCK = 1 << 22
LARGEST_CODE = 127
COMMON_LENGTHS = (128, 64, 32)
"""How many weights share a scale where vLLM has kernels for it; so it has where all of a row do."""
# Bounds of the scales. The smallest bfloat16 that is no subnormal serves groups of zeros too: no division by zero.
# The largest keeps 127 times itself within bfloat16.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**121


def group_length(in_features: int, group_size: int | None) -> int:
    """Return how many weights of a row share a scale: the largest divisor of a row that is at most `group_size`.

    Where that is below half of `group_size`, it is the smallest divisor above, at most the whole row.

    Args:
        in_features: length of a row.
        group_size: as many as wanted; None for one scale per row.

    Example:
        >>> from hf_stateless.weights.int8.codes import group_length
        >>> group_length(4096, 128), group_length(5461, 128), group_length(131, 128), group_length(4096, None)
        (128, 127, 131, 4096)
    """
    if group_size is None or in_features <= group_size:
        return max(1, in_features)  # an empty row has no group, of whatever length
    below = next(length for length in range(group_size, 0, -1) if in_features % length == 0)
    if 2 * below >= group_size:
        return below
    return next(length for length in range(group_size + 1, in_features + 1) if in_features % length == 0)


def stored_length(in_features: int, group_size: int | None) -> int:
    """Return how many weights of a row share a scale where a weight is stored: a number that others have kernels for.

    It is `group_size` where that divides a row, else the next of 128, 64 and 32 that does, else `group_length`.

    Args:
        in_features: length of a row.
        group_size: as many as wanted; None for one scale per row.

    Example:
        >>> from hf_stateless.weights.int8.codes import stored_length
        >>> stored_length(4096, 128), stored_length(576, 128), stored_length(1376, 128), stored_length(5461, 128)
        (128, 64, 32, 127)
    """
    if group_size is not None and group_size < in_features:
        for length in (group_size, *(size for size in COMMON_LENGTHS if size < group_size)):
            if in_features % length == 0:
                return length
    return group_length(in_features, group_size)


def quantize_matrix(weight: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Return int8 codes in the shape of a matrix and bfloat16 scales of (rows, groups), rounded to nearest.

    Args:
        weight: (out_features, in_features), any float dtype.
        group_size: see `stored_length`.

    Raises:
        ValueError: a weight is NaN or infinite.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.int8.codes import quantize_matrix
        >>> quantize_matrix(torch.tensor([[1.0, -0.5, 0.0]]), None)[0]
        tensor([[126, -63,   0]], dtype=torch.int8)
    """
    rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    groups = columns // stored_length(columns, group_size)
    scale = torch.full((rows, groups), SMALLEST_SCALE, dtype=torch.bfloat16, device=weight.device)
    exact = weight.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(exact).all()):
        raise ValueError("a weight is NaN or infinite: it has no 8-bit code.")
    requantize_(codes, scale, exact, None)
    return codes, scale


def quantize_stack(weight: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Return codes in the shape of a stack of matrices and scales of (..., rows, groups), one matrix after the other.

    Args:
        weight: (..., rows, columns), any float dtype; only one matrix is in float32 at once.
        group_size: see `stored_length`.

    Raises:
        ValueError: a weight is NaN or infinite.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.int8.codes import quantize_stack
        >>> codes, scale = quantize_stack(torch.ones(4, 2, 256), 128)
        >>> codes.shape, scale.shape
        (torch.Size([4, 2, 256]), torch.Size([4, 2, 2]))
    """
    groups = weight.shape[-1] // stored_length(weight.shape[-1], group_size)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty((*weight.shape[:-1], groups), dtype=torch.bfloat16, device=weight.device)
    if not weight.is_meta:
        stacks = (tensor.flatten(0, -3) if tensor.ndim > 2 else tensor[None] for tensor in (codes, scale, weight))
        for to_codes, to_scale, matrix in zip(*stacks, strict=True):
            for to, made in zip((to_codes, to_scale), quantize_matrix(matrix, group_size), strict=True):
                to.copy_(made)
    return codes, scale


def dequantize_matrix(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights in float: exact in float32, rounded once in a narrower dtype.

    Args:
        codes: (..., rows, columns) int8.
        scale: (..., rows, groups) bfloat16.
        dtype: of the result.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.int8.codes import dequantize_matrix
        >>> dequantize_matrix(torch.tensor([[3, -1]], dtype=torch.int8), torch.tensor([[0.5]], dtype=torch.bfloat16))
        tensor([[ 1.5000, -0.5000]])
    """
    grouped = codes.to(dtype).view(*scale.shape, -1)
    return grouped.mul_(scale.to(dtype).unsqueeze(-1)).flatten(-2)


def checked_codes(codes: Tensor, scale: Tensor, shape: tuple[int, int], length: int, *, ours: bool = True) -> Tensor:
    """Return codes that were stored, as a matrix, after a look at whether they can be what was written.

    Args:
        codes: int8 of shape (rows, groups, length), or (rows, columns).
        scale: (rows, groups) bfloat16.
        shape: (rows, columns) of the weight.
        length: how many weights share a scale.
        ours: this package wrote them, so that the largest code of a group is 126 or 127; others are free in that.

    Raises:
        ValueError: another dtype or shape; a scale or code that is never written; codes that do not fit their scales.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.int8.codes import checked_codes
        >>> codes, scale = torch.tensor([[[3, -127]]], dtype=torch.int8), torch.tensor([[0.5]], dtype=torch.bfloat16)
        >>> checked_codes(codes, scale, (1, 2), 2)
        tensor([[   3, -127]], dtype=torch.int8)
    """
    rows, columns = shape
    grouped = (rows, columns // length, length)
    if codes.dtype != torch.int8 or scale.dtype != torch.bfloat16:
        raise ValueError(f"got codes of {codes.dtype} and scales of {scale.dtype}, expected int8 and bfloat16.")
    if tuple(codes.shape) not in (grouped, shape) or tuple(scale.shape) != grouped[:2]:
        raise ValueError(
            f"got codes {tuple(codes.shape)} and scales {tuple(scale.shape)}, expected {grouped} and {grouped[:2]}: "
            "load with the group_size it was saved with."
        )
    codes = codes.reshape(shape)
    if codes.is_meta or not codes.numel():
        return codes
    if not bool(((scale >= SMALLEST_SCALE) & (scale <= LARGEST_SCALE)).all()):
        raise ValueError("a scale is NaN, infinite, zero or negative, so the file is damaged: copy the folder again.")
    if ours:
        smallest, largest = torch.aminmax(codes.view(grouped), dim=-1)
        # What requantize_ writes fits in every group; a rare exception is left to the arithmetic of other devices.
        fits = (torch.maximum(largest, -smallest) >= LARGEST_CODE - 1) | (scale <= SMALLEST_SCALE)
        if int(smallest.min()) < -LARGEST_CODE or float(fits.float().mean()) < 0.95:
            raise ValueError("the codes do not fit their scales, so the file is damaged: copy the folder again.")
    return codes


def requantize_(
    codes: Tensor,
    scale: Tensor,
    exact: Tensor,
    key: RoundingKey | None,
    *,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """Write changed weights into codes and scales; groups that did not change keep every byte.

    A scale stays where the largest weight of its group still has the code 126 or 127 (or lies between), else it is
    made anew. Every group that this function has written is such a group, so scales cannot drift. With a key the
    expectation of what is written is the exact value.

    Args:
        codes: (rows, columns) int8, overwritten.
        scale: (rows, groups) bfloat16, overwritten.
        exact: (rows, columns) float32, finite, contiguous; used as working space and lost.
        key: from `rounding_key`, or None for rounding to nearest.
        first_row: number of the first row in the whole matrix, on which the noise depends.
        first_column: the same of the first column.
    """
    grouped = exact.view(*scale.shape, -1)
    smallest, largest = torch.aminmax(grouped, dim=-1)
    largest = torch.maximum(largest, -smallest)
    old = scale.float()
    stays = (largest >= (LARGEST_CODE - 1) * old) & (largest <= LARGEST_CODE * old)
    new = torch.where(stays, old, _scale_for(largest))
    scale.copy_(new)
    grouped.div_(new.unsqueeze(-1))
    if key is None:
        exact.round_()
    else:
        stochastic_round_integers_(exact, key, first_row=first_row, first_column=first_column)
    codes.copy_(exact.clamp_(-LARGEST_CODE, LARGEST_CODE))


def write_rows_(
    codes: Tensor,
    scale: Tensor,
    update: Callable[[slice], Tensor],
    step_size: float | Tensor,
    decay: float | Tensor,
    key: RoundingKey | None,
    *,
    usable: Tensor | None = None,
    first_row: int = 0,
    first_column: int = 0,
    lost: Lost | None = None,
) -> None:
    r"""Apply W <- decay W - step_size X to codes and scales, some rows at a time in float32.

    A group without change keeps every byte. With a key E[W] is exact.

    Args:
        codes: (rows, columns) int8, overwritten.
        scale: (rows, groups) bfloat16, overwritten.
        update: takes a slice of rows and returns those of X in float32.
        step_size: factor of X.
        decay: factor of W.
        key: from `rounding_key`, or None for rounding to nearest.
        usable: a flag on the device, where every byte stays unless it is set.
        first_row: number of the first row in the whole matrix, on which the noise depends.
        first_column: the same of the first column.
        lost: takes a slice of rows and what rounding left out of them, in float32.
    """
    rows, columns = codes.shape
    at_once = max(1, _BLOCK // max(columns, 1))
    for first in range(0, rows, at_once):
        part = slice(first, min(first + at_once, rows))
        some, scales = codes[part], scale[part]
        before = None if usable is None else (some.clone(), scales.clone())
        exact = dequantize_matrix(some, scales)
        if isinstance(decay, Tensor) or decay != 1:
            exact.mul_(decay)
        if isinstance(step_size, Tensor):
            exact.addcmul_(update(part), step_size, value=-1)
        else:
            exact.add_(update(part), alpha=-step_size)
        wanted = None if lost is None else exact.clone()
        requantize_(some, scales, exact, key, first_row=first_row + first, first_column=first_column)
        for now, old in zip((some, scales), before or (), strict=False):
            now.copy_(torch.where(usable, now, old))  # type: ignore[arg-type]
        if lost is not None and wanted is not None:
            wanted -= dequantize_matrix(some, scales)
            lost(part, wanted if usable is None else wanted.masked_fill_(~usable, 0))


def _scale_for(largest: Tensor) -> Tensor:
    """Return the smallest bfloat16 values (as float32) with which these magnitudes have codes of at most 127."""
    quantum = largest / LARGEST_CODE
    # A float32 whose lower half is zero is a bfloat16; adding the half's largest value first rounds up.
    rounded_up = quantum.view(torch.int32).add_(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)
    return rounded_up.clamp_(SMALLEST_SCALE, LARGEST_SCALE)

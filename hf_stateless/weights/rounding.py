r"""Stochastic rounding to bfloat16 and to integers.

Plain rounding of a bf16 weight of standard deviation 0.02 delivers 28 % of an update of size 1e-5 and 3 % of one of
size 1e-6; stochastic rounding delivers all of it on average, E[round(x)] = x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import GOLDEN, RoundingKey, index_hash, mix, rounding_noise


def stochastic_round_(
    target: Tensor, source: Tensor, key: RoundingKey, *, scratch: Tensor | None = None, first_row: int = 0
) -> Tensor:
    r"""Write float32 `source` into bfloat16 `target`, up with probability (x - lower) / (upper - lower).

    A value that bfloat16 represents is written unchanged, infinities and the ordinary NaN included.

    Args:
        target: contiguous bfloat16 tensor, overwritten.
        source: contiguous float32 tensor of the same shape; used as working space and lost.
        key: from `rounding_key`.
        scratch: contiguous float32 tensor of the same shape that may be overwritten, to save an allocation.
        first_row: number of the first row in the whole matrix, on which the noise depends.

    Returns:
        `target`.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.noise import rounding_key
        >>> from hf_stateless.weights.rounding import stochastic_round_
        >>> weight = torch.empty(100, 100, dtype=torch.bfloat16)
        >>> third = torch.full((100, 100), 1 + 2**-8 / 3)  # bfloat16 has nothing between 1 and 1 + 2^-7
        >>> _ = stochastic_round_(weight, third, rounding_key(0, 0, torch.ones(1)))
        >>> round(float((weight > 1).float().mean()), 1)
        0.2
    """
    columns = target.shape[-1] if target.ndim > 1 else target.numel()
    if target.numel() == 0:
        return target
    out = None if scratch is None else scratch.view(torch.int32).view(-1, columns)
    noise = rounding_noise(target.numel() // columns, columns, key, row_offset=first_row, out=out)
    bits = source.view(torch.int32).view(-1, columns)
    # A carry out of the lower half moves the magnitude one bfloat16 up; infinities have no lower half to carry from.
    target.view(torch.int16).view(-1, columns).copy_(bits.add_(noise).bitwise_right_shift_(16))
    return target


def round_vectors(values: Tensor, sizes: Sequence[int], keys: Sequence[RoundingKey], offset: int = 0) -> Tensor:
    r"""Round float32 vectors that lie one after the other to bfloat16, in a number of operations that is fixed.

    Each is rounded to what `stochastic_round_` makes of it alone with its key plus the offset.

    Args:
        values: the vectors, flat; lost.
        sizes: their lengths.
        keys: their keys, from `rounding_key`.
        offset: added to the keys.

    Returns:
        The flat bfloat16 values.
    """
    get, device = keys[0].cache.get, values.device
    owner, column_hash = get(places, tuple(sizes), device)
    value = (torch.cat([key.value for key in keys]) + offset)[owner]
    row = mix(get(index_hash, 0, 1, device) ^ value).bitwise_or_(1)
    column = mix(column_hash ^ (value + GOLDEN)).bitwise_or_(1)
    noise = row.mul_(column).bitwise_right_shift_(16).add_(0x8000)
    bits = values.view(torch.int32).add_(noise).bitwise_right_shift_(16)
    return bits.to(torch.int16).view(torch.bfloat16)


def places(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return to which vector each element of a row of vectors belongs, and the hash of its place there."""
    owner = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    return owner.to(device), torch.cat([index_hash(0, size, torch.device("cpu")) for size in sizes]).to(device)


def stochastic_round_integers_(
    values: Tensor, key: RoundingKey, *, first_row: int = 0, first_column: int = 0
) -> Tensor:
    r"""Round float32 values to whole numbers in place, up with probability x - floor(x).

    Whole numbers of magnitude up to 127 stay what they are.

    Args:
        values: (rows, columns) float32; magnitudes above 2^7 lose the last bits of the probability.
        key: from `rounding_key`.
        first_row: number of the first row in the whole matrix, on which the noise depends.
        first_column: the same of the first column.

    Returns:
        `values`.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.noise import rounding_key
        >>> from hf_stateless.weights.rounding import stochastic_round_integers_
        >>> third = stochastic_round_integers_(torch.full((100, 100), 1 / 3), rounding_key(0, 0, torch.ones(1)))
        >>> sorted(set(third.flatten().tolist())), round(float(third.mean()), 1)
        ([0.0, 1.0], 0.3)
    """
    rows, columns = values.shape
    noise = rounding_noise(rows, columns, key, row_offset=first_row, column_offset=first_column)
    # The noise is in the middle of its 65536 steps, so that neither direction is favoured.
    return values.add_(noise.to(values.dtype), alpha=2.0**-16).add_(2.0**-17).floor_()


def write_rounded_(
    target: Tensor, exact: Tensor, key: RoundingKey | None, *, scratch: Tensor | None = None, first_row: int = 0
) -> None:
    """Write the float32 values that were computed from a tensor back into it, rounded as its dtype asks.

    Args:
        target: the tensor, overwritten; bfloat16 stochastically with a key, any other half dtype to nearest.
        exact: its new values; lost if `target` is bfloat16. Nothing is done where it is `target` itself.
        key: from `rounding_key`, or None for rounding to nearest.
        scratch: float32 tensor of the same shape that may be overwritten, to save an allocation.
        first_row: number of the first row in the whole matrix, on which the noise depends.
    """
    if exact.dtype == target.dtype:  # `Tensor.to` and `Tensor.float` return the tensor itself
        return
    if target.dtype != torch.bfloat16 or key is None:
        target.copy_(exact)
        return
    rounded = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
    scratch = scratch if scratch is not None and scratch.is_contiguous() else None
    stochastic_round_(rounded, exact.float().contiguous(), key, scratch=scratch, first_row=first_row)
    if rounded is not target:
        target.copy_(rounded)

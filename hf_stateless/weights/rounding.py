r"""Stochastic rounding to bfloat16 and to integers, with noise that is a function of (seed, parameter, step, element).

Plain rounding of a bf16 weight of standard deviation 0.02 delivers 28 % of an update of size 1e-5 and 3 % of one of
size 1e-6; stochastic rounding delivers all of it on average, E[round(x)] = x. The noise comes from a counter and not
from a generator, so a resumed run repeats it, replicas agree on it, and it is the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


# Odd multipliers of a 32-bit finaliser (https://github.com/skeeto/hash-prospector, lowbias32), as signed integers.
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - (1 << 32)
_GOLDEN = 0x9E3779B9 - (1 << 32)


def _mix(x: Tensor) -> Tensor:
    """Hash int32 values in place; products wrap, shifts are arithmetic."""
    x ^= x >> 16
    x *= _MIX_1
    x ^= x >> 15
    x *= _MIX_2
    x ^= x >> 16
    return x


def _signed(value: int) -> int:
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def _mix_int(x: int) -> int:
    """Do for one Python integer what `_mix` does for a tensor."""
    x = _signed(x)
    x = _signed((x ^ (x >> 16)) * _MIX_1)
    x = _signed((x ^ (x >> 15)) * _MIX_2)
    return x ^ (x >> 16)


@lru_cache(maxsize=256)
def _index_hash(start: int, size: int, device: torch.device) -> Tensor:
    return _mix(torch.arange(start, start + size, dtype=torch.int32, device=device) * _GOLDEN)


def rounding_key(seed: int, index: int, step: Tensor) -> Tensor:
    """Return the int32 key of one parameter in one step, on the device of `step`, without reading it back from a GPU.

    Args:
        seed: the optimizer's seed.
        index: position of the parameter among all parameters of the optimizer.
        step: one-element tensor that counts the steps.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.rounding import rounding_key
        >>> rounding_key(0, 1, torch.ones(1)).dtype
        torch.int32
    """
    first, second = _mix_int(seed * _GOLDEN + 1), _mix_int(index * _GOLDEN + 2)
    if step.device.type == "cpu":
        value = _mix_int(_mix_int(int(step) * _GOLDEN + first) ^ second)
        return torch.tensor([value], dtype=torch.int32)
    return _mix(_mix(step.detach().reshape(1).to(torch.int32) * _GOLDEN + first) ^ second)


def rounding_keys(seeds: Sequence[int], indices: Sequence[int], steps: Sequence[Tensor]) -> list[Tensor]:
    """Return the keys of several parameters; those on one GPU are computed together in a fixed number of launches.

    Args:
        seeds: see `rounding_key`; one for each parameter.
        indices: their positions.
        steps: their one-element counters.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.rounding import rounding_key, rounding_keys
        >>> rounding_keys([0, 0], [1, 2], [torch.ones(1)] * 2)[1] == rounding_key(0, 2, torch.ones(1))
        tensor([True])
    """
    devices = {step.device for step in steps}
    if len(devices) > 1 or next(iter(devices)).type == "cpu":
        return [rounding_key(*one) for one in zip(seeds, indices, steps, strict=True)]
    first, second = _key_constants(tuple(seeds), tuple(indices), steps[0].device)
    counts = torch.cat([step.detach().reshape(1) for step in steps]).to(torch.int32)
    return list(_mix(_mix(counts * _GOLDEN + first) ^ second).unsqueeze(1).unbind())


@lru_cache(maxsize=256)
def _key_constants(seeds: tuple[int, ...], indices: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    first = [_mix_int(seed * _GOLDEN + 1) for seed in seeds]
    second = [_mix_int(index * _GOLDEN + 2) for index in indices]
    constants = torch.tensor([first, second], dtype=torch.int32).to(device)
    return constants[0], constants[1]


def index_hashes(rows: int, columns: int, key: Tensor, row_offset: int = 0) -> tuple[Tensor, Tensor]:
    """Return a random odd int32 number for each row and for each column, of which `rounding_noise` is made.

    Args:
        rows: number of rows.
        columns: number of columns.
        key: from `rounding_key`.
        row_offset: index of the first row in the whole matrix.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.rounding import index_hashes, rounding_key
        >>> row, column = index_hashes(2, 3, rounding_key(0, 0, torch.ones(1)))
        >>> (row % 2).tolist(), (column % 2).tolist()
        ([1, 1], [1, 1, 1])
    """
    parts = _index_hash(row_offset, rows, key.device) ^ key, _index_hash(0, columns, key.device) ^ (key + _GOLDEN)
    row, column = torch.split(_mix(torch.cat(parts)).bitwise_or_(1), [rows, columns])
    return row, column


def rounding_noise(rows: int, columns: int, key: Tensor, *, row_offset: int = 0, out: Tensor | None = None) -> Tensor:
    """Return a (rows, columns) int32 tensor of noise, uniform in [0, 65535].

    Element (i, j) is a hash of (key, row_offset + i, j): shards of a matrix draw what the whole matrix would.

    Args:
        rows: number of rows.
        columns: number of columns.
        key: from `rounding_key`.
        row_offset: index of the first row in the whole matrix.
        out: int32 buffer of that shape.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.rounding import rounding_key, rounding_noise
        >>> noise = rounding_noise(200, 200, rounding_key(0, 0, torch.ones(1)))
        >>> bool(noise.min() >= 0), bool(noise.max() < 65536)
        (True, True)
    """
    row, column = index_hashes(rows, columns, key, row_offset)
    # The product of two random odd numbers mod 2^32 is as good as a third one for a single pass over the matrix; its
    # upper half is the random part, which the arithmetic shift leaves signed.
    noise = torch.mul(row.unsqueeze(1), column, out=out)
    return noise.bitwise_right_shift_(16).add_(0x8000)


def stochastic_round_(
    target: Tensor, source: Tensor, key: Tensor, *, scratch: Tensor | None = None, first_row: int = 0
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
        >>> from hf_stateless.weights.rounding import rounding_key, stochastic_round_
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


def round_vectors(values: Tensor, sizes: Sequence[int], keys: Sequence[Tensor]) -> Tensor:
    r"""Round float32 vectors that lie one after the other to bfloat16, in a number of operations that is fixed.

    Each is rounded to what `stochastic_round_` makes of it alone with its key.

    Args:
        values: the vectors, flat; lost.
        sizes: their lengths.
        keys: their keys, from `rounding_key`.

    Returns:
        The flat bfloat16 values.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.rounding import round_vectors, rounding_key
        >>> keys = [rounding_key(0, index, torch.ones(1)) for index in (0, 1)]
        >>> round_vectors(torch.tensor([1.0, 2.0, 3.0]), [1, 2], keys)
        tensor([1., 2., 3.], dtype=torch.bfloat16)
    """
    owner, column_hash = _places(tuple(sizes), values.device)
    key = torch.cat(tuple(keys))[owner]
    row = _mix(_index_hash(0, 1, values.device) ^ key).bitwise_or_(1)
    column = _mix(column_hash ^ (key + _GOLDEN)).bitwise_or_(1)
    noise = row.mul_(column).bitwise_right_shift_(16).add_(0x8000)
    bits = values.view(torch.int32).add_(noise).bitwise_right_shift_(16)
    return bits.to(torch.int16).view(torch.bfloat16)


@lru_cache(maxsize=16)
def _places(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return to which vector each element of a row of vectors belongs, and the hash of its place there."""
    owner = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    return owner.to(device), torch.cat([_index_hash(0, size, torch.device("cpu")) for size in sizes]).to(device)


def stochastic_round_integers_(values: Tensor, key: Tensor, *, first_row: int = 0) -> Tensor:
    r"""Round float32 values to whole numbers in place, up with probability x - floor(x).

    Whole numbers of magnitude up to 127 stay what they are.

    Args:
        values: (rows, columns) float32; magnitudes above 2^7 lose the last bits of the probability.
        key: from `rounding_key`.
        first_row: number of the first row in the whole matrix, on which the noise depends.

    Returns:
        `values`.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.rounding import rounding_key, stochastic_round_integers_
        >>> third = stochastic_round_integers_(torch.full((100, 100), 1 / 3), rounding_key(0, 0, torch.ones(1)))
        >>> sorted(set(third.flatten().tolist())), round(float(third.mean()), 1)
        ([0.0, 1.0], 0.3)
    """
    noise = rounding_noise(values.shape[0], values.shape[1], key, row_offset=first_row)
    # The noise is in the middle of its 65536 steps, so that neither direction is favoured.
    return values.add_(noise.to(values.dtype), alpha=2.0**-16).add_(2.0**-17).floor_()


def write_rounded_(
    target: Tensor, exact: Tensor, key: Tensor | None, *, scratch: Tensor | None = None, first_row: int = 0
) -> None:
    """Write the float32 values that were computed from a tensor back into it, rounded as its dtype asks.

    Args:
        target: the tensor, overwritten; bfloat16 stochastically with a key, any other half dtype to nearest.
        exact: its new values; lost if `target` is bfloat16. Nothing is done where it is `target` itself.
        key: from `rounding_key`, or None for rounding to nearest.
        scratch: float32 tensor of the same shape that may be overwritten, to save an allocation.
        first_row: number of the first row in the whole matrix, on which the noise depends.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.rounding import write_rounded_
        >>> weight = torch.ones(2, dtype=torch.bfloat16)
        >>> write_rounded_(weight, torch.tensor([1.5, 2.5]), None)
        >>> weight
        tensor([1.5000, 2.5000], dtype=torch.bfloat16)
    """
    if exact.dtype == target.dtype:  # `Tensor.to` and `Tensor.float` return the tensor itself
        return
    if target.dtype != torch.bfloat16 or key is None:
        target.copy_(exact)
        return
    rounded = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
    scratch = scratch if scratch is not None and scratch.is_contiguous() else None
    stochastic_round_(rounded, exact.contiguous(), key, scratch=scratch, first_row=first_row)
    if rounded is not target:
        target.copy_(rounded)

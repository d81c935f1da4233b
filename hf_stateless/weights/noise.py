r"""The noise of stochastic rounding: a function of (seed, parameter, step, element), from a counter and no generator.

So a resumed run repeats it, replicas agree on it, and it is the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor


# Odd multipliers of a 32-bit finaliser (https://github.com/skeeto/hash-prospector, lowbias32), as signed integers.
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - (1 << 32)
GOLDEN = 0x9E3779B9 - (1 << 32)
# Entries of a cache before it starts anew: a model has far fewer shapes.
_CACHED = 512
_T = TypeVar("_T")


def mix(x: Tensor) -> Tensor:
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
    """Do for one Python integer what `mix` does for a tensor."""
    x = _signed(x)
    x = _signed((x ^ (x >> 16)) * _MIX_1)
    x = _signed((x ^ (x >> 15)) * _MIX_2)
    return x ^ (x >> 16)


class TensorCache:
    """Tensors that many steps have in common, such as the hashes of positions for each shape and device.

    An optimizer has one, and hands it on with the keys that it makes.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Any] = {}

    def get(self, make: Callable[..., _T], *args: Any) -> _T:
        """Return `make(*args)`, made once."""
        if (make, args) not in self._made:
            if len(self._made) >= _CACHED:
                self._made.clear()
            self._made[make, args] = make(*args)
        made: _T = self._made[make, args]
        return made


@dataclass(frozen=True)
class RoundingKey:
    """The noise of one parameter in one step: from `rounding_key` or `rounding_keys`."""

    value: Tensor
    """One int32, on the device of the parameter."""
    cache: TensorCache
    """What is shared with other steps."""

    def __add__(self, offset: int) -> RoundingKey:
        """Return the key of further noise of the same parameter and step."""
        return RoundingKey(self.value + offset, self.cache)


def rounding_key(seed: int, index: int, step: Tensor, cache: TensorCache | None = None) -> RoundingKey:
    """Return the key of one parameter in one step, on the device of `step`, without reading it back from a GPU.

    Args:
        seed: the optimizer's seed.
        index: position of the parameter among all parameters of the optimizer.
        step: one-element tensor that counts the steps.
        cache: of the optimizer; a new one when None.
    """
    return rounding_keys([seed], [index], [step], cache)[0]


def rounding_keys(
    seeds: Sequence[int], indices: Sequence[int], steps: Sequence[Tensor], cache: TensorCache | None = None
) -> list[RoundingKey]:
    """Return the keys of several parameters; those on one GPU are computed together in a fixed number of launches."""
    cache = cache or TensorCache()
    devices = {step.device for step in steps}
    # The constants of one alone are no tensor: for each parameter one would be copied from the host at its first step.
    if len(steps) == 1 or len(devices) > 1 or next(iter(devices)).type == "cpu":
        values = [_key_value(*one) for one in zip(seeds, indices, steps, strict=True)]
    else:
        first, second = cache.get(_key_constants, tuple(seeds), tuple(indices), steps[0].device)
        counts = torch.cat([step.detach().reshape(1) for step in steps]).to(torch.int32)
        values = list(mix(mix(counts * GOLDEN + first) ^ second).unsqueeze(1).unbind())
    return [RoundingKey(value, cache) for value in values]


def _key_value(seed: int, index: int, step: Tensor) -> Tensor:
    first, second = _mix_int(seed * GOLDEN + 1), _mix_int(index * GOLDEN + 2)
    if step.device.type == "cpu":
        return torch.tensor([_mix_int(_mix_int(int(step) * GOLDEN + first) ^ second)], dtype=torch.int32)
    return mix(mix(step.detach().reshape(1).to(torch.int32) * GOLDEN + first) ^ second)


def _key_constants(seeds: tuple[int, ...], indices: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    first = [_mix_int(seed * GOLDEN + 1) for seed in seeds]
    second = [_mix_int(index * GOLDEN + 2) for index in indices]
    constants = torch.tensor([first, second], dtype=torch.int32).to(device)
    return constants[0], constants[1]


def index_hash(start: int, size: int, device: torch.device) -> Tensor:
    """Hash the numbers of some rows or columns."""
    return mix(torch.arange(start, start + size, dtype=torch.int32, device=device) * GOLDEN)


def index_hashes(
    rows: int, columns: int, key: RoundingKey, row_offset: int = 0, column_offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Return a random odd int32 number for each row and for each column, of which `rounding_noise` is made."""
    value, device, get = key.value, key.value.device, key.cache.get
    of_rows = get(index_hash, row_offset, rows, device) ^ value
    of_columns = get(index_hash, column_offset, columns, device) ^ (value + GOLDEN)
    row, column = torch.split(mix(torch.cat((of_rows, of_columns))).bitwise_or_(1), [rows, columns])
    return row, column


def rounding_noise(
    rows: int,
    columns: int,
    key: RoundingKey,
    *,
    row_offset: int = 0,
    column_offset: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Return a (rows, columns) int32 tensor of noise, uniform in [0, 65535].

    Element (i, j) is a hash of (key, row_offset + i, column_offset + j): parts of a matrix draw what the whole would.

    Args:
        rows: number of rows.
        columns: number of columns.
        key: from `rounding_key`.
        row_offset: index of the first row in the whole matrix.
        column_offset: the same of the first column.
        out: int32 buffer of that shape.
    """
    row, column = index_hashes(rows, columns, key, row_offset, column_offset)
    # The product of two random odd numbers mod 2^32 is as good as a third one for a single pass over the matrix; its
    # upper half is the random part, which the arithmetic shift leaves signed.
    noise = torch.mul(row.unsqueeze(1), column, out=out)
    return noise.bitwise_right_shift_(16).add_(0x8000)

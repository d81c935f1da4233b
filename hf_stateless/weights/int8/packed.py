"""Codes as `compressed-tensors` packs them: four to an int32, 128 more than they are, the first in the lowest byte."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


PER_WORD = 4
_SIGNS = -0x7F7F7F80
"""The int32 of bytes 0x80: it turns codes into codes + 128 without a sign, and back."""


def words(columns: int) -> int:
    """Return how many int32 a row takes."""
    return math.ceil(columns / PER_WORD)


def pack(codes: Tensor) -> Tensor:
    """Return int8 codes as int32, in memory of their own.

    Args:
        codes: (rows, columns) int8; a row that is no multiple of 4 is filled up with zero bytes.

    Returns:
        (rows, ceil(columns / 4)) int32.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.int8.packed import pack
        >>> [hex(word) for word in pack(torch.tensor([[-127, 0, 1, -128]], dtype=torch.int8))[0]]
        ['0x818001']
    """
    missing = -codes.shape[1] % PER_WORD
    if missing:
        codes = functional.pad(codes, (0, missing), value=-128)
    return codes.contiguous().view(torch.int32).bitwise_xor(_SIGNS)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Return the int8 codes that were packed, in memory of their own.

    Args:
        packed: (rows, ceil(columns / 4)) int32.
        columns: of the codes.

    Raises:
        ValueError: another dtype or shape.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.int8.packed import pack, unpack
        >>> unpack(pack(torch.tensor([[-127, 0, 1, 127, 5]], dtype=torch.int8)), 5)
        tensor([[-127,    0,    1,  127,    5]], dtype=torch.int8)
    """
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != words(columns):
        raise ValueError(
            f"got weight_packed {tuple(packed.shape)} of {packed.dtype}, expected int32 and {words(columns)} columns."
        )
    return packed.contiguous().bitwise_xor(_SIGNS).view(torch.int8)[:, :columns].contiguous()

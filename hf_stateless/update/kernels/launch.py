"""Starting kernels: names of dtypes, tables of addresses, and the one place through which every launch goes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..reads import is_capturing


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of the weights and gradients that kernels read and write."""
# Addresses that one launch writes, and tables that are kept: layer-wise each matrix has two, one for its gradient.
_AT_ONCE, _TABLES = 16, 2048


def start(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Launch a kernel on a line of programs.

    Args:
        kernel: a Triton kernel.
        programs: how many; nothing is launched for none.
        args: of the kernel.
        options: its constants, and those of Triton.
    """
    if programs:
        # Without contraction to multiply-adds the arithmetic is that of the torch twin on CPU.
        kernel[(programs,)](*args, **options, enable_fp_fusion=False)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which Triton launches on the device of a tensor."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def element(dtype: torch.dtype) -> Any:
    """Return Triton's name of a dtype."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def pointer_table(tensors: Sequence[Tensor]) -> Tensor:
    """Return the addresses of tensors as int64 on their device, without a copy from the host.

    Weights stay where they are, and an allocator gives gradients the same places step after step: tables of before
    serve again. A graph that is captured gets its own, which lives as long as it does.
    """
    addresses, device = tuple(tensor.data_ptr() for tensor in tensors), tensors[0].device
    return _written(addresses, device) if is_capturing() else _table(addresses, device)


def _written(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    from .triton_arithmetic import write_pointers

    addresses += addresses[-1:] * (-len(addresses) % _AT_ONCE)
    table = torch.empty(len(addresses), dtype=torch.int64, device=device)
    for first in range(0, len(addresses), _AT_ONCE):
        start(write_pointers, 1, table[first:], *addresses[first : first + _AT_ONCE], num_warps=1)
    return table


_table = lru_cache(_TABLES)(_written)


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Tell whether all tensors start where a GPU can load sixteen bytes at once."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def power_of_two(size: int, limit: int) -> int:
    """Return the smallest power of two of at least `size`, at most `limit`.

    Example:
        >>> from hf_stateless.update.kernels.launch import power_of_two
        >>> power_of_two(5, 64), power_of_two(500, 64)
        (8, 64)
    """
    return min(1 << (size - 1).bit_length(), limit)

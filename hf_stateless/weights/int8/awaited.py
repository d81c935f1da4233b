"""Room for the 8-bit weights of a module that `from_pretrained` is about to read, and what it has read taken over."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .codes import stored_length
from .holder import Int8Holder, checked_held, codes_name, mix, put, scale_name
from .parallel import adopt_part


def expect(module: nn.Module, name: str, group_size: int | None, *, in_parts: bool = False) -> tuple[str, str]:
    """Make room, without memory, for what a file names, until `adopt`.

    Args:
        module: that computes with the weight.
        name: of the weight there.
        group_size: see `stored_length`.
        in_parts: the room may be cut over ranks, so that it has the dimensions of the weight.

    Returns:
        The names of codes and scales there.
    """
    weight = module._parameters[name]
    assert weight is not None
    holder: nn.Module = mix(module, Int8Holder)
    assert isinstance(holder, Int8Holder)
    shape, length = weight.shape, stored_length(weight.shape[-1], group_size)
    grouped = (*shape[:-1], shape[-1] // length)
    # What a model initialises in every module, before it is known that a file held it: already done, no memory.
    holder.__dict__[name] = stand_in = torch.empty(shape, dtype=weight.dtype, device="meta")
    stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
    holder._parameters[name] = None  # keeps its place
    of_codes = shape if in_parts else (*grouped, length)
    rooms = {codes_name(name): (of_codes, torch.int8), scale_name(name): (grouped, torch.bfloat16)}
    for part, (size, dtype) in rooms.items():
        room = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)
        holder._parameters[part] = room
    holder.awaited_in_8_bits = (*holder.awaited_in_8_bits, name)
    return codes_name(name), scale_name(name)


def adopt(module: nn.Module, name: str) -> bool:
    """Take over what `from_pretrained` has read for a weight; False if it found nothing.

    Raises:
        ValueError: codes or scales are missing or damaged.
    """
    assert isinstance(module, Int8Holder)
    like = module.__dict__.pop(name)
    codes, scale = module._parameters.pop(codes_name(name)), module._parameters[scale_name(name)]
    assert codes is not None
    assert scale is not None
    module.awaited_in_8_bits = tuple(other for other in module.awaited_in_8_bits if other != name)
    read = [getattr(tensor, "_is_hf_initialized", False) for tensor in (codes, scale)]
    if any(read) and not all(read):
        raise ValueError(f"only its {'codes' if read[0] else 'scales'} are there.")
    if isinstance(scale, DTensor):
        adopt_part(module, name, codes, scale, like.shape, like.dtype)
        return all(read)
    if codes.numel() != like.numel():  # as older versions of transformers only report afterwards
        raise ValueError(f"got codes {tuple(codes.shape)}, expected those of {tuple(like.shape)}: save it again.")
    shown = put(module, name, codes.detach().view(like.shape), scale.detach(), like.dtype, True)
    if all(read):
        checked_held(codes.detach(), scale.detach(), shown)
    return all(read)


def is_expected(module: nn.Module, name: str) -> bool:
    """Tell whether `expect` has made room for a weight."""
    return isinstance(module, Int8Holder) and name in module.awaited_in_8_bits

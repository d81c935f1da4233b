"""What a module with 8-bit weights does while FSDP2 holds its parameters: state dicts, loading and moving.

A module of them says by `name_of_scale` where it has the scales of a weight; a head that is tied has none of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .codes import checked_codes
from .sharded import Int8Shard, local_of, shard_of


def codes_of(weight: Tensor) -> DTensor:
    """Return the codes of a weight as state dicts hold them, (..., rows, groups, length), cut as the weight is."""
    shard = shard_of(weight)
    assert shard is not None
    assert isinstance(weight, DTensor)
    shape, local = (
        (*rows, columns // shard.place.length, shard.place.length)
        for *rows, columns in (weight.shape, shard.codes.shape)
    )
    return cut_as(weight, shard.codes.view(local), shape)


def load_sharded(module: nn.Module, name: str, weight: Tensor, scale: Tensor | None, *, ours: bool = True) -> None:
    """Take over codes and scales that are cut over ranks as those of a module are.

    Args:
        module: that holds the weight.
        name: of the weight there.
        weight: its codes.
        scale: its scales; None where the module that it is tied to has them, and is loaded first.
        ours: see `checked_codes`.

    Raises:
        ValueError: they are whole, or damaged.
    """
    shard = shard_of(module._parameters[name])
    assert shard is not None
    if _moved(module, name, shard) or (scale is None and not isinstance(weight, DTensor)):
        return
    if not (isinstance(weight, DTensor) and isinstance(scale, DTensor | None)):
        raise ValueError(
            "got whole weights for a model that is cut over ranks: load them by set_model_state_dict(..., "
            "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict."
        )
    local = local_of(weight)
    codes = local.codes if isinstance(local, Int8Shard) else local
    if scale is None:
        shard.codes.copy_(codes.reshape(shard.shape))
        return
    of_scales, columns = local_of(scale), shard.shape[-1]
    rows, length = shard.shape[:-1].numel(), shard.place.length
    grouped = (*shard.shape[:-1], columns // length)
    if codes.shape not in ((*grouped, length), shard.shape) or of_scales.shape != grouped:
        raise ValueError(
            f"got codes {tuple(codes.shape)} and scales {tuple(of_scales.shape)} on this rank, expected "
            f"{(*grouped, length)} and {grouped}: load with the group_size it was saved with."
        )
    flat = codes.reshape(rows, columns), of_scales.reshape(rows, grouped[-1])
    codes = checked_codes(*flat, (rows, columns), length, ours=ours).view(shard.shape)
    if shard.is_meta:
        _replace(module, name, codes, of_scales)
    else:  # where both are the same memory, nothing changes
        shard.codes.copy_(codes)
        local_of(_scales(module, name)).copy_(of_scales)


def move_sharded(module: nn.Module, name: str, fn: Callable[[Tensor], Tensor]) -> None:
    """Do to codes and scales what `nn.Module._apply` does to parameters; they are moved and never cast."""
    shard = shard_of(module._parameters[name])
    assert shard is not None
    device = fn(torch.empty(0, device=shard.device)).device
    if _moved(module, name, shard) or device == shard.device:
        return
    scales = _scales(module, name)
    _replace(module, name, fn(shard.codes).to(torch.int8), fn(local_of(scales)).to(scales.dtype))


def _scales(module: Any, name: str) -> DTensor:
    scales = module._parameters[module.name_of_scale(name)]
    assert isinstance(scales, DTensor)
    return scales


def _moved(module: nn.Module, name: str, shard: Int8Shard) -> bool:
    """Give a module what has replaced its weight in another one that it is tied to; tell whether there is such."""
    if shard.place.moved_to is not None:
        module._parameters[name] = shard.place.moved_to
    return shard.place.moved_to is not None


def _replace(module: Any, name: str, codes: Tensor, scale: Tensor) -> None:
    """Put other codes and scales of this rank in the place of those that a module has."""
    param, scales = module._parameters[name], _scales(module, name)
    shard = shard_of(param)
    assert shard is not None
    weight = cut_as(param, Int8Shard(codes, replace(shard.place, scale=None), shard.dtype), param.shape)
    shard.place.moved_to = module._parameters[name] = nn.Parameter(weight, param.requires_grad)
    beside = nn.Parameter(cut_as(scales, scale, scales.shape), requires_grad=False)
    module._parameters[module.name_of_scale(name)] = beside


def cut_as(param: DTensor, local: Tensor, shape: Any) -> DTensor:
    """Return a tensor of some shape of which this rank holds a part, cut in the dimensions of a parameter."""
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )

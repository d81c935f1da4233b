"""What a linear layer in 8 bits does while FSDP2 holds its parameters: state dicts, loading and moving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .codes import checked_codes
from .sharded import Int8Shard


def shard_of(weight: Tensor | None) -> Int8Shard | None:
    """Return what this rank holds of an 8-bit weight, or None where that is not cut over ranks."""
    local = local_of(weight) if isinstance(weight, DTensor) else None
    return local if isinstance(local, Int8Shard) else None


@torch.no_grad()
def local_of(tensor: DTensor) -> Tensor:
    """Return what this rank holds of a tensor, the object itself."""
    local: Tensor = tensor.to_local()
    return local


def codes_of(weight: Tensor, groups: int) -> DTensor:
    """Return the codes of a weight as state dicts hold them, (rows, groups, length), cut as the weight is."""
    shard = shard_of(weight)
    assert shard is not None
    assert isinstance(weight, DTensor)
    rows, columns = weight.shape
    shape = (rows, groups, columns // groups)
    codes = shard.codes.view(-1, *shape[1:])
    return _cut_as(weight, codes, shape)


def load_sharded(layer: nn.Module, weight: Tensor, scale: Tensor | None) -> None:
    """Take over codes and scales that are cut over ranks as those of a layer are.

    Raises:
        ValueError: they are whole, or damaged.
    """
    param, scales = layer._parameters["weight"], layer._parameters["weight_scale"]
    if not (isinstance(weight, DTensor) and isinstance(scale, DTensor)):
        raise ValueError(
            "got whole weights for a model that is cut over ranks: load them by set_model_state_dict(..., "
            "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict."
        )
    shard = shard_of(param)
    assert shard is not None
    assert isinstance(param, DTensor)
    assert isinstance(scales, DTensor)
    local, of_scales = local_of(weight), local_of(scale)
    shape = (len(shard), shard.shape[1])
    length = shape[1] // scales.shape[1]
    codes = local.codes if isinstance(local, Int8Shard) else local
    codes = checked_codes(codes, of_scales, shape, length, ours=layer.ours)  # type: ignore[arg-type]
    if shard.is_meta:
        _replace(layer, codes, of_scales)
    else:  # where both are the same memory, nothing changes
        shard.codes.copy_(codes)
        local_of(scales).copy_(of_scales)


def move_sharded(layer: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Do to codes and scales what `nn.Module._apply` does to parameters; they are moved and never cast."""
    shard, scales = shard_of(layer._parameters["weight"]), layer._parameters["weight_scale"]
    assert shard is not None
    assert isinstance(scales, DTensor)
    device = fn(torch.empty(0, device=shard.device)).device
    if device == shard.device:
        return
    codes, scale = fn(shard.codes), fn(local_of(scales))
    _replace(layer, codes.to(torch.int8), scale.to(scales.dtype))


def _replace(layer: nn.Module, codes: Tensor, scale: Tensor) -> None:
    """Put other codes and scales of this rank in the place of those that a layer has."""
    param, scales = layer._parameters["weight"], layer._parameters["weight_scale"]
    shard = shard_of(param)
    assert shard is not None
    assert isinstance(param, DTensor)
    assert isinstance(scales, DTensor)
    weight = _cut_as(param, Int8Shard(codes, shard.place, shard.dtype), param.shape)
    layer._parameters["weight"] = nn.Parameter(weight, param.requires_grad)
    layer._parameters["weight_scale"] = nn.Parameter(_cut_as(scales, scale, scales.shape), requires_grad=False)


def _cut_as(param: DTensor, local: Tensor, shape: Any) -> DTensor:
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )

"""8-bit weights that transformers cuts by tensor and expert parallelism while it loads them.

`from_pretrained(..., tp_plan="auto")` puts DTensors without memory in the places of the parameters that its plan cuts,
has every rank read its own part of them, and hooks the forward of their modules, which then compute with the parts. So
modules that hold 8-bit weights have to be in the model before it is cut, and parts are made as they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..cuts import runs_of
from ..plans import in_plan, style_of
from .codes import COMMON_LENGTHS, checked_codes, quantize_stack, stored_length
from .sharded import Int8Shard, Place, local_of
from .sharded_layer import cut_as


_SIZES = ("tp_size", "fsdp_size", "dp_replicate_size", "pp_size", "ep_size")
_SHARD = "and shard by accelerate launch with fsdp_version: 2, or by fully_shard."
_IN_FLOAT = "add its module to modules_to_not_convert of Int8TrainingConfig."
_INSTEAD = {
    "fsdp_size": f"leave fsdp_size out, {_SHARD}",
    "dp_replicate_size": f"leave dp_replicate_size out, {_SHARD}",
    "pp_size": "leave pp_size out.",
}


def is_loaded_in_parts(model: PreTrainedModel) -> bool:
    """Tell whether transformers cuts a model over ranks while it loads it."""
    return any(size > 1 for size in _sizes(model).values())


def check_plan(model: PreTrainedModel) -> None:
    """Refuse ways of cutting a model, without weights yet, in which its 8-bit weights cannot be trained.

    Raises:
        ValueError: with what to type.
    """
    sizes = _sizes(model)
    config = getattr(model.config, "distributed_config", None)
    if getattr(config, "enable_expert_parallel", False) and not hasattr(config, "ep_size"):
        raise ValueError(
            "this transformers cuts experts in a way that is not known for weights in 8 bits: type pip install -U "
            "'transformers>=5.24', and ep_size in place of enable_expert_parallel."
        )
    for name, instead in _INSTEAD.items():
        if sizes[name] > 1:
            raise ValueError(
                f"got DistributedConfig({name}={sizes[name]}) for weights in 8 bits, which transformers can cut by "
                f"tp_size and ep_size alone: {instead}"
            )


def cut_like(model: PreTrainedModel, name: str, parts: Sequence[str]) -> None:
    """Have transformers cut what is read for a weight as its plans cut the weight.

    Args:
        model: that it has not cut yet.
        name: of the parameter.
        parts: names of the parameters that are in its place until they are read.
    """
    config = getattr(model.config, "distributed_config", None)
    for kind in ("tp_plan", "ep_plan"):
        plan, own = getattr(model, kind, None) or {}, getattr(config, kind, None)
        style = style_of(name, {**plan, **(own if isinstance(own, dict) else {})})
        if style is not None:
            plan.update({in_plan(part): style for part in parts})


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    config = getattr(model.config, "distributed_config", None)
    return {name: getattr(config, name, None) or 1 for name in _SIZES}


def quantize_part(param: DTensor, weight: Tensor, group_size: int | None) -> Tensor:
    """Return this rank's part of a weight in 8 bits, as what transformers puts into the DTensor.

    Where the cut goes through groups the part stays as it is, for `whole_groups` to tell it.

    Args:
        param: in the place of the weight.
        weight: this rank's part of it, in float.
        group_size: see `stored_length`.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    length = stored_length(param.shape[-1], group_size)
    if weight.shape[-1] % length:
        return weight
    codes, scale = quantize_stack(weight, length)
    return Int8Shard(codes, Place(length=length, scale=scale), weight.dtype)


def cut_parameters(
    like: DTensor, shape: Sequence[int], codes: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Return the parameters of codes and scales of which this rank has a part.

    Args:
        like: cut as they are, of as many dimensions.
        shape: of the whole weight, (..., rows, columns).
        codes: this rank's part of it.
        scale: the same of its scales, (..., rows, groups).
        dtype: what the weight counts as.
    """
    length = codes.shape[-1] // max(1, scale.shape[-1])
    place = place_of(like, shape, length)
    place.scale = scale
    weight = cut_as(like, Int8Shard(codes, place, dtype), shape)
    groups = cut_as(like, scale, (*shape[:-1], shape[-1] // length))
    return nn.Parameter(weight), nn.Parameter(groups, requires_grad=False)


def adopt_part(
    module: Any,
    name: str,
    codes: Tensor,
    scale: DTensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    ours: Callable[[Tensor, Tensor, tuple[int, int]], tuple[Tensor, Tensor]] | None = None,
    *,
    read_as: int = 1,
) -> None:
    """Give a module this rank's part of a weight, of which codes and scales were read.

    Args:
        module: an `Int8Linear` or `Int8Holder`.
        name: of the weight there.
        codes: a DTensor as it was read.
        scale: the same, (..., rows, groups).
        shape: of the whole weight.
        dtype: what the weight counts as.
        ours: takes what this rank has of both, and of the weight as a matrix the shape, and returns them as they are
            stored; `checked_codes` by default.
        read_as: see `whole_groups`.

    Raises:
        ValueError: the cut goes through groups, or codes and scales are damaged.
    """
    length = shape[-1] // scale.shape[-1]
    whole_groups(scale, shape[-1], length, read_as=read_as)
    scales, part = local_of(scale), local_of(codes) if isinstance(codes, DTensor) else codes
    *matrices, groups = scales.shape
    flat, size = scales.reshape(-1, groups), (scales.shape[:-1].numel(), groups * length)
    if ours is None:
        part = checked_codes(part.reshape(size), flat, size, length)
    else:
        part, flat = ours(part, flat, size)
    both = cut_parameters(scale, shape, part.view(*matrices, size[1]), flat.view(scales.shape), dtype)
    module._parameters[name], module._parameters[module.name_of_scale(name)] = both


def store_part(module: Any, name: str, group_size: int | None) -> None:
    """Give a module this rank's part of a weight, which was read by `quantize_part` or is still in float.

    Nothing is done where the weight is whole, or where the scales are there already.

    Args:
        module: an `Int8Linear` or `Int8Holder`, or any other with a whole weight.
        name: of the weight there.
        group_size: see `stored_length`.

    Raises:
        ValueError: the cut goes through groups, or a weight is NaN or infinite.
    """
    weight = module._parameters[name]
    if not isinstance(weight, DTensor) or module._parameters.get(beside := module.name_of_scale(name)) is not None:
        return
    length = stored_length(weight.shape[-1], group_size)
    whole_groups(weight, weight.shape[-1], length)
    local = local_of(weight)
    codes, scale = local.stored if isinstance(local, Int8Shard) else quantize_stack(local, length)
    both = cut_parameters(weight, weight.shape, codes, scale, weight.dtype)
    module._parameters[name], module._parameters[beside] = both


def whole_groups(like: DTensor, columns: int, length: int, *, read_as: int = 0) -> None:
    """Refuse a cut that goes through groups of weights which share a scale.

    Args:
        like: cut as the weight is.
        columns: of the weight.
        length: how many weights share a scale.
        read_as: how many codes are one number in the file that has them; 0 for a weight that is read in float.

    Raises:
        ValueError: it does.
    """
    for mesh_dim, pieces in _cuts(like, like.ndim - 1):
        ranks = like.device_mesh.size(mesh_dim)
        part = -(-columns // ranks)
        if pieces == 1 and part % length == 0 and part % max(1, read_as) == 0:
            continue
        cut = f"{ranks} ranks would have {part} of the {columns} columns each, and {length} weights share a scale: "
        divisors = [size for size in range(min(length, part), 0, -1) if math.gcd(part, columns) % size == 0]
        fits = next((size for size in divisors if size in COMMON_LENGTHS), divisors[0])
        if pieces > 1:
            raise ValueError(f"{pieces} matrices lie side by side in it, and each is cut: {_IN_FLOAT}")
        if read_as:
            raise ValueError(cut + "load it on another number of ranks, or hf-stateless export it and begin anew.")
        raise ValueError(cut + f"type Int8TrainingConfig(group_size={fits}), or take another number of ranks.")


def place_of(like: DTensor, shape: Sequence[int], length: int) -> Place:
    """Return where this rank's part of a weight lies.

    Args:
        like: cut as the weight is.
        shape: of the whole weight.
        length: how many weights share a scale.
    """
    place = Place(length=length)
    for dim, size in enumerate(shape):
        for mesh_dim, pieces in _cuts(like, dim):
            runs = runs_of(size, pieces, like.device_mesh.size(mesh_dim), like.device_mesh.get_local_rank(mesh_dim))
            if dim == len(shape) - 1:
                place.first_column = runs[0][0]
            elif dim == 0 and pieces == 1:
                place.first = runs[0][0]
            else:
                place.runs = runs
    return place


def _cuts(like: DTensor, dim: int) -> list[tuple[int, int]]:
    """Return the mesh dimensions that cut a dimension, and how many tensors lie packed in it."""
    mesh = like.device_mesh
    return [
        (i, getattr(one, "split_factor", 1))
        for i, one in enumerate(like.placements)
        if not one.is_replicate() and mesh.size(i) > 1 and one.dim % like.ndim == dim  # type: ignore[attr-defined]
    ]

"""8-bit weights that transformers cuts by tensor and expert parallelism while it loads them.

`from_pretrained(..., tp_plan="auto")` puts DTensors without memory in the places of the parameters that its plan cuts,
has every rank read its own part of them, and hooks the forward of their modules, which then compute with the parts. So
modules that hold 8-bit weights have to be in the model before it is cut, and parts are made as they are read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .codes import COMMON_LENGTHS, quantize_stack, stored_length
from .packed import PER_WORD
from .sharded import Int8Shard, Place
from .sharded_layer import cut_as


_SIZES = ("tp_size", "fsdp_size", "dp_replicate_size", "pp_size", "ep_size")
_SHARD = "and shard by accelerate launch with fsdp_version: 2, or by fully_shard."
_INSTEAD = {
    "fsdp_size": f"leave fsdp_size out, {_SHARD}",
    "dp_replicate_size": f"leave dp_replicate_size out, {_SHARD}",
    "pp_size": "leave pp_size out.",
    "ep_size": "leave ep_size out, or quantization_config.",
}


def is_loaded_in_parts(model: PreTrainedModel) -> bool:
    """Tell whether transformers cuts a model over ranks while it loads it."""
    return any(size > 1 for size in _sizes(model).values())


def check_plan(model: PreTrainedModel, stacks: Collection[str], tables: Collection[str]) -> None:
    """Refuse what cannot be trained in 8 bits in the way in which transformers shall cut a model.

    Args:
        model: without weights yet.
        stacks: names of the parameters in modules that compute with them by themselves.
        tables: names of the embedding and the head that shall be in 8 bits.

    Raises:
        ValueError: it cannot.
    """
    sizes = _sizes(model)
    for name, instead in _INSTEAD.items():
        if sizes[name] > 1:
            raise ValueError(
                f"got DistributedConfig({name}={sizes[name]}) for weights in 8 bits, which transformers can cut by "
                f"tp_size alone: {instead}"
            )
    if sizes["tp_size"] > 1 and (stacks or tables):
        name = min([*stacks, *tables])
        fix = "leave embeddings=True out" if tables else f"add modules_to_not_convert={[_owner(name)]}"
        raise ValueError(f"tensor parallelism cannot cut {name} in 8 bits: {fix} of Int8TrainingConfig.")


def _owner(name: str) -> str:
    return name.split(".")[-2]


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


def whole_groups(like: DTensor, columns: int, length: int, *, packed: bool = False) -> None:
    """Refuse a cut that goes through groups of weights which share a scale.

    Args:
        like: cut as the weight is.
        columns: of the weight.
        length: how many weights share a scale.
        packed: a file has four codes in one number, and says what shares a scale.

    Raises:
        ValueError: it does.
    """
    for mesh_dim, pieces in _cuts(like, like.ndim - 1):
        ranks = like.device_mesh.size(mesh_dim)
        part = -(-columns // ranks)
        if pieces == 1 and part % length == 0 and not (packed and part % PER_WORD):
            continue
        cut = f"{ranks} ranks would have {part} of the {columns} columns each, and {length} weights share a scale: "
        divisors = [size for size in range(min(length, part), 0, -1) if math.gcd(part, columns) % size == 0]
        fits = next((size for size in divisors if size in COMMON_LENGTHS), divisors[0])
        if packed or pieces > 1:
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
            runs = _runs(size, pieces, like.device_mesh.size(mesh_dim), like.device_mesh.get_local_rank(mesh_dim))
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


def _runs(size: int, pieces: int, ranks: int, rank: int) -> tuple[tuple[int, int], ...]:
    """Return where the part of a rank begins in each of the pieces of a dimension, and how much of it that is."""
    piece, runs = -(-size // pieces), []
    for start in range(0, size, piece):
        length = min(piece, size - start)
        chunk = -(-length // ranks)
        first = min(rank * chunk, length)
        runs.append((start + first, min(chunk, length - first)))
    return tuple(runs)

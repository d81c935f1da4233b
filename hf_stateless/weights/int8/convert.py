"""Models to 8 bits and back, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from .checks import refuse_to_float
from .holder import Int8Holder, held_scales, hold, release
from .kinds import computed_by_modules, routers
from .linear import Int8Linear, sizes_of
from .packed import pack
from .sharded import shard_of
from .weight import Int8Weight


def layers_to_quantize(model: nn.Module, left_out: Sequence[str] | None, *, with_routers: bool = False) -> list[str]:
    """Return the names of the linear layers that are stored in 8 bits: those of the backbone.

    Args:
        model: a transformers model, whose heads stay in float; or any other module.
        left_out: names, prefixes, suffixes or regular expressions of modules that stay in float, as tied layers do.
        with_routers: take what chooses among experts too, where it is a linear layer.

    Raises:
        ValueError: there is none.
    """
    stays, backbone = _stays_float(model, left_out)
    inside = {id(m) for m in backbone.modules() if isinstance(m, Int8Linear) or _is_matrix(m)}
    if not with_routers:
        inside -= routers(model)
    names = [name for name, m in model.named_modules() if id(m) in inside and should_convert_module(name, stays)]
    if not names:
        # Programs that do not know the format stop at the shape of a linear layer; experts they would make anew.
        raise ValueError(
            f"{type(model).__name__} has no linear layer that could be stored in 8 bits beside those of "
            f"modules_to_not_convert={sorted(stays)}, and experts alone are not: leave out fewer, or load the model "
            "without quantization_config."
        )
    return names


def stacks_to_quantize(model: nn.Module, left_out: Sequence[str] | None) -> list[str]:
    """Return the names of the parameters that are stored in 8 bits in a module which computes with them by itself.

    Stacks of experts, and the projections of `nn.MultiheadAttention`.

    Args:
        model: as for `layers_to_quantize`.
        left_out: the same; may name single parameters too.
    """
    stays, backbone = _stays_float(model, left_out)
    inside = {id(m) for m in backbone.modules()}
    return [
        f"{path}.{name}".lstrip(".")
        for path, module, name in computed_by_modules(model)
        if id(module) in inside
        and should_convert_module(path, stays)
        and should_convert_module(f"{path}.{name}", stays)
    ]


def _stays_float(model: nn.Module, left_out: Sequence[str] | None) -> tuple[list[str], nn.Module]:
    """Return the names of what stays in float, and what the rest of the model is in."""
    if not isinstance(model, PreTrainedModel):
        return list(left_out or ()), model
    return HfQuantizer.get_modules_to_not_convert(
        model, list(left_out or ()), add_default_skips=True
    ), model.base_model


def _is_matrix(module: nn.Module) -> bool:
    """Tell whether a layer is one to store in 8 bits: a gate of one output has nothing to save and trains in float."""
    return type(module) in (nn.Linear, Conv1D) and sizes_of(module)[1] > 1


def quantize_layer(model: nn.Module, name: str, group_size: int | None) -> Int8Linear:
    """Put an 8-bit layer in the place of a linear layer; nothing is done where it is there already.

    Raises:
        ValueError: a weight is NaN or infinite, with the name of the layer.
    """
    layer = model.get_submodule(name)
    try:
        if not isinstance(layer, Int8Linear):
            layer = Int8Linear.from_float(layer, group_size)  # type: ignore[arg-type]
            model.set_submodule(name, layer)
        elif layer.is_awaited:
            layer.adopt()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return layer


def quantize_stack_of(model: nn.Module, name: str, group_size: int | None) -> nn.Parameter:
    """Store a weight in 8 bits in the module that computes with it; nothing is done where it is stored so already.

    Raises:
        ValueError: a weight is NaN or infinite, with its name.
    """
    path, _, own = name.rpartition(".")
    try:
        return hold(model.get_submodule(path), own, group_size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def int8_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the names of the parameters that are stored in 8 bits, whole or cut over ranks, and the parameters."""
    for name, p in model.named_parameters():
        if isinstance(p, Int8Weight) or shard_of(p) is not None:
            yield name, p


def int8_layers(model: nn.Module) -> Iterator[tuple[str, Int8Linear]]:
    """Yield the names and layers that are stored in 8 bits."""
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            yield name, module


def without_scales(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a model but for the scales of its 8-bit weights, which FSDP2 makes plain parameters."""
    scales = {id(layer.weight_scale) for _, layer in int8_layers(model)}
    scales |= {id(scale) for module in model.modules() for scale in held_scales(module)}
    yield from (p for p in model.parameters() if id(p) not in scales)


def to_float(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put float weights in the place of 8-bit ones, and cast the rest to the same dtype."""
    for _, weight in int8_weights(model):
        refuse_to_float(weight)
    for name, layer in list(int8_layers(model)):
        model.set_submodule(name, layer.to_float(dtype))
        around = model.get_submodule(name.rpartition(".")[0])
        if layer.from_conv1d and hasattr(around, "fan_in_fan_out"):
            around.fan_in_fan_out = True  # type: ignore[assignment]  # what PEFT asks before it merges an adapter
    if "_float_conversions" in model.__dict__:
        model._weight_conversions = model.__dict__.pop("_float_conversions")
    weights = dict(int8_weights(model))  # alive, so that their identities stay theirs
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        release(module, dtype, made)
    del weights
    for tensor in model.parameters():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def keep_own_names(model: PreTrainedModel) -> bool:
    """Have a model whose modules hold 8-bit weights saved under its own names; return whether it is one.

    transformers would rename its weights as in the float folder, and the Trainer, which resumes without names in
    return, would leave them as they are, without an error (5.24). `to_float` undoes it.
    """
    holds = any(isinstance(module, Int8Holder) for module in model.modules())
    if holds and "_float_conversions" not in model.__dict__:
        model.__dict__["_float_conversions"] = getattr(model, "_weight_conversions", None)
        model._weight_conversions = []  # type: ignore[assignment]
    return holds


def can_be_packed(model: PreTrainedModel) -> bool:
    """Tell whether transformers reads a model with packed layers as it was saved.

    It does not where there is no linear layer, as in GPT-2 and in stacks of experts, and where it converts weights
    between their names in a file and in the model: parts of what is packed would be put together, and stacks of
    experts that are not packed are left out without an error (5.17).
    """
    if any(isinstance(module, Int8Holder) for module in model.modules()):
        return False
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    layers = dict(int8_layers(model))
    if any(layer.from_conv1d for layer in layers.values()):
        return False  # nothing reads packed layers in the place of a `Conv1D`
    names = [f"{n}_packed" if n.removesuffix(".weight") in layers else n for n in model.state_dict()]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    try:
        back = [converter.reverse_transform() for converter in converters]
    except (NotImplementedError, ValueError):  # there is no way back
        return False
    return not any(converter.rename_source_key(name)[1] for converter in back for name in names)


def packed_state(model: nn.Module, whole: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the state of a model as `compressed-tensors` stores it.

    For each 8-bit layer it holds `weight_packed` (rows, ceil(columns / 4)) int32, `weight_scale` (rows, groups) and
    `weight_shape` (2,) int64, and no `weight`. What is packed is on the host: a device that is full of weights has no
    room for them twice.

    Args:
        model: with 8-bit layers.
        whole: its state, where the layers have parts of it.
    """
    layers = dict(int8_layers(model))
    state: dict[str, Tensor] = {}
    for name, tensor in (model.state_dict() if whole is None else whole).items():
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is None:
            state[name] = tensor
        else:
            state[f"{name}_packed"] = pack(tensor.flatten(1)).cpu()
            state[f"{name}_shape"] = torch.tensor(layer.weight.shape, device="cpu")
    return state

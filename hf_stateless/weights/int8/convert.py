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

from .linear import Int8Linear, sizes_of
from .packed import pack


def layers_to_quantize(model: nn.Module, left_out: Sequence[str] | None) -> list[str]:
    """Return the names of the linear layers that are stored in 8 bits: those of the backbone.

    Args:
        model: a transformers model, whose heads stay in float; or any other module.
        left_out: names, prefixes, suffixes or regular expressions of modules that stay in float, as tied layers do.

    Raises:
        ValueError: there is none.
    """
    stays, backbone = list(left_out or ()), model
    if isinstance(model, PreTrainedModel):
        backbone = model.base_model
        stays = HfQuantizer.get_modules_to_not_convert(model, stays, add_default_skips=True)
    inside = {id(m) for m in backbone.modules() if isinstance(m, Int8Linear) or _is_matrix(m)}
    names = [name for name, m in model.named_modules() if id(m) in inside and should_convert_module(name, stays)]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no linear layer that could be stored in 8 bits beside those of "
            f"modules_to_not_convert={sorted(stays)}. Stacks of experts are not supported: load the model "
            "without quantization_config."
        )
    return names


def _is_matrix(module: nn.Module) -> bool:
    """Tell whether a layer is one to store in 8 bits: a gate of one output has nothing to save and trains in float."""
    return type(module) in (nn.Linear, Conv1D) and sizes_of(module)[1] > 1


def quantize_layer(model: nn.Module, name: str, group_size: int | None) -> Int8Linear:
    """Put an 8-bit layer in the place of a linear layer; nothing is done where it is there already.

    Raises:
        ValueError: a weight is NaN or infinite, with the name of the layer.
    """
    linear = model.get_submodule(name)
    if not isinstance(linear, Int8Linear):
        try:
            linear = Int8Linear.from_float(linear, group_size)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        model.set_submodule(name, linear)
    return linear


def int8_layers(model: nn.Module) -> Iterator[tuple[str, Int8Linear]]:
    """Yield the names and layers that are stored in 8 bits."""
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            yield name, module


def without_scales(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a model but for the scales of its 8-bit layers, which FSDP2 makes plain parameters."""
    scales = {id(layer.weight_scale) for _, layer in int8_layers(model)}
    yield from (p for p in model.parameters() if id(p) not in scales)


def to_float(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put plain linear layers in the place of 8-bit ones, and cast the rest to the same dtype."""
    for name, layer in list(int8_layers(model)):
        model.set_submodule(name, layer.to_float(dtype))
        around = model.get_submodule(name.rpartition(".")[0])
        if layer.from_conv1d and hasattr(around, "fan_in_fan_out"):
            around.fan_in_fan_out = True  # type: ignore[assignment]  # what PEFT asks before it merges an adapter
    for tensor in model.parameters():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def can_be_packed(model: PreTrainedModel) -> bool:
    """Tell whether transformers reads a model with packed layers as it was saved.

    It does not where there is no linear layer, as in GPT-2, and where it converts weights between their names in a
    file and in the model: parts of what is packed would be put together, and stacks of experts that are not packed are
    left out without an error (5.17).
    """
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

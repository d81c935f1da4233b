"""What is wrong with a folder of 8-bit weights, told in one line before anything of it is used."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .compressed import Group
from .holder import scale_name
from .linear import sizes_of
from .packed import PER_WORD, words


# A tensor's dtype, as safetensors writes it, and its shape.
Header = Mapping[str, tuple[str, tuple[int, ...]]]
_SCALE = ".weight_scale"
_AGAIN = "copy the whole folder again."


@dataclass(frozen=True)
class Held:
    """What the headers of files say of one 8-bit layer."""

    shape: tuple[int, ...]
    """Of its codes, or of the int32 that hold four of them."""
    scales: tuple[int, ...]
    packed: bool
    dtypes: tuple[str, str]
    """Of codes and scales."""


def check_folder(files: Sequence[str | os.PathLike[str]], model: PreTrainedModel, layers: Mapping[str, Group]) -> None:
    """Refuse files that cannot be the 8-bit weights of a model, after a look at names, dtypes and shapes alone.

    Args:
        files: safetensors files, as an index names them; with none nothing is done.
        model: without weights yet.
        layers: those that are stored in 8 bits by the config, and how.

    Raises:
        ValueError: a file is missing, cut off, or not in the folder; codes and scales do not belong together; the
            config speaks of other layers, another group size or a far larger model.
    """
    folder = str(model.config.name_or_path)
    if os.path.isdir(folder):
        for file in files:
            if not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder)):
                raise ValueError(f"{folder}: its index names {file}, which is not in the folder.")
    if files:
        tensors = read_headers(files)
        held = layers_of(tensors, folder)
        _compare_layers(held, model, layers, folder)
        if is_own_class(model):
            _compare_sizes(held, tensors, model, layers, folder)
        else:
            _expect_layers(held, model, layers, folder)


def _compare_layers(
    held: Mapping[str, Held], model: PreTrainedModel, layers: Mapping[str, Group], folder: str
) -> None:
    """Refuse layers that the model has in float, where codes would be wrong weights, or in another size."""
    prefix = f"{model.base_model_prefix}."  # which names of the backbone have or lack, as the class has a head or not
    modules = {name.removeprefix(prefix): (name, module) for name, module in model.named_modules()}
    for layer, stored in held.items():
        name, linear = modules.get(layer.removeprefix(prefix), ("", None))
        if linear is None:
            parent = layer.removeprefix(prefix)
            while parent and parent not in modules:
                parent = parent.rpartition(".")[0]
            if parent:  # a part of this model, and not of a head that it does not have
                raise ValueError(
                    f"{folder}: {layer} is stored in 8 bits, and {type(model).__name__} has no such linear layer; "
                    "packed ones are not read into stacks of experts: quantise the float model instead."
                )
            continue
        if name not in layers or not isinstance(linear, nn.Linear | Conv1D):
            raise ValueError(
                f"{folder}: {layer} is stored in 8 bits, but config.json says it is not: its "
                "modules_to_not_convert, targets or ignore are others than when the folder was saved."
            )
        _compare_shapes(layer, stored, linear, layers[name], folder)


def _compare_shapes(layer: str, held: Held, linear: nn.Linear | Conv1D, group: Group, folder: str) -> None:
    """Refuse dtypes and shapes that are not those of a layer."""
    columns, rows = sizes_of(linear)
    length = group.group_size or columns
    codes = "I32" if group.packed else "I8"
    scales = ("BF16",) if group.ours else ("BF16", "F16", "F32")
    if held.packed != group.packed or held.dtypes[0] != codes or held.dtypes[1] not in scales:
        raise ValueError(
            f"{folder}: {layer} has codes of {held.dtypes[0]} and scales of {held.dtypes[1]}, expected {codes} and "
            f"{' or '.join(scales)}."
        )
    flat = (rows, words(columns) if group.packed else columns)
    grouped = () if group.packed else (rows, columns // length, length)
    if math.prod(held.shape) != math.prod(flat):
        raise ValueError(
            f"{folder}: {layer} is stored as {held.shape} weights, and config.json speaks of {flat}: {_AGAIN}"
        )
    if held.shape not in (flat, grouped) or held.scales != (rows, columns // length):
        raise ValueError(
            f"{folder}: {layer} has codes {held.shape} and scales {held.scales}, which do not fit "
            f"group_size={group.group_size} of config.json: load with the group_size it was saved with, or {_AGAIN}"
        )


def _expect_layers(stored: Collection[str], model: PreTrainedModel, names: Collection[str], folder: str) -> None:
    """Refuse a folder that lacks layers of the backbone, whatever class it is loaded as: heads are never in 8 bits."""
    prefix = f"{model.base_model_prefix}."
    held, expected = ({name.removeprefix(prefix) for name in some} for some in (stored, names))
    missing = sorted(expected - held)
    # A part of a model that was saved as a whole has other names altogether.
    if missing and (expected & held or not held):
        raise ValueError(
            f"{folder}: its codes and scales of {missing[0]} are missing ({len(missing)} layers): {_AGAIN}"
        )


def _compare_sizes(
    stored: Collection[str], tensors: Header, model: PreTrainedModel, names: Collection[str], folder: str
) -> None:
    """Refuse another number of 8-bit layers, and memory for far more weights than the files hold."""
    if len(stored) != len(names):
        raise ValueError(
            f"{folder}: {len(stored)} layers are stored in 8 bits, and config.json speaks of {len(names)}: {_AGAIN}"
        )
    expected = sum(p.nelement() for p in model.parameters())
    held = sum(
        math.prod(shape) * (PER_WORD if name.endswith(".weight_packed") else 1) for name, (_, shape) in tensors.items()
    )
    if expected > 2 * held:  # tied weights are saved once
        raise ValueError(f"{folder} holds {held:,} weights, and config.json speaks of {expected:,}: {_AGAIN}")


def is_own_class(model: PreTrainedModel) -> bool:
    """Tell whether a model is loaded as the class that it was saved as, so that nothing can be missing."""
    return type(model).__name__ in (model.config.architectures or ())


def read_headers(files: Sequence[str | os.PathLike[str]]) -> Header:
    """Return dtype and shape of each tensor of safetensors files.

    Raises:
        ValueError: a file is missing or damaged.
    """
    found = {}
    for path in files:
        if not os.path.isfile(path):
            raise ValueError(f"{path} is missing: {_AGAIN}")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    tensor = file.get_slice(name)
                    found[name] = tensor.get_dtype(), tuple(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or cut off ({error}): {_AGAIN}") from None
    return found


def layers_of(tensors: Header, folder: str) -> dict[str, Held]:
    """Return the layers that are stored in 8 bits.

    Raises:
        ValueError: codes and scales do not belong together, or there is more to them.
    """
    layers = {}
    for name, (dtype, shape) in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind in ("weight_zero_point", "weight_g_idx"):
            raise ValueError(f"{folder}: {name} is there, and weights that can be trained in 8 bits have none.")
        if kind == "weight_packed" or (kind == "weight" and dtype in ("I8", "U8")):
            if f"{layer}.{scale_name('weight')}" in tensors:
                continue  # an embedding
            if f"{layer}{_SCALE}" not in tensors:
                raise ValueError(f"{folder}: {name} holds codes without their scales {layer}{_SCALE}: {_AGAIN}")
            if kind == "weight_packed" and f"{layer}.weight_shape" not in tensors:
                raise ValueError(f"{folder}: {layer}.weight_shape is missing beside {name}: {_AGAIN}")
        if kind != "weight_scale":
            continue
        packed = f"{layer}.weight_packed" in tensors
        codes = tensors.get(f"{layer}.weight_packed" if packed else f"{layer}.weight")
        if codes is None:
            raise ValueError(f"{folder}: {layer}.weight is missing beside its scales: {_AGAIN}")
        layers[layer] = Held(codes[1], shape, packed, (codes[0], dtype))
    return layers

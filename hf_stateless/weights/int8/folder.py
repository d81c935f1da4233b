"""What is wrong with a folder of 8-bit weights, told in one line before anything of it is used."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from .codes import group_length


# A tensor's dtype, as safetensors writes it, and its shape.
Header = Mapping[str, tuple[str, tuple[int, ...]]]
_SCALE = ".weight_scale"
_AGAIN = "copy the whole folder again."


def check_folder(
    files: Sequence[str | os.PathLike[str]], model: PreTrainedModel, group_size: int | None, names: Collection[str]
) -> None:
    """Refuse files that cannot be the 8-bit weights of a model, after a look at names, dtypes and shapes alone.

    Args:
        files: safetensors files, as an index names them; with none nothing is done.
        model: without weights yet.
        group_size: of the config.
        names: of its layers that are stored in 8 bits.

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
        stored = layers_of(tensors, group_size, folder)
        _compare_layers(stored, model, names, folder)
        if is_own_class(model):
            _compare_sizes(stored, tensors, model, names, folder)
        else:
            _expect_layers(stored, model, names, folder)


def _compare_layers(
    stored: Mapping[str, tuple[int, int]], model: PreTrainedModel, names: Collection[str], folder: str
) -> None:
    """Refuse layers that the model has in float, where codes would be wrong weights, or in another size."""
    prefix = f"{model.base_model_prefix}."  # which names of the backbone have or lack, as the class has a head or not
    linears = {name.removeprefix(prefix): (name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for layer, sizes in stored.items():
        name, linear = linears.get(layer.removeprefix(prefix), ("", None))
        if linear is None:
            continue
        if name not in names:
            raise ValueError(
                f"{folder}: {layer} is stored in 8 bits, but config.json says it is not: its "
                "modules_to_not_convert is another than when the folder was saved."
            )
        if sizes != (linear.out_features, linear.in_features):
            raise ValueError(
                f"{folder}: {layer} is stored with {sizes} weights, and config.json speaks of "
                f"{(linear.out_features, linear.in_features)}: {_AGAIN}"
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
    held = sum(math.prod(shape) for _, shape in tensors.values())
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


def layers_of(tensors: Header, group_size: int | None, folder: str) -> dict[str, tuple[int, int]]:
    """Return the layers that are stored in 8 bits, with rows and columns of their weights.

    Raises:
        ValueError: codes and scales do not belong together, or another group size is meant.
    """
    for name, (dtype, _) in tensors.items():
        if name.endswith(".weight") and dtype in ("I8", "U8") and f"{name}_scale" not in tensors:
            raise ValueError(f"{folder}: {name} holds codes without their scales {name}_scale: {_AGAIN}")
    layers = {}
    for layer in [name.removesuffix(_SCALE) for name in tensors if name.endswith(_SCALE)]:
        if f"{layer}.weight" not in tensors:
            raise ValueError(f"{folder}: {layer}.weight is missing beside its scales: {_AGAIN}")
        (codes, shape), (scales, of_scales) = tensors[f"{layer}.weight"], tensors[layer + _SCALE]
        if (codes, scales) != ("I8", "BF16"):
            raise ValueError(f"{folder}: {layer} has codes of {codes} and scales of {scales}, expected I8 and BF16.")
        columns = shape[-1] * (shape[1] if len(shape) == 3 else 1) if len(shape) in (2, 3) else 0
        length = group_length(columns, group_size) if columns else 0
        if (
            not length
            or of_scales != (shape[0], columns // length)
            or shape[1:] not in ((columns,), (columns // length, length))
        ):
            raise ValueError(
                f"{folder}: {layer} has codes {shape} and scales {of_scales}, which do not fit "
                f"group_size={group_size} of config.json: load with the group_size it was saved with, or {_AGAIN}"
            )
        layers[layer] = shape[0], columns
    return layers

"""A batch without contents that suits a model, and the loss of it: tokens, pixels, sound, and an image beside text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ..run_facts import base_of
from .fused import fused_kernels
from .table import Settings
from .trace import LiveBytes


# The side of the image of models that take any size, and into how many tiles others cut one.
_SIDE, _TILES = 448, 5


@dataclass(frozen=True)
class Batch:
    """What one step of training reads."""

    inputs: Mapping[str, Any]
    """Arguments of the model."""
    image: Mapping[str, Any] | None = None
    """Arguments of its `get_image_features`, where the model reads images beside tokens."""
    notes: tuple[str, ...] = ()
    """What is said of it beside the figures."""

    def loss(self, model: nn.Module) -> Tensor:
        """Run forward and return the loss, or what stands in for it where a model has none of its own."""
        outputs = model(**self.inputs)
        loss = getattr(outputs, "loss", None)
        total: Tensor = _stand_in(outputs) if loss is None else loss
        if self.image is None:
            return total
        with torch.device("cpu"):  # where it looks is computed from numbers
            return total + _stand_in(base_of(model).get_image_features(**self.image))


def _stand_in(outputs: Any) -> Tensor:
    tensors = [t for t in tree_iter(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.stack([t.float().mean() for t in tensors if t.grad_fn is not None]).sum()


def example_batch(model: nn.Module, settings: Settings) -> Batch:
    """Return a batch for a model: of what it names as its input, with labels, and an image where it has eyes.

    Raises:
        ValueError: the model takes something else, or has no positions for so many tokens.
    """
    inner: Any = base_of(model)
    takes = inspect.signature(inner.forward).parameters
    found: dict[str, Any] = {}
    needed = [name for name in ("input_ids", "pixel_values") if _needs(takes, name)]
    for name in dict.fromkeys([inner.main_input_name, *needed]):
        found[name] = _input(name, inner, settings)
    if "return_loss" in takes:  # CLIP and its kin compare texts with images
        names = [name for name in ("input_ids", "pixel_values") if name in takes]
        found |= {"return_loss": True, **{name: _input(name, inner, settings) for name in names}}
    labels, notes = _labels(inner, settings), []
    if "labels" in takes and "return_loss" not in takes:
        found["labels"] = labels
    if "labels" not in takes and "return_loss" not in takes:
        if getattr(inner.config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
            found["decoder_input_ids"] = labels
        notes.append("This class has no loss of its own: the mean of its outputs stands in for it.")
    image = None
    if "pixel_values" not in found and _reads_images(inner, takes):
        image = _image(inner, settings)
        notes.append(_note_of_image(image))
    return Batch(found, image, tuple(notes))


def _needs(takes: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in takes and takes[name].default is inspect.Parameter.empty


def _labels(inner: Any, settings: Settings) -> Tensor:
    whole = ("Classification" in type(inner).__name__) and "TokenClassification" not in type(inner).__name__
    shape = (settings.batch,) if whole else (settings.batch, settings.seq)
    return torch.empty(shape, dtype=torch.long, device="meta")


def _input(name: str, inner: Any, settings: Settings) -> Tensor:
    config, dtype = inner.config, next(inner.parameters()).dtype
    if name == "input_ids":
        positions = max_positions(inner)
        if positions and settings.seq > positions:
            raise ValueError(f"--seq {settings.seq}: this model has {positions} positions; type --seq {positions}.")
        return torch.empty((settings.batch, settings.seq), dtype=torch.long, device="meta")
    if name == "pixel_values":
        channels, size, _ = _of_images(config)
        shape: tuple[int, ...] = (settings.batch, channels, *size)
    elif name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        shape = (settings.batch, config.num_mel_bins, 2 * config.max_source_positions)
    else:
        raise ValueError(
            f"{type(inner).__name__} takes {name}: only models of tokens, pixels or spectrograms of one length can be "
            "traced."
        )
    return torch.empty(shape, dtype=dtype, device="meta")


def max_positions(model: nn.Module) -> int | None:
    """Return the longest sequence a model was made for, if its config says so."""
    config: Any = base_of(model).config
    texts = (config.get_text_config(), config)
    names = ("max_position_embeddings", "max_target_positions")
    found = (getattr(text, name, None) for text in texts for name in names)
    return next((number for number in found if isinstance(number, int) and number > 0), None)


def _of_images(config: Any) -> tuple[int, tuple[int, int], int]:
    """Return channels, height and width, and the side of a patch."""
    eyes = getattr(config, "vision_config", None) or config
    size = getattr(eyes, "image_size", None) or _SIDE
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, Sequence) else (size, size)
    patch = getattr(eyes, "patch_size", None) or 14
    channels = getattr(eyes, "num_channels", None) or getattr(eyes, "in_channels", None) or 3
    return channels, (height, width), patch[0] if isinstance(patch, Sequence) else patch


def _reads_images(inner: Any, takes: Mapping[str, Any]) -> bool:
    return "pixel_values" in takes or hasattr(inner, "get_image_features")


def _image(inner: Any, settings: Settings) -> dict[str, Any] | None:
    """Return the arguments with which a model looks at one image for each sequence; None where no form suits it.

    Sizes are numbers, which the code of a model reads; pixels have no contents.
    """
    if not hasattr(inner, "get_image_features"):
        return None
    for arguments in _forms_of_image(inner, settings.batch):
        try:
            with torch.no_grad(), fused_kernels(settings.device), LiveBytes():
                inner.get_image_features(**arguments)
        except Exception:
            continue
        return arguments
    return None


def _forms_of_image(inner: Any, batch: int) -> Iterator[dict[str, Any]]:
    """Yield the forms in which models of transformers take an image: whole, in tiles, or as rows of patches."""
    channels, (height, width), patch = _of_images(inner.config)
    eyes = getattr(inner.config, "vision_config", None)
    dtype = next(inner.parameters()).dtype

    def pixels(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sizes = {"image_sizes": torch.tensor([[height, width]] * batch)}
    yield {"pixel_values": pixels(batch, channels, height, width)}
    yield {"pixel_values": pixels(batch, channels, height, width), **sizes}
    yield {"pixel_values": pixels(batch, 1, channels, height, width)}
    yield {"pixel_values": pixels(batch, _TILES, channels, height, width), **sizes}
    side = _SIDE // patch // 4 * 4  # patches are merged by two or four
    row = channels * getattr(eyes, "temporal_patch_size", 1) * patch**2
    yield {"pixel_values": pixels(batch * side**2, row), "image_grid_thw": torch.tensor([[1, side, side]] * batch)}


def _note_of_image(image: Mapping[str, Any] | None) -> str:
    if image is None:
        return "Images are not counted: this model takes them in a form that cannot be traced; add a margin for them."
    shape, grid = image["pixel_values"].shape, image.get("image_grid_thw")
    size = f"{grid[0, 1]} x {grid[0, 2]} patches" if grid is not None else f"{shape[-2]} x {shape[-1]} pixels"
    tiles = f", cut into {_TILES} tiles" if len(shape) == 5 and shape[1] == _TILES else ""
    return f"Activations are with one image of {size}{tiles} for each sequence, whose tokens --seq counts."

"""What an export reads: the folder of a saved 8-bit model, looked over before anything of it is used."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from . import compressed
from .codes import COMMON_LENGTHS
from .config import METHOD, Int8TrainingConfig
from .folder import layers_of, read_headers


# Beside weights and config, which are written anew: tokenizers, chat templates, processors.
KEPT = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "preprocessor_config.json", "processor_config.json"),
)
_INDEX = "model.safetensors.index.json"
# Where configs say how many layers to build, which takes time even without weights.
_LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layers")
_READ = [*KEPT, "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]


def files_of(source: str) -> Path:
    """Return the folder of a saved model, downloaded if it is on the Hub.

    Raises:
        ValueError: there is none, it has no config, or a file in it is a link to somewhere else.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=_READ))
        except (OSError, ValueError) as error:
            raise ValueError(f"{source}: no such folder, and the Hub does not provide it: {error}") from error
    if not os.path.lexists(folder / "config.json"):
        raise ValueError(f"{source}: no config.json; expected the folder of a whole model.")
    for path in sorted({path for pattern in _READ for path in folder.glob(pattern)}):
        _refuse_outside(path, folder)
    return folder


def load_whole(folder: Path, source: str) -> PreTrainedModel:
    """Load an 8-bit model as the class that it was saved as; nothing of it may be missing or left over.

    Args:
        folder: from `files_of`.
        source: what messages call it.

    Raises:
        ValueError: it is no 8-bit model of this package, or it is damaged.
    """
    config = _read_object(folder / "config.json")
    stored = config.get("quantization_config")
    stored = stored if isinstance(stored, dict) else {}
    method = stored.get("quant_method")
    if method not in (METHOD, compressed.METHOD):
        raise ValueError(f"{source}: not stored by Int8TrainingConfig (quant_method: {method}); it needs no export.")
    try:
        options: dict[str, Any] = {}
        if method == compressed.METHOD:
            options["quantization_config"] = Int8TrainingConfig()
        tensors = read_headers(_weight_files(folder))
        layers_of(tensors, source)
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            for name in _LAYERS:
                if isinstance(part.get(name), int) and part[name] > len(tensors):
                    raise ValueError(
                        f"{source}: {name}={part[name]} in config.json, and {len(tensors)} tensors in all."
                    )
        with _quiet():
            model, found = _class_of(config).from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:  # what a damaged file leads to may be raised anywhere in transformers
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(message if source in message else f"{source} cannot be loaded: {message}") from error
    found["mismatched_keys"] = {*(key[0] for key in found["mismatched_keys"]), *_of_another_size(model)}
    for fault in ("missing", "unexpected", "mismatched"):
        names = sorted(found[f"{fault}_keys"])
        if names:
            raise ValueError(f"{source} is damaged: {len(names)} {fault} tensors, such as {names[0]}.")
    loaded: PreTrainedModel = model
    return loaded


def refuse_served(folder: Path, source: str) -> None:
    """Refuse to copy what vLLM reads as it is.

    Args:
        folder: from `files_of`.
        source: what messages call it.

    Raises:
        ValueError: its config says so, or says that the groups of its weights have no kernels.
    """
    stored = _read_object(folder / "config.json").get("quantization_config")
    if isinstance(stored, dict) and stored.get("quant_method") == compressed.METHOD:
        layout = compressed.read_layout(stored)
        refuse_without_kernels(group.group_size for group in layout.groups if group.group_size)
        if all(group.packed for group in layout.groups):
            raise ValueError(f"{source} already loads as it is, nothing was written: vllm serve {source}")


def refuse_without_kernels(lengths: Iterable[int]) -> None:
    """Refuse groups of so many weights that vLLM has no kernels for them."""
    others = sorted(set(lengths) - set(COMMON_LENGTHS))
    if others:
        raise ValueError(
            f"vLLM has kernels for groups of {', '.join(map(str, COMMON_LENGTHS))} weights or whole rows, got groups "
            f"of {others[0]}: type --format bf16."
        )


def _of_another_size(model: PreTrainedModel) -> Iterator[str]:
    """Yield what older versions of transformers take into a quantised model although the config has another size."""
    for name, module in model.named_modules():
        sizes: tuple[int, ...] = ()
        if isinstance(module, nn.Linear):
            sizes = module.out_features, module.in_features
        elif isinstance(module, nn.Embedding):
            sizes = module.num_embeddings, module.embedding_dim
        if sizes and tuple(module.weight.shape) != sizes:
            yield f"{name}.weight"


def _class_of(config: dict[str, Any]) -> Any:
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        named = getattr(transformers, str(name), None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            return named
    return AutoModelForCausalLM


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers would read."""
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    if not (folder / _INDEX).is_file():
        raise ValueError(f"{folder}: neither model.safetensors nor {_INDEX}; expected the folder of a whole model.")
    parts = _read_object(folder / _INDEX).get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
        raise ValueError(f"{folder / _INDEX}: its weight_map names no files.")
    files = [folder / name for name in sorted(set(parts.values()))]
    for path in files:
        _refuse_outside(path, folder)
    absent = sorted(set(parts) - set(read_headers(files)))
    if absent:
        raise ValueError(f"{folder}: {absent[0]} is in the index, but not in {parts[absent[0]]}.")
    return files


def _refuse_outside(path: Path, folder: Path) -> None:
    """Refuse a file that is not in the folder: its contents would be copied to where they do not belong."""
    inside, target = folder.resolve(), path.resolve()
    # The Hub's cache holds files once in `blobs`, and links to them in each snapshot.
    roots = [inside, inside.parents[1] / "blobs"] if inside.parent.name == "snapshots" else [inside]
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(f"{path} leads out of its folder, to {target}: copy what it shall hold into the folder.")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.parent}: {path.name} is no JSON ({error}): copy the whole folder again.") from None
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"{path.parent}: {path.name} holds no object but {kind}: copy the whole folder again.")
    return values


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' report of what it could not load off the screen: the error is one line."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

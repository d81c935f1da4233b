"""A model that was trained in 8 bits, written as a folder that loads without this package."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from .hf_quantizer import METHOD, dequantize


FORMATS = ("bf16", "bitsandbytes")
# Beside weights and config, which are written anew: tokenizers, chat templates, processors.
_KEPT = [
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "preprocessor_config.json", "processor_config.json"),
]
_READ = [*_KEPT, "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]


def export_model(
    source: str | os.PathLike[str] | PreTrainedModel, output: str | os.PathLike[str], format: str
) -> Path:
    r"""Write a model that was trained in 8 bits as a plain folder; the model itself stays as it is.

    `bf16`: W = codes scale, rounded to bf16 once, without a `quantization_config`. It loads anywhere, and it is what
    llama.cpp's `convert_hf_to_gguf.py` makes a GGUF file of. `bitsandbytes`: 8-bit linear layers for inference, one
    scale per row, quantised anew from the bf16 weights. The folder appears whole or not at all.

    Args:
        source: a saved folder, an id on the Hub, or a model in memory. From the former two the tokenizer, the chat
            template and the generation config are taken over; a model in memory has no tokenizer.
        output: the new folder; it may exist if it is empty.
        format: `bf16` or `bitsandbytes`.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown format, a folder that is not empty, no such source, or one without 8-bit layers.
        ImportError: `bitsandbytes` is not installed.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import hf_stateless
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=2, vocab_size=32)
        >>> model = hf_stateless.quantize(LlamaForCausalLM(config))
        >>> folder = hf_stateless.export_model(model, tempfile.mkdtemp(), "bf16")
        >>> sorted(path.name for path in folder.iterdir())
        ['config.json', 'generation_config.json', 'model.safetensors']
    """
    folder = Path(output)
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: expected {' or '.join(FORMATS)}. A GGUF file is made from bf16.")
    if format == "bitsandbytes" and find_spec("bitsandbytes") is None:
        raise ImportError("format bitsandbytes needs its package: pip install bitsandbytes")
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder: name a new one.")
    files = None if isinstance(source, PreTrainedModel) else _files_of(os.fspath(source))
    model = copy.deepcopy(source) if isinstance(source, PreTrainedModel) else _load(files, os.fspath(source))
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Written to a temporary folder beside it, which is then renamed: the folder appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}-") as beside:
        written = Path(beside, "bf16")
        dequantize(model).save_pretrained(written)
        if format == "bitsandbytes":
            bits = BitsAndBytesConfig(load_in_8bit=True)
            where = {"": "cuda" if torch.cuda.is_available() else "cpu"}
            kind: Any = type(model)
            model = kind.from_pretrained(written, quantization_config=bits, dtype=torch.bfloat16, device_map=where)
            written = Path(beside, "bitsandbytes")
            model.save_pretrained(written)
        for name in sorted({path for pattern in _KEPT for path in (files.glob(pattern) if files else ())}):
            if name.is_file():
                shutil.copyfile(name, written / name.name)
        if folder.is_dir():
            folder.rmdir()  # empty; Windows renames onto no folder
        os.replace(written, folder)
    return folder


def _files_of(source: str) -> Path:
    """Return the folder of a saved model, downloaded if it is on the Hub."""
    if os.path.isdir(source):
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=_READ))
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no such folder, and the Hub does not provide it: {error}") from error


def _load(files: Path | None, source: str) -> PreTrainedModel:
    """Load the 8-bit model as the class that it was saved as."""
    if files is None or not (files / "config.json").is_file():
        raise ValueError(f"{source}: no config.json; expected the folder of a whole model.")
    try:
        config = AutoConfig.from_pretrained(files)
    except Exception as error:  # whatever somebody has written there
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{source}: config.json is not the config of a model ({why}).") from None
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != METHOD:
        raise ValueError(f"{source}: not stored by Int8TrainingConfig (quant_method: {method}); it needs no export.")
    listed = config.architectures if isinstance(config.architectures, list) else []
    names = [name for name in listed if isinstance(name, str) and hasattr(transformers, name)]
    kind = getattr(transformers, names[0]) if names else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_pretrained(files)
    return model

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
from transformers import BitsAndBytesConfig, PreTrainedModel

from .convert import can_be_packed, int8_layers
from .hf_quantizer import dequantize
from .source import KEPT, files_of, load_whole, refuse_served, refuse_without_kernels


FORMATS = ("bf16", "bitsandbytes", "vllm")


def export_model(
    source: str | os.PathLike[str] | PreTrainedModel, output: str | os.PathLike[str], format: str
) -> Path:
    r"""Write a model that was trained in 8 bits as a plain folder; the model itself stays as it is.

    `bf16`: W = codes scale, rounded to bf16 once, without a `quantization_config`. It loads anywhere, and it is what
    llama.cpp's `convert_hf_to_gguf.py` makes a GGUF file of. `bitsandbytes`: 8-bit linear layers for inference, one
    scale per row, quantised anew from the bf16 weights. `vllm`: codes and scales as they are, which `save_pretrained`
    writes too; for folders in our own layout and models in memory. The folder appears whole or not at all.

    Args:
        source: a saved folder, an id on the Hub, or a model in memory. From the former two the tokenizer, the chat
            template and the generation config are taken over; a model in memory has no tokenizer.
        output: the new folder; it may exist if it is empty.
        format: `bf16`, `bitsandbytes` or `vllm`.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown format, a folder that is not empty, no such source, or one without 8-bit layers; a
            source that is damaged, or of which a file is a link to somewhere else; for `vllm`, a folder that vLLM
            reads as it is, or groups that it has no kernels for.
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
    files = None
    if isinstance(source, PreTrainedModel):
        model = copy.deepcopy(source)
    else:
        files = files_of(os.fspath(source))
        if format == "vllm":
            refuse_served(files, os.fspath(source))
        model = load_whole(files, os.fspath(source))
    if format == "vllm":
        if not can_be_packed(model):
            raise ValueError(f"{type(model).__name__} cannot be written for vLLM in 8 bits: type --format bf16.")
        refuse_without_kernels(layer.length for _, layer in int8_layers(model) if layer.length < layer.in_features)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Written to a temporary folder beside it, which is then renamed: the folder appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}-") as beside:
        written = Path(beside, "bf16")
        (model if format == "vllm" else dequantize(model)).save_pretrained(written)
        if format == "bitsandbytes":
            bits = BitsAndBytesConfig(load_in_8bit=True)
            where = {"": "cuda" if torch.cuda.is_available() else "cpu"}
            kind: Any = type(model)
            model = kind.from_pretrained(written, quantization_config=bits, dtype=torch.bfloat16, device_map=where)
            written = Path(beside, "bitsandbytes")
            model.save_pretrained(written)
        for name in sorted({path for pattern in KEPT for path in (files.glob(pattern) if files else ())}):
            if name.is_file():
                shutil.copyfile(name, written / name.name)
        if folder.is_dir():
            folder.rmdir()  # empty; Windows renames onto no folder
        os.replace(written, folder)
    return folder

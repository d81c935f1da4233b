"""Models that are built from a config alone, on the meta device: no weights are read, downloaded or allocated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ...weights.int8.hf_quantizer import quantize
from ..command_line import first_line
from ..run_facts import base_of
from .state import shard
from .table import Settings
from .trace import LiveBytes


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.bfloat16}
"""Of everything that is in float; with int8, linear layers are stored as `Int8TrainingConfig` does."""


def load_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """Read the config of a model: of an id on the Hub, a folder with a `config.json`, or such a file.

    Raises:
        ValueError: no such config.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"MODEL={source!r}: expected a folder with a config.json, such a file, or the id of a model on the Hub "
            f"that can be reached ({first_line(error)})"
        ) from None
    config.use_cache = False  # as the Trainer sets it
    return config


def build_model(config: Any, settings: Settings) -> nn.Module:
    """Build the model of a config on the meta device, ready to be trained as the settings say.

    Raises:
        ValueError: the config names no model class that can be built, LoRA without peft, or no checkpointing in this
            model.
    """
    try:
        with torch.device("meta"), LiveBytes():  # lets a model read numbers from tensors without contents
            model: Any = _maker(config)(config, dtype=DTYPES[settings.dtype])
            model = quantize(model) if settings.dtype == "int8" else model
            model = _with_lora(model, settings.lora) if settings.lora else model
            if settings.checkpointing:
                base_of(model).activation_checkpointing_enable()
    except (AttributeError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        kind = getattr(config, "model_type", "")
        raise ValueError(f"The model of this config (type {kind!r}) cannot be built: {first_line(error)}") from None
    trained: nn.Module = model.train()
    return trained


def _maker(config: Any) -> Callable[..., Any]:
    """Return what builds the model: the class that the config names, or the causal language model of its type."""
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0] or "?", None)
    maker: Callable[..., Any] = AutoModelForCausalLM.from_config if named is None else partial(_in_dtype, named)
    return maker


def _in_dtype(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    config.dtype = dtype
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        return model_class(config)
    finally:
        torch.set_default_dtype(before)


def _with_lora(model: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError('LoRA needs peft, which is not installed: type pip install "hf_stateless[peft]"') from None
    with warnings.catch_warnings():  # PEFT asks transformers for an attribute that it has renamed
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))


def example_inputs(model: nn.Module, settings: Settings) -> dict[str, Tensor]:
    """Return a batch without contents that suits a model: tokens or pixels, and labels.

    Raises:
        ValueError: the model takes something else, or has no positions for so many tokens.
    """
    inner: Any = base_of(model)
    name, config = inner.main_input_name, inner.config
    tokens = (settings.batch, settings.seq)
    labels = tokens[:1] if "Classification" in type(inner).__name__ else tokens
    if name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2
        shape = (settings.batch, getattr(config, "num_channels", 3), *size)
        inputs = torch.empty(shape, dtype=next(model.parameters()).dtype, device="meta")
    elif name == "input_ids":
        positions = max_positions(model)
        if positions and settings.seq > positions:
            raise ValueError(f"--seq {settings.seq}: this model has {positions} positions; type --seq {positions}.")
        inputs = torch.empty(tokens, dtype=torch.long, device="meta")
    else:
        raise ValueError(f"{type(inner).__name__} takes {name}: only models of tokens or pixels can be traced.")
    return {name: inputs, "labels": torch.empty(labels, dtype=torch.long, device="meta")}


def max_positions(model: nn.Module) -> int | None:
    """Return the longest sequence a model was made for, if its config says so."""
    config: Any = base_of(model).config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def weight_bytes_of_rank(model: nn.Module, ranks: int = 1) -> int:
    """Count the bytes of the parameters and buffers of a model, tied ones once; of parameters the part of one rank."""
    return tensor_bytes((p.detach() for p in model.parameters()), ranks) + tensor_bytes(model.buffers())


def tensor_bytes(tensors: Iterable[Tensor], ranks: int = 1) -> int:
    """Sum the bytes of tensors, or of the parts of them that one rank holds."""
    return sum(torch.Size(shard(t.shape, ranks)).numel() * t.dtype.itemsize for t in tensors)

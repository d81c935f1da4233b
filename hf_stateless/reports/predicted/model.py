"""Models that are built from a config alone, on the meta device: no weights are read, downloaded or allocated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)

from ...optimizer.option_kinds import shown
from ...weights.int8.hf_quantizer import quantize
from ..command_line import one_line
from ..run_facts import base_of
from .limits import check_config, check_sizes
from .parallel import cut_by_plans
from .state import shard
from .table import Settings
from .trace import LiveBytes


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.bfloat16}
"""Of everything that is in float; with int8, linear layers are stored as `Int8TrainingConfig` does."""
# Tried in turn where a config names no class of this transformers, as old ones do (T5WithLMHeadModel).
_TASKS: tuple[tuple[Any, Any], ...] = (
    (AutoModelForSeq2SeqLM, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    (AutoModelForSpeechSeq2Seq, transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING),
    (AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForImageTextToText, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (AutoModelForMaskedLM, transformers.MODEL_FOR_MASKED_LM_MAPPING),
    (AutoModel, transformers.MODEL_MAPPING),
)


def load_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """Read the config of a model: of an id on the Hub, a folder with a `config.json`, or such a file.

    Raises:
        ValueError: no such config.
    """
    try:
        check_config(PreTrainedConfig.get_config_dict(source)[0])
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        config.use_cache = False  # as the Trainer sets it
    except Exception as error:  # the file is somebody's, and so may be the code that reads it
        raise ValueError(
            f"MODEL={shown(source)}: expected a folder with a config.json, such a file, or the id of a model on the "
            f"Hub that can be reached ({_why(error)})"
        ) from None
    return config


def build_model(config: Any, settings: Settings) -> nn.Module:
    """Build the model of a config on the meta device, ready to be trained as the settings say.

    Raises:
        ValueError: the config names no model class that can be built, LoRA without peft, no checkpointing in this
            model, or no plan for the parallelism that is asked for.
    """
    try:
        with torch.device("meta"), LiveBytes():  # lets a model read numbers from tensors without contents
            model: Any = _maker(config)(config, dtype=DTYPES[settings.dtype])
            model = quantize(model) if settings.dtype == "int8" else model
            model = _with_lora(model, settings.lora) if settings.lora else model
            if settings.checkpointing:
                checkpoint_activations(base_of(model))
            check_sizes(model)
    except Exception as error:  # of a model's own code, on whatever the config says
        kind = getattr(config, "model_type", "")
        raise ValueError(f"The model of this config (type {shown(kind)}) cannot be built: {_why(error)}") from None
    cut_by_plans(model, settings)
    trained: nn.Module = model.train()
    return trained


def checkpoint_activations(model: Any) -> None:
    """Turn activation checkpointing on; transformers before 5.23 calls it gradient checkpointing."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    getattr(model, names[0] if hasattr(model, names[0]) else names[1])()


def _maker(config: Any) -> Callable[..., Any]:
    """Return what builds the model: the class that the config names, or else the first task that its type has."""
    names = getattr(config, "architectures", None)
    named = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return partial(_in_dtype, named)
    trusted = type(config).__module__.startswith("transformers_modules.")  # its code was run when it was read
    tasks = [task for task, mapping in _TASKS if type(config) in mapping]
    task = AutoModelForCausalLM if trusted or not tasks else tasks[0]
    return partial(task.from_config, trust_remote_code=trusted)


def _why(error: BaseException) -> str:
    """Return what an error says, in one line; transformers' lines are long, and the first often says the least."""
    text = one_line(error, most=300)
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError | AssertionError) or not text else text


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


def weight_bytes_of_rank(model: nn.Module, ranks: int = 1) -> int:
    """Count the bytes of the parameters and buffers of a model, tied ones once; of parameters the part of one rank."""
    return tensor_bytes((p.detach() for p in model.parameters()), ranks) + tensor_bytes(model.buffers())


def tensor_bytes(tensors: Iterable[Tensor], ranks: int = 1) -> int:
    """Sum the bytes of tensors, or of the parts of them that one rank holds."""
    return sum(torch.Size(shard(t.shape, ranks)).numel() * t.dtype.itemsize for t in tensors)

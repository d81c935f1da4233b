"""What of DeepSpeed can be trained with: ZeRO of every stage, as its config says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import nn

from ..optimizer.optimizer import StatelessOptimizer
from ..optimizer.partitioned import PartitionedOptimizer
from ..weights.int8.convert import int8_weights
from .optim_args import is_layerwise
from .partition import convert_command


_QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
_UNTESTED = ("elastic_checkpoint", "zenflow", "cpu_offload", *_QUANTIZED)
# Sizes of groups of GPUs, and those that mean none.
_GROUPED = ("zero_hpz_partition_size", "mics_shard_size")
_NO_GROUPS = (1, -1)


def optimizer_class(args: Any, name: str, model: nn.Module) -> type[StatelessOptimizer]:
    """Return the class of the optimizer: another one where DeepSpeed puts flat parts in the place of parameters.

    It is announced by the training arguments, or by `accelerate launch` through the environment.

    Args:
        args: training arguments.
        name: `optim`.
        model: that is trained.

    Raises:
        ValueError: a setting of DeepSpeed, or beside it, under which the optimizer would train something else.
    """
    announced = [getattr(args, key, None) for key in ("deepspeed", "deepspeed_plugin")]
    if not any(announced) and not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return StatelessOptimizer
    config = getattr(announced[1], "deepspeed_config", None)
    refused = _refused(config, name, model)
    if refused:
        # The Trainer takes a path or the values themselves; `accelerate launch` tells the path of a JSON.
        told = [announced[0], os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")]
        file = next((path for path in told if isinstance(path, (str, os.PathLike)) and str(path)), None)
        raise ValueError(
            f"DeepSpeed ZeRO hands the optimizer flat partitions, and {refused}, or set distributed_type: FSDP and "
            f"fsdp_version: 2 in the accelerate config to shard with FSDP2 ({convert_command(file)} writes it)."
        )
    return PartitionedOptimizer


def _refused(config: Mapping[str, Any] | None, name: str, model: nn.Module) -> str:
    """Return why there is no exact update, with what to type; nothing if there is one."""
    if config is None:
        return "its config is unknown here: leave out --deepspeed"
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        return f"stage {stage} is not known: set zero_optimization.stage to 0, 1, 2 or 3"
    if stage == 0 and (config.get("fp16") or {}).get("enabled"):
        # DeepSpeed 0.19.8 divides gradients by a scale there, and never multiplies the loss with it.
        return "fp16 at stage 0 is computed wrong by DeepSpeed: set zero_optimization.stage to 1, or type bf16=True"
    for key in ("offload_optimizer", "offload_param"):
        device = (zero.get(key) or {}).get("device", "none")
        if device not in (None, "none"):
            return f"{key} to {device} is not tested: leave it out of zero_optimization"
    for key in (*_UNTESTED, *_GROUPED):
        if zero.get(key) and not (key in _GROUPED and zero[key] in _NO_GROUPS):
            return f"{key} is not tested: leave it out of zero_optimization"
    if is_layerwise(name):
        return "it keeps gradients until the step: leave out _layerwise"
    if any(True for _ in int8_weights(model)):
        return "8-bit weights have no float32 masters: load the model without quantization_config"
    return ""

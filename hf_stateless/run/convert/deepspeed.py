"""A DeepSpeed config as an accelerate config of FSDP2: sharding, precision, offload; the rest is named."""

from __future__ import annotations

from typing import Any

from .conversion import Conversion, plain_ddp, replicated
from .deepspeed_arguments import take_arguments
from .deepspeed_keys import advice, short
from .settings import Settings


ZERO = "zero_optimization"
# What accelerate calls DeepSpeed's settings in a config of its own.
ACCELERATE_NAMES = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "zero_stage": f"{ZERO}.stage",
    "offload_optimizer_device": f"{ZERO}.offload_optimizer.device",
    "offload_optimizer_nvme_path": f"{ZERO}.offload_optimizer.nvme_path",
    "offload_param_device": f"{ZERO}.offload_param.device",
    "offload_param_nvme_path": f"{ZERO}.offload_param.nvme_path",
    "zero3_save_16bit_model": f"{ZERO}.stage3_gather_16bit_weights_on_model_save",
}


def convert_deepspeed(values: dict[str, Any], config: dict[str, Any], names: dict[str, str]) -> Conversion:
    """Return the accelerate config that does what a DeepSpeed config does.

    Args:
        values: DeepSpeed's settings, nested as in its JSON.
        config: what the accelerate config says besides them.
        names: what a dotted setting is called in the person's file, where that differs.

    Raises:
        ValueError: a value that DeepSpeed does not know; the line says which ones it does.
    """
    settings = Settings(values, names)
    settings.expect_blocks("fp16", "bf16", "bfloat16", "torch_autocast", "optimizer", "scheduler")
    result = Conversion(config)
    stage = _stage(settings)
    _precision(settings, result)
    take_arguments(settings, result)
    if stage == 0:
        result.config = plain_ddp(result.config)
        result.notes.append("ZeRO-0 shards nothing: plain DDP does the same.")
    else:
        _shard(stage, settings, result)
    if settings.autos:
        result.notes.append(f"{', '.join(short(settings.autos))}: auto, TrainingArguments decides as before.")
    result.notes += advice(settings)
    return result


def _stage(settings: Settings) -> int:
    """Take the stage of ZeRO; the oldest format has `zero_optimization: true` for stage 1."""
    if isinstance(settings.left().get(ZERO), bool):
        return int(settings.take(ZERO))
    settings.expect_blocks(ZERO, f"{ZERO}.offload_param", f"{ZERO}.offload_optimizer")
    key = f"{ZERO}.stage"
    value = settings.take(key)
    if value is None:
        return 0
    if str(value) not in ("0", "1", "2", "3"):
        raise ValueError(f"{settings.name(key)}: got {value!r}, expected a stage of ZeRO, 0, 1, 2 or 3")
    return int(value)


def _shard(stage: int, settings: Settings, result: Conversion) -> None:
    """Write what FSDP2 does as a stage of ZeRO does."""
    gathers = [f"{ZERO}.stage3_gather_{kind}_weights_on_model_save" for kind in ("16bit", "fp16")]
    # "auto" is accelerate's, and a whole model the safer of the two.
    gathered = [str(settings.take(key, default=True)).lower() == "true" for key in gathers]
    whole = stage < 3 or any(gathered)
    zero_init = settings.switch("zero3_init_flag")
    result.config["distributed_type"] = "FSDP"
    result.config["fsdp_config"] = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": stage == 3,
        "fsdp_offload_params": _offload(stage, settings, result),
        "fsdp_state_dict_type": "FULL_STATE_DICT" if whole else "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": stage == 3 and zero_init is not False,
    }
    if stage == 1:
        result.notes.append("ZeRO-1 keeps gradients whole, FSDP2 shards them too: the same result, less memory.")
    if not whole:
        result.notes.append(
            "Weights are saved in parts, as before: fsdp_state_dict_type: FULL_STATE_DICT saves a whole model."
        )
    _sequences(result)
    shard = settings.number(f"{ZERO}.mics_shard_size", least=-1, whole=True)
    if shard and shard > 0:
        replicated(result, int(shard), f"{ZERO}.mics_shard_size")


def _sequences(result: Conversion) -> None:
    """Cut sequences as accelerate does with FSDP2, where DeepSpeed cut them."""
    sizes = result.config.get("parallelism_config") or {}
    prefix = "parallelism_config_sp_"
    parts = sizes.get(f"{prefix}size", 1)
    kept = {key: value for key, value in sizes.items() if not str(key).startswith(prefix)}
    if parts != 1:
        kept["parallelism_config_cp_size"] = parts
        result.notes.append(
            f"{prefix}size: sequences are cut by DeepSpeed; parallelism_config_cp_size: {parts} cuts them without it, "
            "with attn_implementation='sdpa'."
        )
    if kept != sizes:
        result.config["parallelism_config"] = kept


def _offload(stage: int, settings: Settings, result: Conversion) -> bool:
    """Take both kinds of offload, and return whether FSDP2 keeps its shards in the memory of the CPU."""
    of_weights = _device(settings, "offload_param", "cpu_offload_param", "cpu_offload_params")
    of_state = _device(settings, "offload_optimizer", "cpu_offload")
    note = result.notes.append
    offloads = of_weights != "none" and stage == 3
    if of_weights != "none" and stage < 3:
        note(f"offload_param: DeepSpeed reads it at stage 3 only, so it is left out at stage {stage}.")
    if offloads and of_weights == "nvme":
        note("offload_param to nvme: FSDP2 has none, the weights go to the memory of the CPU (fsdp_offload_params).")
    if of_state != "none" and not offloads:
        note(
            f"offload_optimizer to {of_state}: FSDP2 moves all or nothing, and these optimizers keep no state for "
            "matrices, so nothing is moved; fsdp_offload_params: true moves weights, gradients and step."
        )
    elif of_state == "nvme":
        note("offload_optimizer to nvme: FSDP2 has none, what state there is goes to the memory of the CPU.")
    return offloads


def _device(settings: Settings, name: str, *older: str) -> str:
    """Take where something is offloaded to: none, cpu or nvme; older settings are switches."""
    key = f"{ZERO}.{name}.device"
    switches = [settings.switch(f"{ZERO}.{key}") is True for key in older]
    device = str(settings.take(key, default="none") or "none").lower()
    settings.take(f"{ZERO}.{name}.nvme_path", default="none")
    if device not in ("none", "cpu", "nvme"):
        raise ValueError(f"{settings.name(key)}: got {device!r}, expected none, cpu or nvme")
    return "cpu" if device == "none" and any(switches) else device


def _precision(settings: Settings, result: Conversion) -> None:
    """Take the type of the mixed precision; one that the file leaves open stays open."""
    said: dict[str, bool | str] = {}
    for name, key in (("bf16", "bf16"), ("bf16", "bfloat16"), ("fp16", "fp16")):
        if key in settings:
            said[name] = settings.switch(f"{key}.enabled") or said.get(name, False)
    if "torch_autocast" in settings and settings.switch("torch_autocast.enabled") is True:
        kind = str(settings.take("torch_autocast.dtype") or "bfloat16").removeprefix("torch.")
        said[{"bfloat16": "bf16", "float16": "fp16"}.get(kind, kind)] = True
    chosen = [name for name, value in said.items() if value is True]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(sorted(chosen))} are both enabled, expected at most one of them")
    if chosen and chosen[0] not in ("bf16", "fp16"):
        raise ValueError(f"torch_autocast.dtype: got {chosen[0]!r}, expected bfloat16 or float16")
    if chosen:
        result.config["mixed_precision"] = chosen[0]
        result.arguments[chosen[0]] = True
    elif said and "auto" not in said.values():
        result.config.setdefault("mixed_precision", "no")

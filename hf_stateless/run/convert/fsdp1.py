"""An accelerate config of FSDP1 as one of FSDP2, by accelerate's own table of keys and what that leaves out."""

from __future__ import annotations

from functools import cache
from typing import Any

from accelerate.commands.launch import launch_command_parser
from accelerate.commands.to_fsdp2 import ARGUMENT_KEY_MAPPING, convert_config_to_fsdp2
from accelerate.utils.constants import FSDP_AUTO_WRAP_POLICY, FSDP_SHARDING_STRATEGY, FSDP_STATE_DICT_TYPE

from .conversion import Conversion, plain_ddp, replicated
from .settings import Settings


# The name that accelerate had before.
OLDER_NAMES = {"fsdp_backward_prefetch_policy": "fsdp_backward_prefetch"}
NEW_NAMES = {name for name in ARGUMENT_KEY_MAPPING.values() if isinstance(name, str)}


def convert_fsdp1(values: dict[str, Any], config: dict[str, Any]) -> Conversion:
    """Return the accelerate config of FSDP2 that does what one of FSDP1 does.

    Args:
        values: its `fsdp_config`; keys may lack `fsdp_`, and choices may be numbers, as in older files.
        config: what the file says besides.

    Raises:
        ValueError: FSDP2 already, or a choice that FSDP1 does not have; the line names those it has.
    """
    named = {key if str(key).startswith("fsdp") else f"fsdp_{key}": value for key, value in values.items()}
    settings = Settings({OLDER_NAMES.get(key, key): value for key, value in named.items()})
    _refuse_fsdp2(settings)
    result = Conversion(config)
    strategy = _strategy(settings, result)
    if strategy == "NO_SHARD":
        return _without_shards(settings, result)
    new = {"fsdp_version": 1, "fsdp_sharding_strategy": strategy, "fsdp_auto_wrap_policy": _policy(settings, result)}
    new["fsdp_state_dict_type"] = _state_dict_type(settings, result)
    kept = {key: settings.take(key) for key in settings.left() if key in NEW_NAMES or key in _read_by_launch()}
    classes = "fsdp_transformer_layer_cls_to_wrap"
    if isinstance(kept.get(classes), list):
        kept[classes] = ",".join(map(str, kept[classes]))
    converted = convert_config_to_fsdp2({"fsdp_config": {**new, **kept}})
    result.config["fsdp_config"] = {"fsdp_version": 2, **converted["fsdp_config"]}
    if strategy.startswith("HYBRID"):
        machines, processes = config.get("num_machines", 1), config.get("num_processes")
        shard = processes // machines if processes and processes % machines == 0 else None
        replicated(result, shard, f"fsdp_sharding_strategy: {strategy}")
    _name_the_rest(settings, result)
    return result


@cache
def _read_by_launch() -> frozenset[str]:
    """Return what FSDP2 reads that FSDP1 did not have, and so is not in accelerate's table."""
    flags = {key for key in vars(launch_command_parser().parse_args(["script"])) if key.startswith("fsdp_")}
    return frozenset(flags | {"fsdp_ignored_modules"}) - set(ARGUMENT_KEY_MAPPING)


def _refuse_fsdp2(settings: Settings) -> None:
    version = settings.number("fsdp_version", least=1, whole=True)
    if version == 2:
        old = [key for key in settings.left() if key in ARGUMENT_KEY_MAPPING and key not in NEW_NAMES]
        advice = f"take {', '.join(old)} out, which FSDP2 does not read" if old else "use it as it is"
        raise ValueError(f"got fsdp_version: 2, expected a config of FSDP1 or DeepSpeed: {advice}")
    if version not in (None, 1):
        raise ValueError(f"fsdp_version: got {version}, expected 1 or none")


def _choice(settings: Settings, key: str, choices: list[str]) -> str | None:
    """Take one of several words, or its number in older files.

    Raises:
        ValueError: it is none of them.
    """
    value = settings.take(key)
    if value is None:
        return None
    numbers = {str(number): word for number, word in enumerate(choices, 1)}
    word = numbers.get(str(value), str(value).upper())
    if word not in choices or isinstance(value, bool):
        raise ValueError(f"{key}: got {value!r}, expected one of {', '.join(choices)}")
    return word


def _strategy(settings: Settings, result: Conversion) -> str:
    """Take how parameters are sharded: two keys may say it, and FSDP1 reads the older one."""
    keys = ("fsdp_sharding_strategy", "fsdp_reshard_after_forward")
    older, newer = (_choice(settings, key, FSDP_SHARDING_STRATEGY) for key in keys)
    if older and newer and older != newer:
        result.notes.append(f"{keys[0]}: {older} is what FSDP1 did, {keys[1]}: {newer} it did not read.")
    return older or newer or "FULL_SHARD"


def _policy(settings: Settings, result: Conversion) -> str:
    policy = _choice(settings, "fsdp_auto_wrap_policy", FSDP_AUTO_WRAP_POLICY) or "NO_WRAP"
    if policy == "NO_WRAP":
        result.notes.append(
            "fsdp_auto_wrap_policy: NO_WRAP gathers the whole model at once; TRANSFORMER_BASED_WRAP gathers one "
            "block after the other."
        )
    return policy


def _state_dict_type(settings: Settings, result: Conversion) -> str:
    kind = _choice(settings, "fsdp_state_dict_type", FSDP_STATE_DICT_TYPE)
    if kind == "LOCAL_STATE_DICT":
        result.notes.append("fsdp_state_dict_type: FSDP2 has no LOCAL_STATE_DICT, SHARDED_STATE_DICT takes its place.")
        return "SHARDED_STATE_DICT"
    return kind or "FULL_STATE_DICT"


def _without_shards(settings: Settings, result: Conversion) -> Conversion:
    """Return plain DDP, with what FSDP1 did besides."""
    result.config = plain_ddp(result.config)
    result.notes.append("fsdp_sharding_strategy: NO_SHARD shards nothing: plain DDP does the same.")
    if settings.switch("fsdp_activation_checkpointing") is True:
        result.arguments["gradient_checkpointing"] = True
    if settings.switch("fsdp_offload_params") is True:
        result.notes.append(
            "fsdp_offload_params: DDP moves nothing to the CPU; type fsdp_sharding_strategy: FULL_SHARD in the file "
            "and convert it again."
        )
    _name_the_rest(settings, result)
    return result


def _name_the_rest(settings: Settings, result: Conversion) -> None:
    """Say what became of the keys that FSDP2 does not have."""
    if settings.switch("fsdp_forward_prefetch") is True:
        result.notes.append("fsdp_forward_prefetch: not in accelerate's FSDP2; the results are the same without.")
    left = settings.left()
    done = [key for key in left if key in ARGUMENT_KEY_MAPPING or key in _read_by_launch()]
    if done:
        result.notes.append(f"{', '.join(done)}: not needed any more, nothing to type.")
    unknown = [key for key in left if key not in done]
    if unknown:
        result.notes.append(f"{', '.join(unknown)}: accelerate reads no such key, so nothing was written for it.")

"""A config file, DeepSpeed's or accelerate's, and the conversion that suits it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.config.config_args import ClusterConfig

from .conversion import Conversion
from .deepspeed import ACCELERATE_NAMES, convert_deepspeed
from .fsdp1 import convert_fsdp1


# DeepSpeed takes no config without one of the first two, accelerate none without the last.
OF_DEEPSPEED = {"train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization"}
OF_TRAINER = {
    "transformer_layer_cls_to_wrap",
    "fsdp_transformer_layer_cls_to_wrap",
    "auto_wrap_policy",
    "min_num_params",
}
LONGEST, MOST = 1 << 18, 10_000
"""Characters and values that a file may hold: a few lines of YAML can stand for billions of values."""
WANTED = "expected a DeepSpeed config (JSON) or an accelerate config with distributed_type: DEEPSPEED or FSDP"


def convert_file(path: str) -> Conversion:
    """Return the accelerate config of FSDP2 for a config file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no config of DeepSpeed or FSDP1, or one of its values is not known.
    """
    values = read_config(path)
    if "distributed_type" in values or "compute_environment" in values:
        return _of_accelerate(values, path)
    if OF_DEEPSPEED & set(values):
        config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_machines": 1}
        result = convert_deepspeed(values, config, {})
        result.taken_out = "deepspeed=..."
        return result
    if isinstance(values.get("deepspeed"), str):
        raise ValueError(f"these are the settings of a run; type: hf-stateless convert-config {values['deepspeed']}")
    if OF_TRAINER & set(values):
        raise ValueError('this is an fsdp_config of TrainingArguments: type "version": 2 in it, and it is FSDP2')
    if isinstance(values.get("fsdp_config"), (dict, str)):
        raise ValueError(
            "these are the settings of a run: type version: 2 in its fsdp_config (axolotl: fsdp_version: 2)"
        )
    raise ValueError(f"got a file with {', '.join(map(str, list(values)[:5])) or 'nothing'}, {WANTED}")


def read_config(path: str) -> dict[str, Any]:
    """Return the mapping in a file of JSON or YAML.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither, or holds something else than a mapping.
    """
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(LONGEST + 1)
    if len(text) > LONGEST:
        raise ValueError(f"got more than {LONGEST} characters, {WANTED}")
    is_json = path.endswith(".json") or text.lstrip().startswith("{")
    try:
        values = json.loads(text, object_pairs_hook=_once) if is_json else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise ValueError(f"not {'JSON' if is_json else 'YAML'}: {where}") from None
    if not isinstance(values, dict):
        kind = {list: "a list", type(None): "an empty file", str: "a text"}.get(type(values), repr(values))
        raise ValueError(f"got {kind}, {WANTED}")
    waiting, count = [values], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > MOST:
            raise ValueError(f"got more than {MOST} values, {WANTED}")
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a mapping of JSON, in which no key may stand twice: DeepSpeed refuses it as well."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"got {', '.join(twice)} twice, expected each key once")
    return values


def _of_accelerate(values: dict[str, Any], path: str) -> Conversion:
    """Convert a config of accelerate; its own code reads the older formats."""
    environment = values.get("compute_environment", "LOCAL_MACHINE")
    if environment != "LOCAL_MACHINE":
        raise ValueError(f"compute_environment: got {environment!r}, expected LOCAL_MACHINE")
    values = ClusterConfig.process_config(dict(values))
    kind = str(values["distributed_type"]).upper()
    known = {field.name for field in fields(ClusterConfig)}
    config = {key: value for key, value in values.items() if key in known and value not in (None, {})}
    blocks = {name: config.pop(name, {}) for name in ("deepspeed_config", "fsdp_config")}
    for name, block in blocks.items():
        if not isinstance(block, dict):
            raise ValueError(f"{name}: got {block!r}, expected a block of settings")
    if config.get("num_processes") == -1:  # accelerate's own word for none
        del config["num_processes"]
    for name in ("num_processes", "num_machines"):
        if name in config and (type(config[name]) is not int or config[name] < 1):
            raise ValueError(f"{name}: got {config[name]!r}, expected a whole number of at least 1")
    config["compute_environment"] = "LOCAL_MACHINE"
    other = "fsdp_config" if kind == "DEEPSPEED" else "deepspeed_config"
    if kind == "DEEPSPEED":
        result = _deepspeed_of_accelerate(blocks["deepspeed_config"], config, path)
    elif kind == "FSDP":
        result = convert_fsdp1(blocks["fsdp_config"], config)
    else:
        raise ValueError(f"distributed_type: got {kind}, {WANTED}")
    if blocks[other]:
        result.notes.append(f"{other}: left out, since distributed_type: {kind} does not read it.")
    unknown = sorted(str(key) for key in set(values) - known)
    if unknown:
        result.notes.append(f"{', '.join(unknown)}: accelerate reads no such key, so it is left out.")
    return result


def _deepspeed_of_accelerate(block: dict[str, Any], config: dict[str, Any], path: str) -> Conversion:
    """Convert DeepSpeed's settings in a config of accelerate, which stand there or in a JSON that it names."""
    own = {ACCELERATE_NAMES[key]: (key, value) for key, value in block.items() if key in ACCELERATE_NAMES}
    names = {new: key for new, (key, _) in own.items()}
    file = str(block.get("deepspeed_config_file") or "none")
    rest = {key: value for key, value in block.items() if key not in (*ACCELERATE_NAMES, "deepspeed_config_file")}
    if file == "none":
        # Accelerate's own defaults.
        values: dict[str, Any] = {"gradient_clipping": "auto", "zero_optimization": {"stage": 2}}
        for key, (_, value) in own.items():
            _put(values, key, value)
        return convert_deepspeed({**values, **rest}, config, names)
    # accelerate looks from where it is started; a person may convert from elsewhere.
    beside = Path(path).parent / file
    try:
        named = read_config(str(beside if beside.exists() and not Path(file).exists() else file))
        result = convert_deepspeed({**named, **rest}, config, {})
    except ValueError as error:
        raise ValueError(f"deepspeed_config_file {file}: {error}") from None
    if own:
        result.notes.append(f"{', '.join(names.values())}: left out, since {file} decides.")
    return result


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at a dotted name."""
    *blocks, last = key.split(".")
    for block in blocks:
        values = values.setdefault(block, {})
    values[last] = value

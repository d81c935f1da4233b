"""What reports, cards and predictions say about any run: the model inside PEFT, its adapter, its id, its options."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any


_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def base_of(model: Any) -> Any:
    """Return the model that PEFT has wrapped, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapter_of(model: Any) -> tuple[str, Any] | None:
    """Return the kind of a model's first PEFT adapter, such as `LORA`, and its config; None where there is none."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        return None
    config = next(iter(configs.values()))
    return str(getattr(config.peft_type, "value", config.peft_type)), config


def is_hub_id(name: str) -> bool:
    """Tell whether a name can be an id on the Hub."""
    return _HUB_ID.fullmatch(name) is not None and len(name) <= 200 and ".." not in name


def hub_id(name: str) -> str | None:
    """Return the name of a model if it is an id on the Hub, None for a local path."""
    return name if is_hub_id(name) and not os.path.exists(name) else None


def option_pairs(optim_args: str | None) -> list[tuple[str, str]]:
    """Split `optim_args` as the Trainer does; what has no `=` gets an empty value."""
    parts = [part.partition("=") for part in optim_args.replace(" ", "").split(",")] if optim_args else []
    return [(key, value) for key, _, value in parts]

"""What trackers are told: trackio keeps all arguments of a run and, where a trainer pushes, puts them on the Hub."""

from __future__ import annotations

import sys
from typing import Any

from .private import Machine


def clean_tracker(machine: Machine) -> None:
    """Cut tokens and folders of this machine out of the configuration of trackio's run, before it is written.

    Args:
        machine: what must not be told.
    """
    config: Any = getattr(sys.modules.get("trackio"), "config", None)
    if not hasattr(config, "items"):
        return
    for key, value in list(config.items()):
        cleaned = _cleaned(machine, value)
        if cleaned != value:
            config[key] = cleaned


def _cleaned(machine: Machine, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned(machine, inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(machine, inner) for inner in value]
    return machine.without_private(value) if isinstance(value, str) else value

"""The learning rate of a group: what the scheduler moves, times a multiple of its kind of parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def rate_scale(group: Mapping[str, Any]) -> float:
    """Return the multiple of the learning rate that a group takes, which `<role>_lr_scale` says; 1 where nothing does.

    Args:
        group: of an optimizer, with its `role`.

    Example:
        >>> from hf_stateless.update.rate import rate_scale
        >>> rate_scale({"role": "head", "embedding_lr_scale": 1.0, "head_lr_scale": 4.0})
        4.0
    """
    return float(group.get(f"{group.get('role')}_lr_scale", 1.0))


def learning_rate(group: Mapping[str, Any]) -> Any:
    """Return the learning rate of a group: `lr`, a number or a tensor, times its `rate_scale`.

    It is multiplied here, at each step, and not once in `lr`: schedulers such as OneCycleLR write one `lr` into all
    groups, and a resumed run takes `lr` from its checkpoint.

    Args:
        group: of an optimizer, with `lr` and its `role`.

    Example:
        >>> from hf_stateless.update.rate import learning_rate
        >>> learning_rate({"lr": 0.5, "role": "rest", "rest_lr_scale": 16.0})
        8.0
    """
    scale = rate_scale(group)
    return group["lr"] if scale == 1 else group["lr"] * scale

"""The algorithms that a parameter group may name, with what groups of each of them hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .options import EVERY_RULE, OPTIONS, group_defaults


# What groups hold beside `OPTIONS`, with the defaults of groups that are made by hand. Plain values only: they are
# saved with the optimizer and read back by torch.load(weights_only=True).
_ADAMW = {
    "betas": (OPTIONS["adamw_beta1"].default, OPTIONS["adamw_beta2"].default),
    "eps": OPTIONS["adamw_eps"].default,
}
_OWN: dict[str, dict[str, Any]] = {
    "multinorm": {},
    "lora_product": {},
    "adamw": _ADAMW,
    "adamw_8bit": _ADAMW,
    "sinkhorn_momentum": {"momentum": 0.95, "num_iterations": 5.5, "row_threshold": 1e-3, "lr_scale": 0.18},
}
# What says of which kind the weights are; the params of `lora_product` are pairs of factors: A_0, B_0, A_1, B_1, ...
_OF_WEIGHTS: dict[str, dict[str, Any]] = {
    "multinorm": {"layout": "out_in"},
    "lora_product": {"scaling": 1.0, "layout": "out_in"},
}


def _held(algorithm: str) -> dict[str, Any]:
    return {**_OF_WEIGHTS.get(algorithm, {}), **_OWN[algorithm], **group_defaults(algorithm)}


ALGORITHMS: dict[str, dict[str, Any]] = {algorithm: _held(algorithm) for algorithm in _OWN}
"""What groups of each algorithm hold, with the defaults of groups that are made by hand."""
# The factors of a LoRA pair are complete at different times, and small: they are updated in `step()`.
RELEASED = {"matrices": frozenset({"multinorm"}), "all": frozenset(ALGORITHMS) - {"lora_product"}}
"""What is updated in backward: the algorithms of the groups, by the option `release`."""
COMMON: dict[str, Any] = {"weight_decay": 0.0, "role": "rest", **group_defaults(EVERY_RULE)}
"""What every group holds."""


def complete_group(param_group: Mapping[str, Any], lr: float) -> dict[str, Any]:
    """Return a group after checking it, with the defaults of its algorithm filled in.

    Args:
        param_group: with `params`, `algorithm` and any of the options of `ALGORITHMS` and `COMMON`.
        lr: learning rate of a group that has none.

    Raises:
        ValueError: no or unknown `algorithm`, an unknown key, or a learning rate that is negative or not finite.

    Example:
        >>> from hf_stateless.optimizer.groups import complete_group
        >>> complete_group({"params": [], "algorithm": "adamw"}, lr=0.1)["betas"]
        (0.9, 0.999)
    """
    algorithm = param_group.get("algorithm")
    if algorithm not in _OWN:
        raise ValueError(
            f"A parameter group needs algorithm={' | '.join(_OWN)}, got {algorithm!r}: "
            "type hf_stateless.create_optimizer(model, name, lr=...) to have the groups made from a model."
        )
    defaults = {**COMMON, **group_defaults(EVERY_RULE), **_held(algorithm)}
    known = {"params", "param_names", "algorithm", "lr", "initial_lr", *defaults}
    for key in param_group:
        if key not in known:
            raise ValueError(
                f"A group with algorithm={algorithm!r} has no option {key!r}. Valid: {', '.join(sorted(known))}."
            )
    lr = param_group.get("lr", lr)
    if not 0 <= float(lr) < math.inf:
        raise ValueError(f"The learning rate must be a finite number of at least 0, got {lr}.")
    factors = param_group.get("params")
    if algorithm == "lora_product" and isinstance(factors, list | tuple) and len(factors) % 2:
        raise ValueError(f"A group of LoRA pairs has params A_0, B_0, A_1, B_1, ..., got {len(factors)} of them.")
    return {**defaults, **param_group}


def told_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a group says of how its parameters are updated, without what is switched off or not used.

    Args:
        group: of a live optimizer of this package.

    Example:
        >>> from hf_stateless.optimizer.groups import complete_group, told_options
        >>> told_options(complete_group({"params": [], "algorithm": "lora_product"}, lr=0.1))
        {'norms': ('spectral',), 'num_iterations': 1, 'lr_scale': 0.2, 'stochastic_rounding': True}
    """
    algorithm = group["algorithm"]
    names = list(_OWN[algorithm])
    for option in OPTIONS.values():
        to = option.belongs_to
        used = (not to.norm or to.norm in group.get("norms", ())) and (not to.option or group.get(to.option))
        if option.on_card and used and not option.groups.keys().isdisjoint((algorithm, EVERY_RULE)):
            names.append(option.name)
    return {name: group[name] for name in names if group.get(name) not in (None, 0, "none")}

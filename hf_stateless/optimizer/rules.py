"""The table of rules, and the groups of parameters that name one of them as their `algorithm`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..norms.chain import Chain
from ..update.layout import Layout, layout_at, listed_layouts
from .adamw import ADAMW, ADAMW_8BIT
from .lora_product import LORA_PRODUCT
from .multinorm import MULTINORM
from .options import EVERY_RULE, OPTIONS, group_defaults, on_demand
from .rates import SCALES
from .rule import Rule
from .sinkhorn_momentum import SINKHORN_MOMENTUM
from .table_moments import COLUMN_MOMENT, FACTORED, ROW_MOMENT


RULES: dict[str, Rule] = {
    "multinorm": MULTINORM,
    "lora_product": LORA_PRODUCT,
    "adamw": ADAMW,
    "adamw_8bit": ADAMW_8BIT,
    "sinkhorn_momentum": SINKHORN_MOMENTUM,
    "row_moment": ROW_MOMENT,
    "column_moment": COLUMN_MOMENT,
    "factored": FACTORED,
}
COMMON: dict[str, Any] = {"weight_decay": 0.0, "role": "rest", **group_defaults(EVERY_RULE)}
"""What every group holds."""
# What says of which kind the weights are, and nothing of the method.
_OF_WEIGHTS = ("layout", "layouts", "scaling")


def complete_group(param_group: Mapping[str, Any], lr: float) -> dict[str, Any]:
    """Return a group after checking it, with the defaults of its rule filled in.

    Args:
        param_group: with `params`, `algorithm` and any of the options that groups of this rule hold.
        lr: learning rate of a group that has none.

    Raises:
        ValueError: no or unknown `algorithm`, an unknown key, names that are not as many as the parameters, a layout
            that is unknown or does not fit a shape, or a learning rate that is negative or not finite.

    Example:
        >>> from hf_stateless.optimizer.rules import complete_group
        >>> complete_group({"params": [], "algorithm": "adamw"}, lr=0.1)["betas"]
        (0.9, 0.999)
    """
    algorithm = param_group.get("algorithm")
    if algorithm not in RULES:
        raise ValueError(
            f"A parameter group needs algorithm={' | '.join(RULES)}, got {algorithm!r}: "
            "type hf_stateless.create_optimizer(model, name, lr=...) to have the groups made from a model, or "
            "{'params': [...], 'algorithm': 'adamw'} for a group that is added later."
        )
    defaults = {
        **COMMON,
        **group_defaults(EVERY_RULE),
        **RULES[algorithm].options,
        **group_defaults(algorithm),
    }
    known = {"params", "param_names", "algorithm", "lr", "initial_lr", *SCALES, *on_demand(algorithm), *defaults}
    for key in param_group:
        if key not in known:
            raise ValueError(
                f"A group with algorithm={algorithm!r} has no option {key!r}. Valid: {', '.join(sorted(known))}."
            )
    lr = param_group.get("lr", lr)
    if not 0 <= float(lr) < math.inf:
        raise ValueError(f"The learning rate must be a finite number of at least 0, got {lr}.")
    factors = param_group.get("params")
    _refuse_unnamed(factors, param_group.get("param_names"))
    for i, p in enumerate(factors if isinstance(factors, list | tuple) and "layout" in defaults else ()):
        shape = (p[1] if isinstance(p, tuple) else p).shape
        _refuse_shape(layout_at({**defaults, **param_group}, i), shape, f"Parameter {i} of a group of {algorithm!r}")
    if algorithm == "lora_product" and isinstance(factors, list | tuple) and len(factors) % 2:
        raise ValueError(f"A group of LoRA pairs has params A_0, B_0, A_1, B_1, ..., got {len(factors)} of them.")
    return {**defaults, **param_group}


def _refuse_shape(layout: Layout, shape: Sequence[int], what: str) -> None:
    """Refuse a parameter that is no matrix in this layout: a step would fail after others have been updated."""
    if len(shape) < 2 and not layout.any_length:
        raise ValueError(
            f"{what} has shape {tuple(shape)}, and layout={layout.name!r} needs a matrix: give it a group of its own "
            "with algorithm='adamw', or with layout='vector'."
        )
    layout.sizes(shape)


def _refuse_unnamed(params: Any, names: Sequence[str] | None) -> None:
    """Refuse a group whose parameters are others than those it was made of: layouts are known by the position."""
    if names is not None and isinstance(params, list | tuple) and len(names) != len(params):
        raise ValueError(
            f"A group has {len(params)} parameters and {len(names)} param_names: something took parameters out of a "
            "group that was made from a model, or put some in (sentence-transformers: learning_rate_mapping). Leave "
            "that out; freeze what must not train before the optimizer is made."
        )


def named_alike(group: dict[str, Any], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a late group with names where the others have some, and without where not: torch refuses a mixture.

    Args:
        group: as it is given to `add_param_group`; pairs of name and parameter are taken apart.
        others: the groups that there are.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.rules import named_alike
        >>> first, late = torch.zeros(2), torch.zeros(3)
        >>> named_alike({"params": [late]}, [{"params": [first], "param_names": ["norm.weight"]}])["param_names"]
        ['parameter 1']
    """
    params, named = group["params"], any("param_names" in other for other in others)
    # A set has no order: torch refuses it.
    if not others or isinstance(params, set) or (named and "param_names" in group):
        return group
    params = [params] if isinstance(params, Tensor) else list(params)
    first = sum(len(other["params"]) for other in others)
    pairs = [p if isinstance(p, tuple) else (f"parameter {i}", p) for i, p in enumerate(params, start=first)]
    alike = {**group, "params": [p for _, p in pairs], "param_names": [name for name, _ in pairs]}
    if not named:
        del alike["param_names"]
    return alike


def part_of_group(group: Mapping[str, Any], positions: Sequence[int]) -> dict[str, Any]:
    """Return a group with some of its parameters only, each with its own layout; names, which are for messages, go.

    Args:
        group: made from a model, see `hf_stateless.trainer.factory.parameter_groups`.
        positions: of the parameters; of pairs both.

    Example:
        >>> from hf_stateless.optimizer.rules import part_of_group
        >>> part_of_group({"params": ["q", "qkv"], "layout": "out_in", "layouts": "1=out_in*3"}, [1])
        {'params': ['qkv'], 'layout': 'out_in', 'layouts': '0=out_in*3'}
    """
    part = {key: value for key, value in group.items() if key != "param_names"}
    part["params"] = [group["params"][i] for i in positions]
    if group.get("layouts"):
        part["layouts"] = listed_layouts([layout_at(group, i).name for i in positions])
    return part


def told_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a group says of how its parameters are updated, without what is switched off or not used.

    Args:
        group: of a live optimizer of this package.

    Example:
        >>> from hf_stateless.optimizer.rules import complete_group, told_options
        >>> told_options(complete_group({"params": [], "algorithm": "lora_product"}, lr=0.1))
        {'norms': ('spectral',), 'num_iterations': 1, 'lr_scale': 0.2, 'stochastic_rounding': True}
    """
    algorithm = group["algorithm"]
    names = [name for name in RULES[algorithm].options if name not in _OF_WEIGHTS]
    for option in OPTIONS.values():
        to = option.belongs_to
        used = (not to.whitening or Chain.of(group).whitens) and (not to.option or group.get(to.option))
        if option.on_card and used and not option.groups.keys().isdisjoint((algorithm, EVERY_RULE)):
            names.append(option.name)
    told = {name: group[name] for name in names if group.get(name) not in (None, 0, "none")}
    return told | {name: group[name] for name in SCALES if name in group}

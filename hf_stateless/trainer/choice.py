"""Which rule updates a parameter, with which values of the options; and what a checkpoint may choose in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..optimizer.followed import TABLE_OPTIONS, Otherwise
from ..optimizer.lora_product import product_chain
from ..optimizer.options import group_values
from ..optimizer.rules import RULES
from ..update.layout import one_layout
from .adapters import is_factor
from .optim_args import Options
from .partition import PartitionedParameter


def rule_of(entry: PartitionedParameter, options: Options, lr: float) -> dict[str, Any]:
    """Return the algorithm of one parameter with the values that its group holds.

    Args:
        entry: the parameter, with its role.
        options: of the run.
        lr: learning rate of the run.

    Raises:
        ValueError: `embeddings` or `heads` asks for a rule of tables where a weight has more than two dimensions.
    """
    algorithm, extra = _algorithm(entry, options), {}
    if algorithm in ("multinorm", "lora_product"):
        extra = _of_chain(entry, options, algorithm)
    elif options.adamw_lr is not None:
        lr = options.adamw_lr
    scale = getattr(options, f"{entry.role}_lr_scale", 1.0)
    if scale != 1:
        extra[f"{entry.role}_lr_scale"] = scale
    return {"lr": lr, **_values(algorithm, options, entry.role), **extra}


def otherwise(groups: Sequence[Mapping[str, Any]], options: Options) -> Otherwise:
    """Return which groups may take the rule of a checkpoint, and what they would hold under each: tables by default.

    Args:
        groups: of the run, in their order.
        options: of the run.
    """
    found = {}
    for position, group in enumerate(groups):
        # Other groups of these roles have what is no table: biases, and factors.
        if group["role"] in options.not_asked and group["algorithm"] == options.embeddings:
            found[position] = {
                name: {**_values(name, options, group["role"]), "weight_decay": group["weight_decay"] * rule.decays}
                for name, rule in RULES.items()
                if rule.for_tables
            }
    return found


def is_chained(entry: PartitionedParameter) -> bool:
    """Tell whether a chain of norms updates a parameter, whatever updates the rest."""
    return entry.role in ("matrix", "adapter")


def _values(algorithm: str, options: Options, role: str) -> dict[str, Any]:
    """Return what groups of a rule take from the options, the rule included."""
    shared = {"betas": (options.adamw_beta1, options.adamw_beta2), "eps": options.adamw_eps}
    held = {name: value for name, value in shared.items() if name in RULES[algorithm].options}
    return {"algorithm": algorithm, **group_values(algorithm, options, role), **held}


def _algorithm(entry: PartitionedParameter, options: Options) -> str:
    chosen = str((entry.role == "head" and options.heads) or options.embeddings)
    if is_chained(entry) or chosen == "stateless":
        return "lora_product" if entry.pair and options.lora == "product" else "multinorm"
    if not _is_table(entry):
        _refuse_dimensions(entry, options, chosen)
        return "adamw"
    return "adamw" if RULES[chosen].by_rows and is_factor(entry.name) else chosen


def _refuse_dimensions(entry: PartitionedParameter, options: Options, chosen: str) -> None:
    """Refuse a rule that was asked for where a weight is no table; biases are never meant."""
    asked = entry.role in TABLE_OPTIONS and entry.role not in options.not_asked
    if asked and RULES[chosen].by_rows and entry.parameter.ndim > 2:
        raise ValueError(
            f"{entry.name} has the shape {tuple(entry.parameter.shape)}, and {chosen} is for tables of two "
            f"dimensions: type {TABLE_OPTIONS[entry.role]}=adamw in optim_args, or freeze it."
        )


def _of_chain(entry: PartitionedParameter, options: Options, algorithm: str) -> dict[str, Any]:
    """Return what the options alone do not say: the kind of the weight, and what differs beside the matrices."""
    if entry.pair and algorithm == "lora_product":
        norms, num_iterations = product_chain(options.norms, options.num_iterations)
        chain = {"norms": norms, "num_iterations": num_iterations, "lr_scale": options.lr_scale_beside}
        return {**chain, "scaling": entry.pair.scaling, "layout": entry.pair.layout}
    if is_chained(entry):
        return {"layout": one_layout(entry.layout)}
    if _is_table(entry):
        return {"layout": one_layout(entry.layout), "lr_scale": options.lr_scale_beside}
    # A vector has one norm only: its entries are scaled to root mean square 1.
    vector = {"norms": ("frobenius",), "num_iterations": 1, "layout": "vector"}
    return {**vector, "lr_scale": options.lr_scale_beside}


def _is_table(entry: PartitionedParameter) -> bool:
    return entry.role in TABLE_OPTIONS and entry.parameter.ndim == 2

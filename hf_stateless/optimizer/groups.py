"""The algorithms that a parameter group may name, with the options that each of them has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


# What a group of each algorithm has to say, with the defaults of groups that are made by hand. Plain values only: they
# are saved with the optimizer and read back by torch.load(weights_only=True).
ALGORITHMS: dict[str, dict[str, Any]] = {
    "multinorm": {
        "norms": ("row_l2", "col_l2"),
        "num_iterations": 5,
        "whitening": "newton_schulz",
        "ns_steps": None,
        "ns_beta": None,
        "ns_dtype": None,
        "lr_scale": 0.4,
        "layout": "out_in",
        "split_whitening": False,
        "min_signal": 0.0,
        "momentum": 0.0,
        "momentum_dtype": "int8",
        "width_rule": "none",
    },
    # The params of such a group are pairs of LoRA factors: A_0, B_0, A_1, B_1, ...
    "lora_product": {
        "norms": ("spectral",),
        "num_iterations": 1,
        "lr_scale": 0.2,
        "scaling": 1.0,
        "layout": "out_in",
        "min_signal": 0.0,
    },
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8},
    "adamw_8bit": {"betas": (0.9, 0.999), "eps": 1e-8},
    "sinkhorn_momentum": {"momentum": 0.95, "num_iterations": 5.5, "row_threshold": 1e-3, "lr_scale": 0.18},
}
# The factors of a LoRA pair are complete at different times, and small: they are updated in `step()`.
RELEASED = {"matrices": frozenset({"multinorm"}), "all": frozenset(ALGORITHMS) - {"lora_product"}}
"""What layer-wise updates release in backward: the algorithms of the groups, by the option `release`."""
COMMON: dict[str, Any] = {"weight_decay": 0.0, "stochastic_rounding": True, "seed": 0, "role": "rest"}


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
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"A parameter group needs algorithm={' | '.join(ALGORITHMS)}, got {algorithm!r}: "
            "type hf_stateless.create_optimizer(model, name, lr=...) to have the groups made from a model."
        )
    known = {"params", "param_names", "algorithm", "lr", "initial_lr", *COMMON, *ALGORITHMS[algorithm]}
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
    return {**COMMON, **ALGORITHMS[algorithm], **param_group}

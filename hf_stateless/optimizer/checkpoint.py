"""Loading a checkpoint into parameter groups: the options of the run win, another optimizer's state is refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ranks.placement import local_shard


logger = logging.getLogger(__name__)

# The Trainer loads the files of optimizer and scheduler both or neither.
_FROM_WEIGHTS = (
    "To go on from the weights alone, give the checkpoint's folder as the model of a new run. If you delete "
    "optimizer.pt and resume, the learning rate schedule starts over, warm-up included, at the old step count."
)
_DAMAGED = f"the checkpoint is damaged. {_FROM_WEIGHTS}"
_NEVER_NEGATIVE = (
    *("step", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax", "momentum_scale", "recent_norms"),
    *("row_moment", "row_weight", "column_moment", "column_weight", "table_moment"),
)
# What a checkpoint decides when it is resumed; everything else in a group is an option of the run.
_FROM_CHECKPOINT = ("params", "param_names", "lr", "initial_lr")


def options_of(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the options of each group, without what a checkpoint decides (parameters and learning rate).

    Example:
        >>> from hf_stateless.optimizer.checkpoint import options_of
        >>> options_of([{"params": [], "lr": 0.1, "lr_scale": 0.2}])
        [{'lr_scale': 0.2}]
    """
    return [{key: value for key, value in group.items() if key not in _FROM_CHECKPOINT} for group in groups]


def apply_options(groups: Sequence[dict[str, Any]], options: Sequence[Mapping[str, Any]]) -> None:
    """Put the options of the run back into groups that were loaded, with one warning that has all that differ.

    Args:
        groups: groups as they were loaded, changed in place.
        options: from `options_of` before loading.

    Example:
        >>> from hf_stateless.optimizer.checkpoint import apply_options
        >>> groups = [{"params": [], "lr": 0.1, "lr_scale": 0.2}]
        >>> apply_options(groups, [{"lr_scale": 0.2}])
        >>> groups[0]["lr_scale"]
        0.2
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for group, current in zip(groups, options, strict=True):
        changed |= {key: (group.get(key), value) for key, value in current.items() if group.get(key) != value}
        group.update(current)
    changed.pop("layouts", None)  # how factors of experts are divided: no option, and older checkpoints lack it
    if changed:
        saved, now = (", ".join(f"{key}={values[i]!r}" for key, values in sorted(changed.items())) for i in (0, 1))
        logger.warning("The checkpoint was written with %s; this run goes on with %s.", saved, now)


def with_saved_dtypes(saved: Mapping[str, Tensor], param: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter in the dtypes that it was saved in, which torch does not keep."""
    return {name: value.to(param.device, copy=value.numel() == 1) for name, value in saved.items()}


def check_same_groups(saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a state that belongs to another optimizer or to other groups of parameters.

    Raises:
        ValueError: with what differs and how to go on.
    """
    if any("algorithm" not in group for group in saved):
        raise ValueError(
            "This optimizer state was written by another optimizer than hf_stateless and cannot be converted. "
            + _FROM_WEIGHTS
        )
    sizes = [[(_kept(group["algorithm"]), len(group["params"])) for group in groups] for groups in (saved, current)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The checkpoint has the groups (algorithm, parameters) {sizes[0]}, this run has {sizes[1]}: use the "
            f"same optim, embeddings and optim_target_modules. {_FROM_WEIGHTS}"
        )


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], name: str) -> None:
    """Refuse a state that is not of the shape of its parameter: an update would write past its end.

    Args:
        state: of one parameter; what `expected` does not name is not looked at.
        expected: the shape of each tensor that its rule keeps.
        name: of the parameter.

    Raises:
        ValueError: with the name, both shapes, and what to type.
    """
    for key, shape in expected.items():
        got = tuple(state[key].shape) if isinstance(state.get(key), Tensor) else "nothing"
        fits = got == tuple(shape) or (key == "step" and isinstance(got, tuple) and state[key].numel() == 1)
        if not fits:
            raise ValueError(
                f"The state of {name} has {key} of shape {got}, expected {tuple(shape)}: after a change of shape, "
                f"such as resize_token_embeddings, make a new optimizer. {_FROM_WEIGHTS}"
            )


def check_values(state: Mapping[str, Tensor], name: str) -> None:
    """Refuse a saved state with values that would make a weight NaN: not finite, or negative where none can be.

    Raises:
        ValueError: with the name of the parameter and of the tensor.
    """
    for key, saved in state.items():
        tensor = local_shard(saved)
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        least, most = (float(extreme) for extreme in torch.aminmax(tensor))
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ValueError(f"The saved {key} of {name} is not finite: {_DAMAGED}")
        if least < 0 and key in _NEVER_NEGATIVE:
            raise ValueError(f"The saved {key} of {name} is negative ({least:.3g}): {_DAMAGED}")


def _kept(algorithm: str) -> str:
    """Return one name for algorithms that keep the same state of the same parameters."""
    return "multinorm" if algorithm == "lora_product" else algorithm

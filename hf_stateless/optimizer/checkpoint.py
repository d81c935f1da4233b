"""Loading a checkpoint into parameter groups: the options of the run win, another optimizer's state is refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..norms.chain import Chain
from ..ranks.placement import local_shard
from .followed import said
from .options import OPTIONS, on_demand
from .rates import SCALES
from .rule import state_on_meta
from .rules import RULES


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
_OF_WHITENING = tuple(name for name, option in OPTIONS.items() if option.belongs_to.whitening)
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
        unsaid = {**dict.fromkeys(SCALES, 1.0), **on_demand(str(current.get("algorithm")))}
        saved, now = {**unsaid, **group}, {**unsaid, **current}
        without = _OF_WHITENING if not Chain.of(current).whitens else ()  # which then means nothing
        differ = [key for key, value in now.items() if saved.get(key) != value and key not in without]
        changed |= {key: (saved.get(key), now[key]) for key in differ}
        for key in unsaid:
            group.pop(key, None)
        group.update(current)
    changed.pop("layouts", None)  # how factors of experts are divided: no option, and older checkpoints lack it
    if changed:
        old, new = (", ".join(f"{key}={values[i]!r}" for key, values in sorted(changed.items())) for i in (0, 1))
        logger.warning("The checkpoint was written with %s; this run goes on with %s.", old, new)


def tell_rates(saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]) -> None:
    """Warn of learning rates that a run asks for in vain: the schedule of a checkpoint goes on with its own.

    Args:
        saved: groups of the checkpoint.
        current: groups of the run before they are loaded, `initial_lr` included if a scheduler has them.
    """
    scheduled = [pair for pair in zip(saved, current, strict=True) if all("initial_lr" in group for group in pair)]
    rates = {(float(old["initial_lr"]), float(new["initial_lr"])) for old, new in scheduled}
    changed = {(old, new) for old, new in rates if old != new}
    if changed:
        old, new = (", ".join(f"{rate:g}" for rate in sorted(set(side))) for side in zip(*changed, strict=True))
        logger.warning(
            "This run asks for the learning rate %s and the checkpoint was written with %s, with which its schedule "
            "goes on. For another rate give the checkpoint's folder as the model of a new run.",
            new,
            old,
        )


def fitted_state(saved: Mapping[str, Tensor], param: Tensor, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a saved state in the dtypes and strides that a rule keeps, where torch gives all of it the parameter's.

    Kernels write by the strides that they expect: what is stored in another order, or as one number, is copied.

    Args:
        saved: of one parameter.
        param: the parameter.
        made: what its rule would make, as tensors without contents; a momentum is fitted by its own rule.
    """
    return {name: _fitted(name, value, param, made.get(name)) for name, value in saved.items()}


def _fitted(name: str, value: Tensor, param: Tensor, made: Tensor | None) -> Tensor:
    dtype = value.dtype if made is None or name.startswith("momentum") else made.dtype
    value = value.to(param.device, dtype, copy=value.numel() == 1)
    if made is None or isinstance(value, DTensor) or value.numel() == 1 or value.stride() == made.stride():
        return value
    return torch.empty_like(made, dtype=dtype, device=param.device).copy_(value)


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
    for rate in (group[key] for group in saved for key in ("lr", "initial_lr") if key in group):
        if isinstance(rate, str | bool) or not 0 <= float(rate) < math.inf:
            raise ValueError(f"The saved learning rate is {rate!r}, no finite number of at least 0: {_DAMAGED}")
    sizes = [[(_kept(group["algorithm"]), len(group["params"])) for group in groups] for groups in (saved, current)]
    if sizes[0] != sizes[1]:
        asked = f' (optim_args="{tables}")' if (tables := said(saved)) else ""
        raise ValueError(
            f"The checkpoint has the groups (algorithm, parameters) {sizes[0]}, this run has {sizes[1]}: use the "
            f"same optim, embeddings{asked} and optim_target_modules, and train the same parameters (what is frozen, "
            f"adapters). {_FROM_WEIGHTS}"
        )


def checked_states(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], name_of: Callable[[int], str]
) -> dict[int, dict[str, Tensor]]:
    """Refuse a saved state that does not fit, before any of it is loaded; return what the rules would make.

    Args:
        state_dict: of an optimizer with the same groups.
        groups: of the run.
        name_of: gives the name of a parameter by its position.

    Raises:
        ValueError: a tensor of another shape or kind, or with values that would make a weight NaN.
    """
    index, every = 0, {}
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        for i, p in zip(saved["params"], group["params"], strict=True):
            state, name = state_dict["state"].get(i, {}), name_of(index)
            index += 1
            every[i] = made = state_on_meta(RULES[group["algorithm"]], p, group)
            check_state(state, {key: tensor for key, tensor in made.items() if key in state}, name)
            check_values(state, name)
    return every


def check_state(
    state: Mapping[str, Tensor], made: Mapping[str, Tensor], name: str, advice: str = _FROM_WEIGHTS
) -> None:
    """Refuse a state that is not of the shape of its parameter: an update would write past its end.

    Args:
        state: of one parameter; what `made` does not name is not looked at.
        made: what its rule would make, as tensors without contents.
        name: of the parameter.
        advice: how to go on, which a checkpoint has and a running optimizer has not.

    Raises:
        ValueError: with the name, both shapes or dtypes, and what to type.
    """
    for key, expected in made.items():
        shape, got = expected.shape, tuple(state[key].shape) if isinstance(state.get(key), Tensor) else "nothing"
        fits = got == tuple(shape) or (key == "step" and isinstance(got, tuple) and state[key].numel() == 1)
        if not fits:
            raise ValueError(
                f"The state of {name} has {key} of shape {got}, expected {tuple(shape)}: after a change of shape, "
                f"such as resize_token_embeddings, make a new optimizer. {advice}".rstrip()
            )
        kinds = [tensor.is_floating_point() for tensor in (state[key], expected)]
        if kinds[0] != kinds[1] and not key.startswith("momentum"):  # whose dtype an option may have changed
            raise ValueError(f"The saved {key} of {name} is {state[key].dtype}, expected {expected.dtype}: {_DAMAGED}")


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

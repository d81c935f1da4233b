"""Rounding keys of the parameters of a group: the same on all replicas, different for each shard and each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ranks.placement import shard_number
from ..weights.int8.weight import Int8Weight
from ..weights.rounding import rounding_key, rounding_keys


def key_of(group: Mapping[str, Any], index: int, param: Tensor, step: Tensor) -> Tensor:
    """Return the rounding key of one parameter.

    Args:
        group: for its `seed`.
        index: position of the parameter among all of the optimizer.
        param: the parameter.
        step: its one-element counter.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.rounding_keys import key_of
        >>> key_of({"seed": 0}, 0, torch.ones(2), torch.ones(1)).shape
        torch.Size([1])
    """
    return rounding_key(_seed(group, param), index, step.to(param.device))


def keys_of(
    group: Mapping[str, Any], batch: Sequence[tuple[int, Tensor]], steps: Sequence[Tensor]
) -> list[Tensor] | None:
    """Return the rounding keys of bf16 and 8-bit parameters, or None where nothing is rounded stochastically.

    Args:
        group: for its `seed` and `stochastic_rounding`.
        batch: positions and parameters.
        steps: their one-element counters.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.rounding_keys import keys_of
        >>> keys_of({"seed": 0, "stochastic_rounding": True}, [(0, torch.ones(2))], [torch.ones(1)])  # float32
    """
    indices, params = zip(*batch, strict=True)
    rounded = any(p.dtype == torch.bfloat16 or isinstance(p, Int8Weight) for p in params)
    if not group["stochastic_rounding"] or not rounded:
        return None
    seeds = [_seed(group, p) for p in params]
    return rounding_keys(seeds, indices, [s.to(p.device) for p, s in zip(params, steps, strict=True)])


def _seed(group: Mapping[str, Any], param: Tensor) -> int:
    return int(group["seed"]) + 0x01000193 * shard_number(param)

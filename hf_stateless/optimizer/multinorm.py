"""The rule of matrices: W <- (1 - lr weight_decay) W - lr lr_scale X, X the multi-normalized gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ranks.matrix_update import MatrixUpdate
from ..ranks.placement import local_shard, part_of
from ..ranks.ways import apply_, shares_whitening
from ..update.reads import reads_at_once
from ..weights.cuts import whole_tensor
from ..weights.noise import TensorCache
from ..weights.stored import Lost, StoredWeight
from .momentum import feed_back_, has_momentum, momentum_bytes, momentum_direction_, momentum_state
from .rule import Entry, Host, Rule, counter, key_of, keys_of


def update(entries: list[Entry], host: Host) -> None:
    """Update matrices; what ranks work on together goes through the same collectives for all groups."""
    updates = [
        MatrixUpdate(
            entry.param,
            entry.grad,
            entry.group,
            key=key,
            average=_average(entry, host.cache),
            feed=_feed(entry, host.cache),
            shared=not entry.in_backward and shares_whitening(entry.group),
            stored_as=entry.layout.name,
            # Momentum makes the direction of what is held back zero.
            allowed=None if has_momentum(entry.group) else entry.usable,
        )
        for entry, key in zip(entries, keys_of(entries, host.cache), strict=True)
    ]
    apply_(updates, host.workspace)
    host.count(entries, [update.finite for update in updates])


def _average(entry: Entry, cache: TensorCache) -> Callable[[], Tensor] | None:
    """Return what takes the gradient into its average and gives the direction, or None without momentum."""
    if not has_momentum(entry.group):
        return None
    key, momentum = key_of(entry, cache), entry.group["momentum"]
    average = partial(momentum_direction_, entry.param, entry.grad, entry.state, key, momentum, usable=entry.usable)
    return average if entry.layout.blocks == 1 else lambda: average(still=_still(entry))


def _feed(entry: Entry, cache: TensorCache) -> Lost | None:
    """Return what takes into the average what rounding left out of a weight in 8 bits, or None where nothing does."""
    wanted = entry.group.get("rounding_feedback") and has_momentum(entry.group)
    if not wanted or not isinstance(local_shard(entry.param), StoredWeight):
        return None
    return partial(feed_back_, entry.state, key_of(entry, cache), entry.group["momentum"])


def _still(entry: Entry) -> Tensor | None:
    """Tell of this rank's part of several matrices in one which entries are of a matrix without gradient, if any."""
    grad = whole_tensor(entry.grad)
    zero = entry.layout.norms(grad) == 0
    if reads_at_once(zero.device) and not bool(zero.any()):
        return None
    return part_of(entry.layout.spread(zero, grad.shape), entry.param)


def _state(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    average = momentum_state(param, group["momentum_dtype"]) if has_momentum(group) else {}
    return {"step": counter(param), **average}


def _state_bytes(shape: Sequence[int], dtype: torch.dtype, group: Mapping[str, Any]) -> int:
    return 4 + (momentum_bytes(shape, group["momentum_dtype"]) if has_momentum(group) else 0)


MULTINORM = Rule(
    update,
    _state,
    _state_bytes,
    {"layout": "out_in", "layouts": ""},
    released="matrices",
    has_moments=has_momentum,
    takes_stored=True,
)

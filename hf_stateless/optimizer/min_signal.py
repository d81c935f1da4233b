"""Telling a gradient that carries a signal from a nearly empty one, for rules that ignore a gradient's size."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ranks.placement import total_norm
from ..update.reads import reads_at_once
from .rule import Entry


logger = logging.getLogger(__name__)

# Norms that are remembered, how many of them have to be known before a step is judged, and which of them it is
# compared with. Not the median: where most batches are empty, that is the norm of an empty one.
_WINDOW, _FEWEST, _QUANTILE = 64, 16, 0.9


def new_history(param: Tensor) -> Tensor:
    """Return a history of norms in which none is known yet, where the parameter is.

    A tensor among the optimizer's state, since of a FULL checkpoint FSDP2 gives the plain values of a group to the
    first rank only.
    """
    return torch.zeros(_WINDOW, dtype=torch.float32, device=param.device)


def measure_signal(grads: Sequence[Tensor], history: Tensor) -> float | Tensor:
    r"""Return the norm of some gradients together over that of informative steps, and remember the norm.

    s = ||g|| / q with q the 90th percentile of the norms of the last 64 steps, whether they were held back or not: a
    lower level of all gradients is accepted after 58 steps. State kept: these norms.

    Args:
        grads: of all parameters that are guarded; on several processes a collective of all of them.
        history: the norms, the latest last and 0 where none is known, changed in place.

    Returns:
        s, the same on all processes; where reading would wait for the device, as a tensor on it. Infinity where fewer
        than 16 norms are known and where a gradient is not finite, which its own rule refuses; 0 for a zero gradient.
        Neither of the last two is remembered.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.min_signal import measure_signal
        >>> history = torch.full((64,), 10.0)
        >>> round(measure_signal([torch.tensor([0.3, 0.4])], history), 4)
        0.05
        >>> history[-1]
        tensor(0.5000)
    """
    norm_there = _on_all_processes(total_norm(grads))
    if not reads_at_once(norm_there.device):
        return _signal_on_device(norm_there, history)
    norm = float(norm_there)
    if norm in (0, math.inf):
        return norm
    known: list[float] = sorted(value for value in history.tolist() if value)
    history.copy_(torch.cat([history[1:], history.new_tensor([norm])]))
    if len(known) < _FEWEST:
        return math.inf
    return norm / known[math.ceil(_QUANTILE * len(known)) - 1]


def _signal_on_device(norm: Tensor, history: Tensor) -> Tensor:
    """Do what `measure_signal` does without reading anything back."""
    remembered = (norm > 0) & (norm < math.inf)
    known, ordered = (history != 0).sum(), history.sort().values  # the unknown first
    place = _WINDOW - known + (_QUANTILE * known.double()).ceil().long() - 1
    usual = ordered.gather(0, place.clamp_max(_WINDOW - 1).view(1))[0]
    history.copy_(torch.where(remembered, torch.cat([history[1:], norm.to(history).view(1)]), history))
    judged = torch.where(known < _FEWEST, math.inf, norm.double() / usual.double())
    return torch.where(remembered, judged, norm.double())


def guarded(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, Mapping[str, Any]]]:
    """Return the parameters of the groups that have a `min_signal`, with their groups."""
    return [(p, group) for group in groups if group.get("min_signal") for p in group["params"]]


def strong(entries: list[Entry], signal: float) -> list[Entry]:
    """Leave out what its group's `min_signal` holds back: a weak gradient must not become a full-size step."""
    return [entry for entry in entries if signal >= entry.group.get("min_signal", 0)]


def mark_weak(entries: Sequence[Entry], signal: Tensor) -> Tensor:
    """Mark as not usable what `strong` leaves out, on the device.

    Args:
        entries: of all parameters, changed in place.
        signal: from `measure_signal`.

    Returns:
        Whether there is any, and the signal.
    """
    least = {id(entry.group): entry.group.get("min_signal", 0) for entry in entries}
    # One flag for a group, so that its matrices stay together in one batch.
    flags = {of: signal >= value for of, value in least.items() if value}
    for entry in entries:
        if id(entry.group) in flags:
            entry.usable = flags[id(entry.group)].to(entry.param.device)
    held = torch.stack(list(flags.values())).logical_not().any() if flags else torch.zeros_like(signal)
    return torch.stack([held.to(signal.dtype), signal])


def log_held(count: int, signal: float) -> None:
    """Log that a step was held back, ever more rarely: the 1st, 2nd, 4th, 8th time.

    Args:
        count: how many were.
        signal: from `measure_signal`.
    """
    if count.bit_count() == 1:
        logger.warning(
            "min_signal skipped the matrix updates of this step (%d so far): the norm of their gradients is %.2g "
            "times that of informative steps.",
            count,
            signal,
        )


def refuse_release(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse groups that are guarded where gradients are freed before the norm of all of them is known.

    Raises:
        ValueError: a group has a `min_signal`.
    """
    if any(group.get("min_signal") for group in groups):
        raise ValueError(
            "min_signal compares the norm of all gradients, which layer-wise updates know only after they have "
            "changed the weights: leave out min_signal, or release."
        )


def _on_all_processes(norm: Tensor) -> Tensor:
    """Return the largest norm of all processes, so that replicas never decide differently by a rounding error."""
    norm = norm.nan_to_num(nan=math.inf, posinf=math.inf)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(norm, op=dist.ReduceOp.MAX)
    return norm

"""The walk over learning rates that the quality benchmarks share: factors of two, until the best lies inside."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar


Key = TypeVar("Key")
Records = Sequence[Mapping[str, Any]]


def walk(loss: Callable[[int], float], least: int) -> dict[int, float]:
    """Return the losses by exponent of two: the best has a worse neighbour on both sides, and `least` were tried."""
    losses = {k: loss(k) for k in (0, 1)}
    while True:
        best = min(losses, key=losses.__getitem__)
        low, high = min(losses), max(losses)
        if best == low:
            step = low - 1
        elif best == high:
            step = high + 1
        elif len(losses) < least:
            step = low - 1 if losses[low] < losses[high] else high + 1
        else:
            return losses
        losses[step] = loss(step)


def nearest(losses: Mapping[int, float], count: int | None) -> list[int]:
    """Return the exponents around the best one, `count` of them or all, in ascending order."""
    best = min(losses, key=losses.__getitem__)
    return sorted(sorted(losses, key=lambda k: (abs(k - best), losses[k]))[:count])


def best_rate(records: Iterable[Mapping[str, Any]]) -> tuple[float, dict[int, float], dict[float, float]]:
    """Return the best learning rate, the loss of each seed at it, and the mean loss at each rate.

    The best is picked by `pick_loss`, where records have one. Where seeds were repeated at some of the rates only, it
    is chosen among those that most seeds were run with.
    """
    by_rate: dict[float, list[Mapping[str, Any]]] = {}
    for record in records:
        by_rate.setdefault(record["learning_rate"], []).append(record)
    losses = {lr: {record["seed"]: record["eval_loss"] for record in same} for lr, same in sorted(by_rate.items())}
    means = {lr: statistics.mean(of_seeds.values()) for lr, of_seeds in losses.items()}
    best = picked(dict(sorted(by_rate.items())))  # of equal ones the lowest
    return best, losses[best], means


def picked(settings: Mapping[Key, Records]) -> Key:
    """Return the setting with the lowest mean of `pick_loss`, or of `eval_loss`, among those with the most runs.

    A run that diverged, without a loss, counts as infinite.

    Example:
        >>> runs = {"low": [{"pick_loss": 3.0, "eval_loss": 2.0}], "high": [{"pick_loss": 2.5, "eval_loss": 2.6}]}
        >>> picked(runs)
        'high'
    """

    def to_pick(record: Mapping[str, Any]) -> float:
        loss = record.get("pick_loss", record["eval_loss"])
        return math.inf if loss is None else float(loss)

    most = max(map(len, settings.values()))
    means = {key: statistics.mean(map(to_pick, same)) for key, same in settings.items() if len(same) == most}
    return min(means, key=means.__getitem__)

"""The walk over learning rates that the quality benchmarks share: factors of two, until the best lies inside."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any


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
    by_rate: dict[float, dict[int, float]] = {}
    to_pick: dict[float, list[float]] = {}
    for record in records:
        by_rate.setdefault(record["learning_rate"], {})[record["seed"]] = record["eval_loss"]
        to_pick.setdefault(record["learning_rate"], []).append(record.get("pick_loss", record["eval_loss"]))
    most = max(map(len, by_rate.values()))
    means = {lr: statistics.mean(losses.values()) for lr, losses in sorted(by_rate.items())}
    best = min((lr for lr in means if len(by_rate[lr]) == most), key=lambda lr: statistics.mean(to_pick[lr]))
    return best, by_rate[best], means

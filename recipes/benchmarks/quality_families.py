"""Tables of optimizers at their own best: rates for matrices and for each kind of parameter, picked on other text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quality_names import FAMILIES, family_of, kinds_of
from quality_plan import STUDIES
from quality_report import Records, of_study, table
from rate_walk import picked


TITLES = {
    "small": "200 steps",
    "long": "600 steps",
    "longest": "2,400 steps",
    "small, english": "200 steps, English",
}
"""The studies of the short table, and what they are called in it."""


@dataclass(frozen=True)
class Best:
    """The best setting of an optimizer in a study."""

    row: str
    rate: float
    losses: Mapping[int, float]
    """By seed."""
    beside: Mapping[float, float]
    """What the rates for matrices of the same row cost on the first seed, beside the best."""
    state: float
    """Bytes of state for each parameter."""

    @property
    def loss(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(self.losses.values())


def best(records: Records, family: str) -> Best | None:
    """Return the setting of a family with the lowest loss to pick by, among those that most seeds were run with.

    Args:
        records: of one study.
        family: how the rows of the plan begin.
    """
    of_setting: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for record in records:
        if family_of(record["row"]) == family:
            of_setting.setdefault((record["row"], record["learning_rate"]), []).append(record)
    if not of_setting:
        return None
    row, rate = picked(of_setting)
    chosen = of_setting[row, rate]
    losses = {r["seed"]: r["eval_loss"] for r in chosen}
    first = min(losses)
    beside = {
        lr: next(r["eval_loss"] for r in same if r["seed"] == first)
        for (name, lr), same in of_setting.items()
        if name == row and first in {r["seed"] for r in same}
    }
    state = statistics.median(r["state_bytes"] / r["parameters"] for r in chosen)
    return Best(row, rate, losses, {lr: loss - losses[first] for lr, loss in beside.items()}, state)


def study_table(records: Records) -> str:
    """Render the optimizers of one study at their best, the lowest loss first.

    What half and double the rate for matrices cost is the difference on the first seed.
    """
    found = {name: best(records, family) for name, family in FAMILIES.items()}
    lines = [
        "| Optimizer | Held-out loss | Seeds | Spread | Rate of matrices | Embeddings / head / norms "
        "| At half the rate | At double the rate | State, bytes per parameter |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in sorted(((n, b) for n, b in found.items() if b), key=lambda item: item[1].loss):
        values = one.losses.values()
        spread = f"{max(values) - min(values):.3f}" if len(values) > 1 else ""
        beside = [f"{one.beside[lr]:+.3f}" if lr in one.beside else "not run" for lr in (one.rate / 2, one.rate * 2)]
        cells = [name, f"{one.loss:.3f}", str(len(values)), spread, f"{one.rate:.1e}", kinds_of(one.row), *beside]
        lines.append(f"| {' | '.join(cells)} | {one.state:.2f} |")
    return "\n".join(lines)


def summary(records: Records, studies: Mapping[str, str] = TITLES) -> str:
    """Render the best loss of every optimizer in the studies; the lowest of a study is bold."""
    lines = ["| Optimizer | " + " | ".join(studies.values()) + " |", "|---|" + "---:|" * len(studies)]
    found = {
        study: {name: one.loss for name, family in FAMILIES.items() if (one := best(of_study(records, study), family))}
        for study in studies
    }
    for name in FAMILIES:
        cells = [_cell(losses, name) for losses in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(losses: Mapping[str, float], name: str) -> str:
    if name not in losses:
        return "not run"
    text = f"{losses[name]:.3f}"
    return f"**{text}**" if losses[name] == min(losses.values()) else text


def document(records: Records) -> str:
    """Return all tables as a Markdown file: each optimizer at its best, then every row of the plan."""
    found = {name: runs for name in STUDIES if (runs := of_study(records, name))}
    sections = {"each optimizer at its best": summary(records)}
    sections |= {f"{name}, each at its best": study_table(runs) for name, runs in found.items()}
    sections |= {f"{name}, every row": table(runs) for name, runs in found.items()}
    texts = [f"## {title[0].upper()}{title[1:]}\n\n{text}\n" for title, text in sections.items()]
    return "\n".join(["# Runs of `quality.py`\n", *texts])

"""Tables of optimizers at their own best: rates for matrices and for each kind of parameter, picked on other text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
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
    "longest, english": "2,400 steps, English",
}
"""The studies of the short table, and what they are called in it."""
SHORT = [name for name in FAMILIES if "newton_schulz" not in name]
"""The optimizers of the table in the README at the top."""


@dataclass(frozen=True)
class Best:
    """The best setting of an optimizer in a study."""

    row: str
    rate: float
    losses: Mapping[int, float]
    """By seed."""
    curves: Mapping[int, Sequence[tuple[int, float]]]
    """By seed: after how many steps a twentieth of them ended, and the mean of the training loss in it."""
    beside: Mapping[float, float]
    """What the rates for matrices of the same row cost on the first seed, beside the best."""
    state: float
    """Bytes of state for each parameter."""

    @property
    def loss(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(self.losses.values())

    def reaches(self, other: Best) -> float | None:
        """Return the share of the steps after which the training loss is that at the end of `other`.

        Both are means over the seeds that both have, and between two entries the curve is straight; None where there
        is no such seed, or the loss is never as low.
        """
        common = sorted(self.curves.keys() & other.curves.keys())
        if not common:
            return None
        target = statistics.mean(other.curves[seed][-1][1] for seed in common)
        steps = [step for step, _ in self.curves[common[0]]]
        losses = ([loss for _, loss in self.curves[seed]] for seed in common)
        curve = list(map(statistics.mean, zip(*losses, strict=True)))
        for i, loss in enumerate(curve):
            if loss <= target:
                back = (target - loss) / (curve[i - 1] - loss) if i else 0.0
                return (steps[i] - back * (steps[i] - steps[i - 1])) / steps[-1]
        return None


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
    curves = {r["seed"]: r["train_losses"] for r in chosen}
    return Best(row, rate, losses, curves, {lr: loss - losses[first] for lr, loss in beside.items()}, state)


def bests(records: Records, names: Sequence[str] = tuple(FAMILIES)) -> dict[str, Best]:
    """Return the best settings of optimizers in one study, by what they are called; who was not run is left out."""
    return {name: one for name in names if (one := best(records, FAMILIES[name]))}


def study_table(records: Records) -> str:
    """Render the optimizers of one study at their best, the lowest loss first.

    What half and double the rate for matrices cost is the difference on the first seed.
    """
    found = bests(records)
    adamw = found.get("AdamW")
    lines = [
        "| Optimizer | Held-out loss | Seeds | Spread | Rate of matrices | Embeddings / head / norms "
        "| At half the rate | At double the rate | State, bytes per parameter | As low as AdamW ends after |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in sorted(found.items(), key=lambda item: item[1].loss):
        values = one.losses.values()
        spread = f"{max(values) - min(values):.3f}" if len(values) > 1 else ""
        beside = [f"{one.beside[lr]:+.3f}" if lr in one.beside else "not run" for lr in (one.rate / 2, one.rate * 2)]
        cells = [name, f"{one.loss:.3f}", str(len(values)), spread, f"{one.rate:.1e}", kinds_of(one.row), *beside]
        cells += [f"{one.state:.2f}", _share(one.reaches(adamw)) if adamw else "not run"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(of_the_steps: float | None) -> str:
    return "never" if of_the_steps is None else f"{100 * of_the_steps:.0f} % of the steps"


def summary(records: Records, studies: Mapping[str, str] = TITLES, names: Sequence[str] = tuple(FAMILIES)) -> str:
    """Render the best loss of optimizers in the studies; the lowest of a study is bold."""
    lines = ["| Optimizer | " + " | ".join(studies.values()) + " |", "|---|" + "---:|" * len(studies)]
    found = {
        study: {name: one.loss for name, one in bests(of_study(records, study), names).items()} for study in studies
    }
    for name in names:
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

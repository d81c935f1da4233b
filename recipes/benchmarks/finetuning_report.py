"""Tables of the runs of `finetuning.py`: for recipes/README.md, and that of 8-bit weights in hf_stateless/weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rate_walk import best_rate


Records = Sequence[Mapping[str, Any]]
HEADER = (
    "| Trained with | Held-out loss | Each seed | Over AdamW | Best learning rate | Half and double that rate cost | "
    "At AdamW's best rate, over AdamW |\n|---|---:|---:|---:|---:|---:|---:|"
)


class Row:
    """The runs of one optimizer in one study: its best rate, and what other rates cost.

    The rate is picked on one half of the held-out pairs, and every loss here is that of the other half. Runs without
    halves have one loss for both.
    """

    def __init__(self, records: Records):
        self.best = best_rate(records)[0]
        self.by_rate: dict[float, dict[int, float]] = {}
        for record in records:
            self.by_rate.setdefault(record["learning_rate"], {})[record["seed"]] = record["eval_loss"]

    @property
    def losses(self) -> dict[int, float]:
        """The loss of each seed at the best rate."""
        return dict(sorted(self.by_rate[self.best].items()))

    @property
    def loss(self) -> float:
        """The mean over the seeds at the best rate."""
        return statistics.mean(self.losses.values())

    def over(self, other: Row, rate: float | None = None) -> float | None:
        """Return the loss at a rate, the best one by default, less that of `other` at its best one.

        It is the mean over the seeds that both have, or None where there is none.
        """
        here, there = self.by_rate.get(rate or self.best, {}), other.losses
        common = here.keys() & there.keys()
        return statistics.mean(here[seed] - there[seed] for seed in common) if common else None


def studies(records: Records) -> dict[str, dict[str, Row]]:
    """Return the rows of each study: one kind of training on one data set."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for record in records:
        rank = f" of rank {record['lora_r']}" if record["lora_r"] else ""
        depth = f", last {record['layers']} layers" if record["layers"] else ""
        title = f"{record['data']}, {record['tuning']}{rank}{depth}"
        found.setdefault(title, {}).setdefault(record["row"], []).append(record)
    return {title: {row: Row(runs) for row, runs in rows.items()} for title, rows in found.items()}


def table(rows: Mapping[str, Row]) -> str:
    """Render the rows of a study as a Markdown table, the lowest beside AdamW on equal seeds first."""
    adamw = rows.get("adamw")

    def rank(row: Row) -> tuple[float, float]:
        over = row.over(adamw) if adamw else None
        return math.inf if over is None else over, row.loss

    lines = [HEADER]
    for name, row in sorted(rows.items(), key=lambda item: rank(item[1])):
        beside = ", ".join(_over(row.over(row, factor * row.best)) for factor in (0.5, 2))
        each = ", ".join(f"{loss:.3f}" for loss in row.losses.values())
        best, shared = (_over(row.over(adamw, rate) if adamw else None) for rate in (None, adamw and adamw.best))
        cells = [f"`{name}`", f"{row.loss:.3f}", each, best, f"{row.best:.1e}", beside, shared]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _over(loss: float | None) -> str:
    return "not run" if loss is None else f"{loss:+.3f}"


def weights_table(records: Records) -> str:
    """Render runs at one learning rate as a Markdown table: the loss beside that of the same optimizer in bf16."""
    names = sorted({record["row"] for record in records})
    rows = {row: {r["seed"]: r["eval_loss"] for r in records if r["row"] == row} for row in names}
    lines = ["| Trained with | Held-out loss | Each seed | Over bf16 | Each seed |", "|---|---:|---:|---:|---:|"]
    for row, losses in rows.items():
        base = rows[f"{row.partition('int8')[0].removesuffix('bf16')}bf16"]
        mean, each = statistics.mean(losses.values()), ", ".join(f"{losses[seed]:.4f}" for seed in sorted(losses))
        apart = ", ".join(f"{100 * (losses[seed] / base[seed] - 1):+.2f} %" for seed in sorted(losses))
        total = f"{100 * (mean / statistics.mean(base.values()) - 1):+.2f} %"
        over = f" {total} | {apart} " if losses is not base else " | "
        lines.append(f"| `{row}` | {mean:.4f} | {each} |{over}|")
    return "\n".join(lines)

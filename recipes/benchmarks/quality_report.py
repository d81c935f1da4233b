"""Tables and curves of the runs of `quality.py`: for README.md in this folder, and `short` for that at the top."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_plan import MAIN, ROWS, STUDIES, Study, at_constant_rate
from rate_walk import best_rate


Records = Sequence[Mapping[str, Any]]
HEADER = (
    "| Optimizer | Held-out loss | Seeds | Spread | Best learning rate | Loss at half that | Loss at double that | "
    "Bytes of state |\n|---|---:|---:|---:|---:|---:|---:|---:|"
)
SCHEDULE, CONSTANT = "summary, warm-up and cosine", "summary, constant rate"
SHORT = {"small": "Small, 200 steps", "long": "Small, 600 steps", "largest, english": "Larger, English"}
"""The studies of the short table, and what they are called in it."""


def label(row: str) -> str:
    """Return the name of a row in words; the plan has short names, since they are typed.

    Example:
        >>> label("adamw, rates apart, rest 8x")
        'AdamW, own rate for matrices, 8x rate for embeddings, head, norms'
    """
    words = re.sub("^adamw", "AdamW", re.sub("^muon", "Muon", row)).replace("rates apart", "own rate for matrices")
    words = re.sub(r"rest (\d+)/(\d+)/(\d+)x", r"\1x rate for embeddings, \2x for the head, \3x for norms", words)
    return re.sub(r"rest (\d+)x", r"\1x rate for embeddings, head, norms", words)


def of_study(records: Records, name: str) -> list[dict[str, Any]]:
    """Return the finished runs of a study; a run that diverged counts as an infinite loss."""
    # Earlier records lack what all studies had alike.
    wanted, usual = STUDIES[name].values(), Study().values()
    return [
        {**record, "eval_loss": float("inf") if record["eval_loss"] is None else record["eval_loss"]}
        for record in records
        if all(record.get(key, usual[key]) == value for key, value in wanted.items())
    ]


def by_row(records: Records) -> dict[str, list[Mapping[str, Any]]]:
    """Group records by optimizer, in the order of the plan."""
    return {row: same for row in ROWS if (same := [r for r in records if r["row"] == row])}


def tables(records: Records) -> dict[str, str]:
    """Return a Markdown table for each study that has runs, best optimizer first, and three over all studies."""
    found = {name: runs for name in STUDIES if (runs := of_study(records, name))}
    if not found:
        return {}
    summaries = {SCHEDULE: summary(found, lambda row: row), CONSTANT: summary(found, at_constant_rate)}
    return {**summaries, **{name: table(runs) for name, runs in found.items()}, "learning rates": rates_table(found)}


def document(records: Records) -> str:
    """Return all tables as a Markdown file."""
    sections = [f"## {name[0].upper()}{name[1:]}\n\n{rendered}\n" for name, rendered in tables(records).items()]
    return "\n".join(["# Runs of `quality.py`\n", *sections])


def in_summary(rows: Iterable[str]) -> bool:
    """Tell whether a study with runs of these rows is one that ours are compared with Muon in."""
    return {"muon", "swan"} <= set(rows)


def summary(found: Mapping[str, Records], form: Callable[[str], str]) -> str:
    """Render the best loss of the main rows, in the form that is asked for, in the studies that have them."""
    shown = {study: study for study, records in found.items() if in_summary(by_row(records))}
    return _losses(found, shown, {row: form(row) for row in MAIN})


def short(records: Records) -> str:
    """Render the best losses of the main rows in three studies, with warm-up and cosine."""
    return _losses({name: of_study(records, name) for name in SHORT}, SHORT, {row: row for row in MAIN})


def _losses(found: Mapping[str, Records], studies: Mapping[str, str], rows: Mapping[str, str]) -> str:
    """Render losses under the titles of the studies; `rows` maps what a row is called to the row of the plan."""
    best = {
        study: {row: statistics.mean(best_rate(same)[1].values()) for row, same in by_row(found[study]).items()}
        for study in studies
    }
    studies = {study: title for study, title in studies.items() if set(rows.values()) & set(best[study])}
    lines = ["| Optimizer | " + " | ".join(studies.values()) + " |", "|---|" + "---:|" * len(studies)]
    for title, row in rows.items():
        cells = [f"{best[study][row]:.3f}" if row in best[study] else "not run" for study in studies]
        lines.append(f"| {label(title)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(records: Records) -> str:
    """Render one study."""
    lines = []
    for row, same in by_row(records).items():
        best, losses, means = best_rate(same)
        beside = [f"{means[lr]:.3f}" if lr in means else "not run" for lr in (best / 2, best * 2)]
        loss = statistics.mean(losses.values())
        spread = f"{max(losses.values()) - min(losses.values()):.3f}" if len(losses) > 1 else ""
        cells = [label(row), f"{loss:.3f}", str(len(losses)), spread, f"{best:.1e}", *beside]
        state = statistics.median(record["state_bytes"] for record in same) / same[0]["parameters"]
        lines.append((loss, f"| {' | '.join(cells)} | {state:.2f} |"))
    return "\n".join([HEADER, *(line for _, line in sorted(lines))])


def rates_table(found: Mapping[str, Records]) -> str:
    """Render the best learning rates of the main rows over the studies, as multiples of AdamW's."""
    rows = MAIN[1:]
    lines = ["| Study | AdamW | " + " | ".join(map(label, rows)) + " |", "|---|---:|" + "---:|" * len(rows)]
    for name, records in found.items():
        best = {row: best_rate(same)[0] for row, same in by_row(records).items()}
        if "adamw" in best:
            cells = [f"{best[row] / best['adamw']:.2g}x" if row in best else "" for row in rows]
            lines.append(f"| {name} | {best['adamw']:.1e} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(records: Records, picture: Path) -> None:
    """Draw the training loss of the best runs against tokens and time, and the final loss against memory.

    The studies and rows are those of the summary; a constant rate is dashed, and hollow where it is a point. The time
    is that of the row's fastest run, which the machine's other work held up least.
    """
    import matplotlib.pyplot as plt

    found = {name: by_row(runs) for name in STUDIES if (runs := of_study(records, name))}
    shown = [name for name in found if in_summary(found[name])] or list(found)
    figure, axes = plt.subplots(len(shown), 3, figsize=(13, 3.4 * len(shown)), squeeze=False, layout="constrained")
    for name, (tokens, hours, memory) in zip(shown, axes, strict=True):
        for i, row in enumerate((*MAIN, *map(at_constant_rate, MAIN))):
            if not (same := found[name].get(row)):
                continue
            color, constant = f"C{i % len(MAIN)}", i >= len(MAIN)
            best, losses, _ = best_rate(same)
            record = next(r for r in same if r["learning_rate"] == best and r["seed"] == min(losses))
            steps = [step for step, _ in record["train_losses"]]
            values = [value for _, value in record["train_losses"]]
            line = {"label": row, "color": color, "linestyle": "--" if constant else "-"}
            tokens.plot([s * record["sequences"] * record["block"] / 1e6 for s in steps], values, **line)
            seconds = min(r["seconds"] for r in same)
            hours.plot([s / record["steps"] * seconds for s in steps], values, **line)
            size = (record["weight_bytes"] + record["state_bytes"]) / 2**20
            face = "none" if constant else color
            memory.scatter(size, statistics.mean(losses.values()), label=row, edgecolors=color, facecolors=face, s=22)
        tokens.set(title=name, xlabel="million tokens", ylabel="training loss")
        hours.set(xlabel="seconds (shared machine)", ylabel="training loss")
        memory.set(xlabel="weights and optimizer state, MiB", ylabel="held-out loss")
    handles = {handle.get_label(): handle for handle in figure.findobj(plt.Line2D)}
    figure.legend(handles=[handles[row] for row in ROWS if row in handles], loc="outside upper center", ncols=5)
    figure.savefig(picture, dpi=80)
    plt.close(figure)

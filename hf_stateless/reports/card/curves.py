"""`loss.png`: how a run came down, and the runs beside it, from the rows of results that their cards list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..figures import literal, new_figure, save_figure
from .facts import CardFacts
from .markdown import plain
from .memory_section import number


CURVES_FILE = "loss.png"
# The first of these that a run has at two steps or more is drawn: a reward says more of GRPO than its loss.
_DRAWN = ("mean reward", "held-out loss", "training loss", "loss")
_STYLES = (("#D55E00", "-"), ("#000000", "--"), ("#0072B2", ":"), ("#7F7F7F", "-."))


def curves(facts: CardFacts) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """Return what is drawn, and its points by the name of the optimizer; no points where there is no curve."""
    runs = [{"optimizer": facts.optimizer, "results": facts.results}, *facts.beside]
    for name in _DRAWN:
        if len(_points(facts.results, name)) > 1:
            found = {_label(run, runs): _points(run["results"], name) for run in runs}
            return name, {label: points for label, points in found.items() if points}
    return "", {}


def _points(results: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in results if isinstance(row.get(name), int | float)]


def _label(run: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Return the name of the optimizer, with the learning rate where two runs have the same."""
    name = str(run["optimizer"])
    if sum(other["optimizer"] == name for other in runs) > 1:
        return f"{name}, {run.get('hyperparameters', {}).get('learning_rate', 'this run')}"
    return name


def draw_curves(facts: CardFacts, path: str | Path) -> bool:
    """Draw the curves of a card; tell whether there are any.

    Raises:
        ImportError: matplotlib is not installed.
    """
    name, lines = curves(facts)
    if not lines:
        return False
    figure = new_figure(figsize=(7, 3.4))
    axes = figure.subplots()
    for position, (label, points) in enumerate(lines.items()):
        colour, style = _STYLES[position % len(_STYLES)]
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour, linestyle=style, marker="o", markersize=3.5, label=literal(label, most=40))
    axes.set_xlabel("steps")
    axes.set_ylabel(name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)
    return True


def alternative_text(facts: CardFacts) -> str:
    """Return the curves in words."""
    name, lines = curves(facts)
    ends = [f"{plain(label)}: {number(points[0][1])} to {number(points[-1][1])}" for label, points in lines.items()]
    return f"{name.capitalize()} by steps. {'; '.join(ends)}"

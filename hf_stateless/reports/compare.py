"""`hf-stateless compare RUN_A RUN_B ...`: loss, time and memory of finished runs side by side."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..trainer.table import aligned
from .command_line import Parser, one_line
from .figures import draw_bars, literal, new_figure, save_plot
from .files import size_text
from .finished_run import Run, read_run
from .measured.picture import bars
from .measured.schema import REPORT_FILE


_PLAIN = ("run", "optimizer", "steps", "train_loss", "eval_loss", "tokens", "seconds")
_COLUMNS = {
    **{key: key.replace("_", " ") for key in _PLAIN},
    **{"tokens_per_second": "tokens/s", "peak": "peak", "optimizer_state": "state"},
}
_FORMATS = {"train_loss": ".4f", "eval_loss": ".4f", "steps": ",", "tokens": ",", "seconds": ",.1f"}
_LEGEND = """\
train loss, eval loss: the last ones logged. seconds: training; without a memory report, evaluation is in them too.
peak: measured in a training step. state: optimizer state, counted. A dash: not known."""
# Colours that no part of memory has and colour-blind readers tell apart, each with a style of line.
_LINES = (("#000000", "-"), ("#E69F00", "-"), ("#CC79A7", "-"), ("#7F7F7F", "--"), ("#000000", ":"), ("#E69F00", ":"))


def as_table(runs: Sequence[Run]) -> str:
    """Return runs as lines of text."""
    rows = [list(_COLUMNS.values()), *([_cell(run, key) for key in _COLUMNS] for run in runs)]
    notes = [f"{one_line(run.run, most=60)}: {one_line(note)}" for run in runs for note in run.notes]
    return "\n".join([*aligned(rows, text=(0, 1)), "", _LEGEND, *notes])


def _cell(run: Run, key: str) -> str:
    value = getattr(run, key)
    if value is None:
        return "-"
    if isinstance(value, str):
        return one_line(value, most=60)
    if key in ("peak", "optimizer_state"):
        return size_text(value)
    return format(value, _FORMATS.get(key, ",.0f" if isinstance(value, float) else ""))


def as_json(run: Run) -> dict[str, Any]:
    """Return a run as plain values, its memory report left out; JSON has no word for a loss of NaN but null."""
    values = {key: _as_json(getattr(run, key)) for key in _COLUMNS}
    history = [{key: _as_json(value) for key, value in point.items()} for point in run.history]
    return {**values, "history": history, "notes": run.notes}


def _as_json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw loss against tokens, loss against time, and memory beside them."""
    figure = new_figure(figsize=(13, 4.2 + 0.12 * len(runs)))
    tokens, seconds, memory = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    for axes, key in ((tokens, "tokens"), (seconds, "seconds")):
        _draw_losses(axes, runs, key)
    tokens.set_ylabel("loss (line: training, dots: evaluation)")
    seconds.sharey(tokens)
    piles = {run.run: next(iter(bars(run.report).values())) for run in runs if run.report}
    if piles:
        draw_bars(memory, piles)
        memory.set_xlabel(f"{memory.get_xlabel()} at the peak of a step, measured")
        figure.legend(*memory.get_legend_handles_labels(), loc="outside lower right", ncols=5, frameon=False)
    else:
        memory.set_axis_off()
        memory.text(0.5, 0.5, f"no {REPORT_FILE}", ha="center", va="center")
    columns = min(6, len(runs))
    figure.legend(*tokens.get_legend_handles_labels(), loc="outside upper left", ncols=columns, frameon=False)
    save_plot(figure, path)


def _draw_losses(axes: Any, runs: Sequence[Run], key: str) -> None:
    from matplotlib.ticker import EngFormatter

    for number, run in enumerate(runs):
        colour, style = _LINES[number % len(_LINES)]
        for loss, line in (("loss", {"linestyle": style}), ("eval_loss", {"linestyle": "", "marker": "o"})):
            points = [(point[key], point[loss]) for point in run.history if loss in point and key in point]
            x, y = zip(*points, strict=True) if points else ((), ())
            label = literal(run.run, most=40) if loss == "loss" else None
            axes.plot(x, y, color=colour, linewidth=1.4, markersize=4.5, label=label, **line)
    axes.set_xlabel({"tokens": "tokens of training batches", "seconds": "seconds of training"}[key])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.locator_params(axis="x", nbins=6)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Print runs side by side; return 0, or 2 after one line on stderr that says what was wrong."""
    parser = Parser(prog="hf-stateless compare", description="Loss, time and memory of runs side by side.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument("--json", action="store_true", help="print JSON, all sizes in bytes")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a picture, such as compare.png")
    try:
        args = parser.parse_args(argv)
        runs = [read_run(folder) for folder in args.runs]
        _tell_apart(runs, args.runs)
        if args.plot:
            draw(runs, args.plot)
    except (ImportError, OSError, ValueError) as error:
        print(f"hf-stateless compare: {one_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps([as_json(run) for run in runs], indent=2) if args.json else as_table(runs))
    return 0


def _tell_apart(runs: Sequence[Run], folders: Sequence[Path]) -> None:
    """Add the parent folder to the names of runs whose folders have the same name."""
    names = [run.run for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run.run) > 1:
            run.run = "/".join(folder.resolve().parts[-2:])

"""`hf-stateless compare RUN_A RUN_B ...`: loss, time and memory of finished runs side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .command_line import Parser
from .files import GIB, read_json
from .measured.schema import REPORT_FILE, MemoryReport
from .predicted.table import aligned


STATE_FILE = "trainer_state.json"
# What the logs call the tokens seen so far: the Trainer, if it is asked to count them, and TRL.
_TOKEN_KEYS = ("num_input_tokens_seen", "num_tokens")
_COLUMNS = {
    "run": "run",
    "optimizer": "optimizer",
    "steps": "steps",
    "train_loss": "train loss",
    "eval_loss": "eval loss",
    "tokens": "tokens",
    "seconds": "seconds",
    "tokens_per_second": "tokens/s",
    "peak": "peak GiB",
    "optimizer_state": "state GiB",
}
_FORMATS = {"train_loss": ".4f", "eval_loss": ".4f", "steps": ",", "tokens": ",", "seconds": ",.1f"}
_LEGEND = """\
train loss: the last one logged. eval loss: the last one. seconds: training; with no memory report also evaluation.
peak: measured in a training step. state: optimizer state, counted. A dash: not known."""
# Colours apart from those of the parts of memory, for colour-blind readers too, each with a line of its own.
_LINES = (("#000000", "-"), ("#E69F00", "-"), ("#CC79A7", "-"), ("#7F7F7F", "--"), ("#000000", ":"), ("#E69F00", ":"))


@dataclass
class Run:
    """What the output folder of a run says; None where it does not."""

    run: str
    """Name of the folder."""
    optimizer: str | None = None
    steps: int | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak: int | None = None
    """Bytes, measured."""
    optimizer_state: int | None = None
    """Bytes, counted."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Points of the curves: `step`, `tokens` and `seconds` where known, and `loss` or `eval_loss`."""
    notes: list[str] = field(default_factory=list)
    report: MemoryReport | None = None

    def as_json(self) -> dict[str, Any]:
        """Return plain values, the report left out."""
        return {**{key: getattr(self, key) for key in _COLUMNS}, "history": self.history, "notes": self.notes}


def read_run(folder: Path) -> Run:
    """Read `trainer_state.json` and `memory_report.json` of an output folder; one of them may be missing.

    Args:
        folder: output folder; if it holds no state, that of its last checkpoint is taken.

    Raises:
        ValueError: no such folder, neither file, or a file that cannot be read.

    Example:
        >>> from pathlib import Path
        >>> from hf_stateless.reports.compare import read_run
        >>> read_run(Path("no/such/run"))
        Traceback (most recent call last):
        ...
        ValueError: no/such/run: no such folder; expected the output_dir of a run
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected the output_dir of a run")
    run = Run(folder.resolve().name)
    state, report = _state(folder), None
    if (folder / REPORT_FILE).is_file():
        report = MemoryReport.load(folder)
    if state is None and report is None:
        raise ValueError(f"{folder}: neither {STATE_FILE} nor {REPORT_FILE}; expected the output_dir of a run")
    if report is None:
        run.notes.append(f"no {REPORT_FILE}: hf_stateless.attach_memory_report(trainer) before train() writes it")
    else:
        _take_report(run, report)
    if state is None:
        run.notes.append(f"no {STATE_FILE}, so no losses: trainer.save_state() after train() writes it")
    else:
        _take_state(run, state)
    return run


def _state(folder: Path) -> dict[str, Any] | None:
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name[len("checkpoint-") :].isdecimal()]
    latest = sorted(checkpoints, key=lambda path: int(path.name[len("checkpoint-") :]))[-1:]
    for place in (folder, *latest):
        if (place / STATE_FILE).is_file():
            try:
                state: dict[str, Any] = read_json(place / STATE_FILE)
                return {"global_step": state["global_step"], "log_history": state["log_history"]}
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(f"{place / STATE_FILE}: no state of a Trainer") from None
    return None


def _take_report(run: Run, report: MemoryReport) -> None:
    run.report = report
    run.optimizer = report.setup.optimizer
    run.steps = report.measured.from_step + report.measured.steps
    run.tokens, run.tokens_per_second = report.cost.tokens, report.cost.tokens_per_second
    run.seconds = report.cost.seconds
    run.peak, run.optimizer_state = report.measured.peak.max, report.counted.optimizer_state
    if report.measured.from_step:
        run.notes.append(f"tokens, seconds and peak are of the steps after {report.measured.from_step} only")
    if not report.complete:
        run.notes.append("the memory report was written before the end of training")


def _take_state(run: Run, state: Mapping[str, Any]) -> None:
    logs = state["log_history"]
    run.steps = state["global_step"]
    for key in ("loss", "eval_loss"):
        found = [entry[key] for entry in logs if isinstance(entry.get(key), (int, float))]
        setattr(run, "train_loss" if key == "loss" else key, found[-1] if found else None)
    counted = [entry[key] for entry in logs for key in _TOKEN_KEYS if key in entry]
    run.tokens = int(counted[-1]) if counted and run.tokens is None else run.tokens
    runtime = sum(entry.get("train_runtime", 0.0) for entry in logs)
    run.seconds = (runtime or None) if run.seconds is None else run.seconds
    if run.tokens_per_second is None and run.tokens and run.seconds:
        run.tokens_per_second = run.tokens / run.seconds
    for entry in logs:
        values = {key: entry[key] for key in ("loss", "eval_loss") if isinstance(entry.get(key), (int, float))}
        if values:
            run.history.append({"step": entry["step"], **values, **_place(run, entry["step"])})


def _place(run: Run, step: int) -> dict[str, float]:
    """Return tokens and seconds up to a step, as if all steps were alike: curves need no more."""
    measured = run.report.measured if run.report else None
    first, steps = (measured.from_step, measured.steps) if measured else (0, run.steps or 0)
    share = (step - first) / steps if steps and step >= first else None
    totals = {"tokens": run.tokens, "seconds": run.seconds}
    return {key: total * share for key, total in totals.items() if total is not None and share is not None}


def as_table(runs: Sequence[Run]) -> str:
    """Return runs as lines of text.

    Example:
        >>> from hf_stateless.reports.compare import Run, as_table
        >>> print(as_table([Run("a", optimizer="sinkgd", train_loss=2.5)]).splitlines()[1])
        a    sinkgd         -      2.5000          -       -        -         -         -          -
    """
    rows = [list(_COLUMNS.values()), *([_cell(run, key) for key in _COLUMNS] for run in runs)]
    notes = [f"{run.run}: {note}" for run in runs for note in run.notes]
    return "\n".join([*aligned(rows, text=(0, 1)), "", _LEGEND, *notes])


def _cell(run: Run, key: str) -> str:
    value = getattr(run, key)
    if value is None:
        return "-"
    if key in ("peak", "optimizer_state"):
        return f"{value / GIB:.3f}"
    return format(value, _FORMATS.get(key, ",.0f" if isinstance(value, float) else ""))


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw loss against tokens, loss against time, and memory beside them.

    Args:
        runs: from `read_run`.
        path: picture to write; the ending says the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the picture cannot be written.
    """
    from .measured.picture import bars, draw_bars, new_figure, save_figure

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
    figure.legend(
        *tokens.get_legend_handles_labels(), loc="outside upper left", ncols=min(6, len(runs)), frameon=False
    )
    try:
        save_figure(figure, path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot {path} cannot be written: {error}") from None


def _draw_losses(axes: Any, runs: Sequence[Run], key: str) -> None:
    from matplotlib.ticker import EngFormatter

    for number, run in enumerate(runs):
        colour, style = _LINES[number % len(_LINES)]
        for loss, line in (("loss", {"linestyle": style}), ("eval_loss", {"linestyle": "", "marker": "o"})):
            points = [(point[key], point[loss]) for point in run.history if loss in point and key in point]
            x, y = zip(*points, strict=True) if points else ((), ())
            label = run.run if loss == "loss" else None
            axes.plot(x, y, color=colour, linewidth=1.4, markersize=4.5, label=label, **line)
    axes.set_xlabel({"tokens": "tokens of training batches", "seconds": "seconds of training"}[key])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.locator_params(axis="x", nbins=6)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what runs reached and what they took, side by side.

    Args:
        argv: arguments after `hf-stateless compare`; those of the process when None.

    Returns:
        0, or 2 after one line on stderr that says what was wrong.

    Example:
        >>> from hf_stateless.reports.compare import main
        >>> main(["no/such/run"])
        2
    """
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
    except (ImportError, ValueError) as error:
        print(f"hf-stateless compare: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps([run.as_json() for run in runs], indent=2) if args.json else as_table(runs))
    return 0


def _tell_apart(runs: Sequence[Run], folders: Sequence[Path]) -> None:
    """Name runs by their folders where the last names are equal."""
    names = [run.run for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run.run) > 1:
            run.run = "/".join(folder.resolve().parts[-2:])

"""What the output folder of a finished run says: its losses, and what it took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import read_json
from .measured.schema import REPORT_FILE, MemoryReport


STATE_FILE = "trainer_state.json"
# What the logs call the tokens seen so far: the Trainer, if it is asked to count them, and TRL.
_TOKEN_KEYS = ("num_input_tokens_seen", "num_tokens")


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


def read_run(folder: Path) -> Run:
    """Read `trainer_state.json`, if need be of the last checkpoint, and `memory_report.json`; one may be missing.

    Raises:
        ValueError: no such folder, neither file, or a file that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected the output_dir of a run")
    run = Run(folder.resolve().name)
    state = _state(folder)
    report = MemoryReport.load(folder) if (folder / REPORT_FILE).is_file() else None
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
                return _checked(read_json(place / STATE_FILE))
            except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
                raise ValueError(
                    f"{place / STATE_FILE}: no state of a Trainer; expected global_step, and log_history with the "
                    "step of each entry"
                ) from None
    return None


def _checked(state: dict[str, Any]) -> dict[str, Any]:
    """Return what is read of a state: its last step, and log entries of which every value is a number."""
    entries = [{key: _number(value) for key, value in entry.items()} for entry in state["log_history"]]
    logs = [{key: value for key, value in entry.items() if value is not None} for entry in entries]
    steps = state["global_step"]
    if not all(isinstance(_number(step), int) for step in [steps, *(entry["step"] for entry in logs)]):
        raise TypeError
    return {"global_step": steps, "log_history": logs}


def _number(value: Any) -> int | float | None:
    """Return a value if it is a number that curves can show, None otherwise; a loss may be infinite or NaN."""
    fits = not isinstance(value, int) or -(2**63) < value < 2**63
    return value if isinstance(value, int | float) and not isinstance(value, bool) and fits else None


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
    for entry in logs:
        values = {key: entry[key] for key in ("loss", "eval_loss") if key in entry}
        run.train_loss, run.eval_loss = values.get("loss", run.train_loss), values.get("eval_loss", run.eval_loss)
        if values:
            run.history.append({"step": entry["step"], **values})
    counted = [entry[key] for entry in logs for key in _TOKEN_KEYS if math.isfinite(entry.get(key, math.nan))]
    run.tokens = int(counted[-1]) if counted and run.tokens is None else run.tokens
    runtime = sum(entry.get("train_runtime", 0.0) for entry in logs)
    run.seconds = (runtime if math.isfinite(runtime) and runtime > 0 else None) if run.seconds is None else run.seconds
    if run.tokens_per_second is None and run.tokens and run.seconds:
        run.tokens_per_second = run.tokens / run.seconds
    for point in run.history:
        point.update(_place(run, point["step"]))


def _place(run: Run, step: float) -> dict[str, float]:
    """Return tokens and seconds up to a step, as if all steps were alike: curves need no more."""
    measured = run.report.measured if run.report else None
    first, steps = (measured.from_step, measured.steps) if measured else (0, run.steps or 0)
    share = (step - first) / steps if steps and step >= first else None
    totals = {"tokens": run.tokens, "seconds": run.seconds}
    return {key: total * share for key, total in totals.items() if total is not None and share is not None}

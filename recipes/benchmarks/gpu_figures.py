"""What each kind of stage of `gpu.py` leaves behind, as records: from the files of the scripts and recipes it ran."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpu_process import last_lines
from gpu_stages import Stage
from rate_walk import picked


Records = list[dict[str, Any]]
GIB = 1 << 30


def figures(stage: Stage, words: str, log: Path, file: Path) -> tuple[Records, dict[str, Any]]:
    """Return the records of a stage, and what its script says beside them; both are empty where it left nothing.

    Args:
        stage: that was run.
        words: its command, with the names of places filled in.
        log: what it printed.
        file: where its script wrote results, if it is one that does.
    """
    options = options_of(words)
    if stage.kind == "tests":
        return of_tests(last_lines(log)), {}
    if stage.kind == "training":
        return of_training(Path(options["output_dir"]), options["optim"]), {}
    if stage.kind == "fine-tuning":
        return of_fine_tuning(Path(options["output_dir"]), Path(options["model_name_or_path"]).name), {}
    if stage.kind == "quality":
        return of_quality(Path(options["runs"])), {}
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return results.get("records", []), results.get("setup", {})


def options_of(words: str) -> dict[str, str]:
    """Return the flags of a command that have one value.

    Example:
        >>> options_of("pretrain.py --optim swan --packing --max_steps 3")
        {'optim': 'swan', 'max_steps': '3'}
    """
    pairs = pairwise(shlex.split(words))
    return {name[2:]: value for name, value in pairs if name.startswith("--") and not value.startswith("--")}


def of_tests(lines: list[str]) -> Records:
    """Return how many tests went how, from the closing line of pytest."""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    found = re.findall(r"(\d+) (passed|failed|error|skipped)", " ".join(lines[-1:]))
    for count, word in found:
        counts["failed" if word == "error" else word] += int(count)
    return [counts] if found else []


def of_training(folder: Path, optim: str) -> Records:
    """Return the speed and the peak that the memory report of a run tells."""
    report = _read(folder / "memory_report.json")
    if not report:
        return []
    keys = ("tokens_per_second", "seconds_per_step", "optimizer_share")
    costs = {key: report["cost"][key] for key in keys}
    return [{"optimizer": optim, **costs, "peak_gib": round(report["measured"]["peak"]["max"] / GIB, 3)}]


def of_fine_tuning(folder: Path, model: str) -> Records:
    """Return the held-out figure before and after, the cost, and whether a card was written."""
    records = of_training(folder, "swan")
    history = (_read(folder / "trainer_state.json") or {}).get("log_history", [])
    evaluation = _read(folder / "evaluation.json")
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    if evaluation:  # of GRPO: the part of the questions that it passes
        losses = [evaluation[when]["passed"]["mean"] for when in ("before", "after")]
    ends = {"before": losses[0], "after": losses[-1]} if losses else {}
    return [{"model": model, **record, **ends, "card": (folder / "README.md").is_file()} for record in records]


def of_quality(runs: Path) -> Records:
    """Return the best run of each row of a study, how many rates were tried, and whether it is the last of them."""
    by_row: dict[str, Records] = {}
    for record in map(_read, sorted(runs.glob("*.json"))):
        if record["eval_loss"] is not None:
            by_row.setdefault(record["row"], []).append(record)
    keys = ("row", "eval_loss", "learning_rate", "seed", "seconds", "parameters", "state_bytes")
    records = []
    for same in by_row.values():
        best = same[picked({place: [record] for place, record in enumerate(same)})]
        tokens = best["sequences"] * best["block"] * best["steps"]
        tried = {record["learning_rate"] for record in same}
        place = edge(best["learning_rate"], tried)
        records.append({**{key: best[key] for key in keys}, "rates": len(tried), "edge": place, "tokens": tokens})
    return records


def edge(best: float, tried: Collection[float]) -> str:
    """Say where the best learning rate lies among those tried: at an end a better one may lie beyond it.

    Example:
        >>> edge(0.5, {1.0, 0.5, 2.0}), edge(1.0, {1.0, 0.5, 2.0}), edge(1.0, {1.0})
        ('the lowest', 'between', 'the only one')
    """
    if len(tried) == 1:
        return "the only one"
    return {min(tried): "the lowest", max(tried): "the highest"}.get(best, "between")


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

"""A table of cards: what each run ended at and took, and the first run beside it, from the JSON of their folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import size_text
from ..measured.schema import REPORT_FILE, MemoryReport
from .beside import took
from .facts import CARD_FILE, CardFacts
from .markdown import code, plain
from .memory_section import number


_HEADINGS = ("Card", "Optimizer", "Measure", "Before", "After", "Peak", "State", "Seconds a step")


def cards_table(folders: Sequence[Path]) -> str:
    """Return one table in Markdown; each cell of a run that has another beside it says both, parted by a stroke."""
    rows = [_row(folder) for folder in folders]
    lines = [_HEADINGS, tuple("---:" if position > 2 else "---" for position in range(len(_HEADINGS))), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(folder: Path) -> tuple[str, ...]:
    facts = CardFacts.load(folder)
    report = MemoryReport.load(folder) if (folder / REPORT_FILE).is_file() else None
    own = {"optimizer": facts.optimizer, "evaluation": facts.evaluation, "took": took(report) if report else {}}
    runs = [own, *facts.beside[:1]]
    measure = facts.evaluation[0] if facts.evaluation else {}
    names = f"[{plain(facts.name)}]({folder.name}/{CARD_FILE})", _beside(code(run["optimizer"]) for run in runs)
    before, after = ([number(_value(run, measure, key)) for run in runs] for key in ("before", "value"))
    costs = [
        [size_text(run["took"].get("peak")) for run in runs],
        [size_text(run["took"].get("optimizer_state")) for run in runs],
        [number(run["took"].get("seconds_per_step"), 3) for run in runs],
    ]
    return (*names, plain(measure.get("name", "")), before[0], *map(_beside, [after, *costs]))


def _value(run: dict[str, Any], measure: dict[str, Any], key: str) -> float | None:
    return next((entry.get(key) for entry in run["evaluation"] if entry["type"] == measure.get("type")), None)


def _beside(cells: Any) -> str:
    return " / ".join(filter(None, cells))

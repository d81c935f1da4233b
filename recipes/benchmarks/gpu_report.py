"""What `gpu.py` found as text: the table at its end, and the part of a page between two marks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_stages import STAGES, Stage
from quality_names import kinds_of, title_of


Record = Mapping[str, Any]
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
NOT_MEASURED = "not measured"
# Of a table that is open on the page.
MOST_LINES = 12


def number(form: str) -> Callable[[Any], str]:
    """Return what writes a number in a form; a figure that is not there is written as such."""
    return lambda value: NOT_MEASURED if value is None else form.format(value)


def text(value: Any) -> str:
    """Return a word as a cell of a table has it."""
    return NOT_MEASURED if value is None else str(value).replace("|", "\\|")


# For each kind of stage its heading, and the columns of its table: title, key in a record, form.
Column = tuple[str, str, Callable[[Any], str]]
TABLES: dict[str, tuple[str, tuple[Column, ...]]] = {
    "tests": ("Tests", tuple((title.capitalize(), title, text) for title in ("passed", "failed", "skipped"))),
    "step time": (
        "Time of a step",
        (
            ("Model", "model", text),
            ("Weights", "dtype", text),
            ("Optimizer", "optimizer", text),
            ("Milliseconds", "milliseconds", number("{:.2f}")),
            ("Of the host", "host_milliseconds", number("{:.2f}")),
            ("To fused AdamW", "ratio", number("{:.2f}x")),
            ("Of copying", "of_copy_bandwidth", number("{:.0%}")),
            ("Copying, GiB/s", "copy_gib_per_second", number("{:.0f}")),
        ),
    ),
    "memory": (
        "Peak memory",
        (
            ("Optimizer", "optimizer", text),
            ("Measured, GiB", "peak_gib", number("{:.2f}")),
            ("Predicted, GiB", "predicted_gib", number("{:.2f}")),
            ("Over predicted", "over_predicted", number("{:+.1%}")),
        ),
    ),
    "training": (
        "Training steps",
        (
            ("Optimizer", "optimizer", text),
            ("Tokens a second", "tokens_per_second", number("{:,.0f}")),
            ("Seconds a step", "seconds_per_step", number("{:.3f}")),
            ("Of it the optimizer", "optimizer_share", number("{:.1%}")),
            ("Peak, GiB", "peak_gib", number("{:.2f}")),
        ),
    ),
    "quality": (
        "Held-out loss",
        (
            ("Optimizer", "row", lambda row: text(title_of(row))),
            ("Embeddings / head / norms", "row", kinds_of),
            ("Held-out loss", "eval_loss", number("{:.3f}")),
            ("Learning rate", "learning_rate", number("{:.1e}")),
            ("Rates tried", "rates", text),
            ("Of them the best is", "edge", text),
            ("Tokens", "tokens", number("{:,}")),
        ),
    ),
    "ranks": (
        "Processes against one alone",
        (
            ("Backend", "backend", text),
            ("Processes", "processes", text),
            ("Way", "way", text),
            ("Optimizer", "optimizer", text),
            ("Difference", "difference", number("{:.1e}")),
            ("Seconds a step", "seconds", number("{:.4f}")),
            ("Alone", "seconds_alone", number("{:.4f}")),
            ("Failed with", "failed", lambda value: text(value or "")),
        ),
    ),
    "fine-tuning": (
        "Fine-tuning",
        (
            ("Model", "model", text),
            ("Held-out loss (GRPO: passed) before", "before", number("{:.3f}")),
            ("After", "after", number("{:.3f}")),
            ("Tokens a second", "tokens_per_second", number("{:,.0f}")),
            ("Peak, GiB", "peak_gib", number("{:.2f}")),
            ("Card", "card", lambda value: "written" if value else "not written"),
        ),
    ),
    "whitening": (
        "Whitenings",
        (
            ("Method", "method", text),
            ("Shape", "shape", lambda shape: " x ".join(map(str, shape))),
            ("Milliseconds", "milliseconds", number("{:.3f}")),
            ("To the paper's iteration", "ratio", number("{:.2f}x")),
            ("Cosine", "cosine", number("{:.4f}")),
        ),
    ),
}


def records_of(entry: Record | None) -> Sequence[Record]:
    """Return the figures that a stage left, be it measured to its end or stopped on the way."""
    return (entry or {}).get("records") or ()


def rows(stage: Stage, entry: Record | None) -> list[str]:
    """Return the lines of a table for one stage: its figures, or that it has none."""
    columns = TABLES[stage.kind][1]
    found = [[form(record.get(key)) for _, key, form in columns] for record in records_of(entry)]
    cells = found or [[NOT_MEASURED, *[""] * (len(columns) - 1)]]
    return [re.sub("  +", " ", f"| {stage.name} | {' | '.join(line)} |") for line in cells]


def tables(stages: Mapping[str, Record]) -> str:
    """Render a Markdown table for each kind of stage."""
    parts = []
    for kind, (heading, columns) in TABLES.items():
        head = f"| Stage | {' | '.join(title for title, *_ in columns)} |"
        lines = [line for stage in STAGES if stage.kind == kind for line in rows(stage, stages.get(stage.name))]
        table = [head, "|---|" + "---|" * len(columns), *lines]
        if len(lines) > MOST_LINES:
            table = [f"<details><summary>{len(lines)} lines</summary>", "", *table, "", "</details>"]
        parts.append("\n".join([f"### {heading}", "", *table, *reasons(kind, stages)]))
    return "\n\n".join(parts)


def reasons(kind: str, stages: Mapping[str, Record]) -> list[str]:
    """Return a line for each stage of a kind whose figures are not whole, or in which something failed: why."""
    entries = [(stage.name, stages.get(stage.name) or {}) for stage in STAGES if stage.kind == kind]
    told = [(name, entry) for name, entry in entries if records_of(entry) and entry.get("why")]
    return ["", *(f"- {name}: {entry['status']}, {entry['why']}." for name, entry in told)] if told else []


def section(results: Record) -> str:
    """Return what stands between the marks of the page, for a file of results or for `{}`."""
    if not results:
        return f"No run on a GPU was measured yet.\n\n{tables({})}"
    setup = results["setup"]
    facts = ", ".join(f"{key} {setup[key]}" for key in ("torch", "transformers", "cuda") if setup.get(key))
    first = f"Measured on one {setup['device']} ({facts}); file `gpu.json` in `recipes/benchmarks/results/`."
    return "\n\n".join(filter(None, [first, of_older_code(results["stages"]), tables(results["stages"])]))


def of_older_code(stages: Mapping[str, Record]) -> str:
    """Say which stages have figures of other code than the last one has that has any, or nothing."""
    codes = {name: entry.get("code") for name, entry in stages.items() if records_of(entry)}
    newest = max(codes, key=lambda name: stages[name].get("at", 0), default=None)
    older = [name for name, its_code in codes.items() if its_code != codes[newest]] if newest else []
    return f"Measured before the last change of the code: {'; '.join(older)}." if older else ""


def with_section(page: str, results: Record) -> str:
    """Return a page with the part between its marks renewed.

    Raises:
        SystemExit: the page has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"The page has no lines {BEGIN} and {END}, between which the figures stand: write them.")
    return f"{before}{BEGIN}\n{section(results)}\n{END}{after}"


def outcome(entry: Record) -> str:
    """Return in words how a stage went."""
    words = {"failed": "FAILED"}.get(entry["status"], entry["status"])
    return f"{words}: {entry['why']}" if entry.get("why") else words


def summary(stages: Mapping[str, Record]) -> str:
    """Return the table that is printed at the end: every stage, its time, and how it went."""
    width = max(len(stage.name) for stage in STAGES)
    return "\n".join(
        f"{name:{width}}  {entry.get('seconds', 0):6.0f} s  {outcome(entry)}" for name, entry in stages.items()
    )

"""The model card: what is known about a run and its memory report, rendered as one page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..measured.schema import PICTURE_FILE, REPORT_FILE, MemoryReport
from .facts import CardFacts
from .memory_section import gib, memory_section, number


def render_folder(folder: str | Path) -> str:
    """Return the card of an output folder from `card_data.json` and, where there is one, `memory_report.json`."""
    report = MemoryReport.load(folder) if (Path(folder) / REPORT_FILE).is_file() else None
    picture = PICTURE_FILE if (Path(folder) / PICTURE_FILE).is_file() else None
    return render(CardFacts.load(folder), report, picture)


def render(facts: CardFacts, report: MemoryReport | None = None, picture: str | None = None) -> str:
    """Return a model card: YAML block and Markdown."""
    loader = PackageLoader(__package__)
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters.update(gib=gib, number=number, cell=_cell)
    page = environment.get_template("model_card.md.jinja").render(
        facts=facts,
        metadata=yaml_dump(facts.metadata).strip() if facts.metadata else "",
        base=_link(facts),
        snippet=_snippet(facts),
        citation=facts.preset.citation if facts.preset else None,
        columns=list(dict.fromkeys(name for row in reversed(facts.results) for name in row)),
        section=memory_section(report, picture) if report else None,
    )
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def _cell(value: Any) -> str:
    """Return a value as it stands in a table."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={entry}" for key, entry in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")


def _link(facts: CardFacts) -> str:
    local = facts.base_is_local or not facts.base_model
    return f"`{facts.base_model}`" if local else f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"


def _snippet(facts: CardFacts) -> str | None:
    """Return code that loads the model and runs it."""
    if facts.metadata.get("pipeline_tag") != "text-generation":
        return None
    name = facts.repository or facts.name
    prompt = '[{"role": "user", "content": "What is memory?"}]' if facts.chat else '"The "'
    first = ["import hf_stateless  # which knows how its weights are stored"] if facts.needs_import else []
    load = f'generate = pipeline("text-generation", model="{name}")'
    use = f'print(generate({prompt}, max_new_tokens=64)[0]["generated_text"])'
    return "\n".join([*first, "from transformers import pipeline", "", load, use])

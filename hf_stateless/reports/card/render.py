"""The model card: what is known about a run and its memory report, rendered as one page."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ..command_line import first_line
from ..files import size_text
from ..measured.schema import PICTURE_FILE, REPORT_FILE, MemoryReport
from ..run_facts import is_hub_id
from .beside import beside_section, differences
from .curves import CURVES_FILE, alternative_text
from .dashboard import DASHBOARD_FILE
from .facts import CardFacts
from .markdown import code, link, metadata_values, one_line, plain, section, sentences
from .memory_section import memory_section, number, training_memory


logger = logging.getLogger(__name__)


def render_folder(folder: str | Path) -> str:
    """Return the card of an output folder from `card_data.json` and, where there is one, `memory_report.json`.

    A memory report that cannot be read is left out, with one warning.
    """
    facts, file = CardFacts.load(folder), Path(folder) / REPORT_FILE
    has = [(Path(folder) / name).is_file() for name in (PICTURE_FILE, CURVES_FILE, DASHBOARD_FILE)]
    picture, drawn, dashboard = PICTURE_FILE if has[0] else None, *has[1:]
    if file.is_file():
        try:
            return render(facts, MemoryReport.load(folder), picture, drawn=drawn, dashboard=dashboard)
        except Exception as error:  # whatever stands in that file, the card is about the model
            logger.warning("The model card gets no memory report: %s", one_line(first_line(error))[:300])
    return render(facts, drawn=drawn, dashboard=dashboard)


def render(
    facts: CardFacts,
    report: MemoryReport | None = None,
    picture: str | None = None,
    *,
    drawn: bool = False,
    dashboard: bool = False,
) -> str:
    """Return a model card: YAML block and Markdown.

    Args:
        facts: what it says of the run.
        report: what the run took.
        picture: the name of the picture of memory, where there is one.
        drawn: there is a picture of the curves.
        dashboard: there is a page of the curves.
    """
    section = memory_section(report, picture) if report else None
    found = {**facts.metadata, **training_memory(report)} if report and facts.metadata else facts.metadata
    columns = list(dict.fromkeys(name for row in reversed(facts.results) for name in row))
    page = _template().render(
        facts=facts,
        metadata=yaml_dump(metadata_values(found)).strip() if found else "",
        base=_base(facts),
        quick_start=_quick_start(facts),
        citation=facts.preset.citation if facts.preset else None,
        dashboard=DASHBOARD_FILE if dashboard else None,
        columns=columns,
        means=not any(name.startswith("held-out") for name in columns),
        section=section,
        beside=beside_section(facts, report) if facts.beside else [],
        differences=[differences(facts, report, other) for other in facts.beside],
        curves={"file": CURVES_FILE, "text": alternative_text(facts)} if drawn else None,
    )
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


@cache
def _template() -> Template:
    loader = PackageLoader(__package__)
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters.update(size=size_text, number=number, cell=_cell, plain=plain, code=code)
    environment.filters.update(sentences=sentences, section=section)
    return environment.get_template("model_card.md.jinja")


def _base(facts: CardFacts) -> str:
    """Return the base model: a link, or the name of a local folder with what that was made of."""
    if facts.base_is_local:
        return code(facts.base_model) + (f", made of {link(facts.origin)}" if facts.origin else "")
    return link(facts.base_model) if facts.base_model else ""


def _cell(value: Any) -> str:
    """Return a value as it stands in a table."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return plain(", ".join(map(str, value)))
    if isinstance(value, Mapping):
        return plain(", ".join(f"{key}={entry}" for key, entry in value.items()))
    return plain(value)


def _quick_start(facts: CardFacts) -> str | None:
    """Return code that loads what a reader has: the repository, or the folder of the card."""
    if facts.metadata.get("pipeline_tag") != "text-generation":
        return None
    if facts.adapter and facts.base_is_local:
        return f"The adapter works on its base model {code(facts.base_model)}, which is in no known repository."
    on_hub = facts.repository is not None and is_hub_id(facts.repository)
    name = facts.repository if on_hub and facts.repository else "."
    model = json.dumps(name)
    first = ["import hf_stateless  # which knows how its weights are stored"] if facts.needs_import else []
    if facts.tokenizer:
        prompt = '[{"role": "user", "content": "What is memory?"}]' if facts.chat else '"The "'
        lines = ["from transformers import pipeline", "", f'generate = pipeline("text-generation", model={model})']
        lines.append(f'print(generate({prompt}, max_new_tokens=64)[0]["generated_text"])')
    else:
        lines = ["from transformers import AutoModelForCausalLM", ""]
        lines += [f"model = AutoModelForCausalLM.from_pretrained({model})  # no tokenizer was saved with it"]
    if facts.in_8_bits:
        lines[0] += "  # reads the 8-bit weights with compressed-tensors: pip install compressed-tensors"
    where = "" if on_hub else "In the folder of this card:\n\n"
    served = ["", "```bash", f"vllm serve {shlex.quote(name)}", "```"] if facts.served else []
    return "\n".join([f"{where}```python", *first, *lines, "```", *served])

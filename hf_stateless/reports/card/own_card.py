"""What is taken over from the card that a trainer has written itself: its YAML block, and sections that ours lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers.modelcard import TASK_MAPPING

from ...trainer.optim_args import plain_name
from ..run_facts import is_hub_id
from .facts import CardFacts


_EMPTY = re.compile(r"more information needed", re.IGNORECASE)
_HEADING = re.compile(r"#{1,6} (.*)")
# What our card says itself, or what says nothing.
_NOT_TAKEN = {
    *("Quick start", "Memory report", "Evaluation", "Hyperparameters", "Results", "Versions"),
    *("Training hyperparameters", "Training results", "Framework versions", "Citation of the optimizer"),
}


def take_sections(facts: CardFacts, text: str) -> None:
    """Add to the facts of a card what the trainer's own card says."""
    for heading, body in _sections(text):
        if heading == "Training procedure":
            facts.notes = body
        elif heading == "Citations":
            facts.citations = body
        elif heading not in _NOT_TAKEN:
            facts.kept[heading] = body


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield heading and body of every section that says something; what stands before the second heading is left out.

    A body that asks for more information, or holds nothing but comments, says nothing.
    """
    found: list[tuple[str, list[str]]] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else _HEADING.fullmatch(line.rstrip())
        if heading:
            found.append((heading.group(1).strip(), []))
        elif found:
            found[-1][1].append(line)
    for name, lines in found[1:]:
        body = "\n".join(lines).strip()
        if re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL).strip() and not _EMPTY.search(body):
            yield name, re.sub(r"\n\s*\n", "\n\n", body)


def metadata(
    facts: CardFacts, theirs: dict[str, Any], task: str | None, datasets: list[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the YAML block, by which the Hub finds the model: that of the trainer's card, corrected and completed."""
    kept = {key: value for key, value in theirs.items() if key in ("language", "metrics")}
    tasks, arguments = given.get("tasks"), given.get("dataset_args")
    said = tasks if isinstance(tasks, str) else next(iter(tasks or ()), None)
    pipeline_tag = said or theirs.get("pipeline_tag") or _pipeline_tag(facts.model)
    ids = [name for name in datasets if is_hub_id(name)]
    own = ["hf_stateless", plain_name(facts.optimizer), "multi-normalization", "memory-efficient"]
    tags = [*(own if facts.stateless else own[:2]), *([task] if task else [])]
    # PEFT's tags name the base model by its path; the Hub makes them itself from `base_model`.
    tags += [tag for tag in theirs.get("tags") or () if not tag.startswith("base_model:") and tag not in tags]
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=ids[0] if ids else "text",
            dataset_name=entry["dataset"],
            dataset_args=arguments,
            metric_type=entry["type"],
            metric_name=entry["name"],
            metric_value=entry["value"],
        )
        for entry in facts.evaluation
        if pipeline_tag
    ]
    base = facts.origin if facts.base_is_local else facts.base_model
    if base:
        kept["base_model_relation"] = "adapter" if facts.adapter else "finetune"
    data = ModelCardData(
        base_model=base,
        datasets=ids or None,
        eval_results=results or None,
        library_name="peft" if facts.adapter else "transformers",
        model_name=facts.name,
        pipeline_tag=pipeline_tag,
        tags=tags,
        **kept,
    )
    return {key: value for key, value in data.to_dict().items() if value not in (None, [], "")}  # type: ignore[no-untyped-call]


def _pipeline_tag(model: str) -> str | None:
    known = ((task, names) for task, classes in TASK_MAPPING.items() for names in classes.values())
    return next((task for task, names in known if model in ([names] if isinstance(names, str) else names)), None)

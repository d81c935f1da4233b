"""The YAML block of a model card, by which the Hub finds the model."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers.modelcard import TASK_MAPPING

from ...trainer.optim_args import plain_name
from .facts import CardFacts


def metadata(facts: CardFacts, theirs: dict[str, Any], task: str | None, datasets: list[str]) -> dict[str, Any]:
    """Return the YAML block: what the trainer's card has, corrected and completed."""
    kept = {key: value for key, value in theirs.items() if key in ("language", "metrics")}
    pipeline_tag = theirs.get("pipeline_tag") or _pipeline_tag(facts.model)
    own = ["hf_stateless", plain_name(facts.optimizer), "multi-normalization", "memory-efficient"]
    tags = [*(own if facts.stateless else own[:2]), *([task] if task else [])]
    # PEFT's tags name the base model by its path; the Hub makes them itself from `base_model`.
    tags += [tag for tag in theirs.get("tags") or () if not tag.startswith("base_model:") and tag not in tags]
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=datasets[0] if datasets else "text",
            dataset_name=entry["dataset"],
            metric_type=entry["type"],
            metric_name=entry["name"],
            metric_value=entry["value"],
        )
        for entry in facts.evaluation
        if pipeline_tag
    ]
    base = None if facts.base_is_local else facts.base_model
    if base:
        kept["base_model_relation"] = "adapter" if facts.adapter else "finetune"
    data = ModelCardData(
        base_model=base,
        datasets=datasets or None,
        eval_results=results or None,
        library_name="peft" if facts.adapter else "transformers",
        model_name=facts.name,
        pipeline_tag=pipeline_tag,
        tags=tags,
        **kept,
    )
    values: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    return {key: value for key, value in values.items() if value not in (None, [], "")}


def _pipeline_tag(model: str) -> str | None:
    for task, classes in TASK_MAPPING.items():
        for names in classes.values():
            if model == names or (isinstance(names, (list, tuple)) and model in names):
                return str(task)
    return None

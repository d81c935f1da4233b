"""Where the facts of a model card come from: the trainer, its log, and the card that it wrote itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from transformers.modelcard import TASK_MAPPING

from ...trainer.options import LAYERWISE
from ...weights.int8.convert import int8_layers
from ..files import read_json
from ..provenance import versions, without_folders
from ..run_facts import adapter_of, base_of, hub_id
from .facts import CARD_FILE, CardFacts


if TYPE_CHECKING:
    from transformers import Trainer

EVALUATION_FILE = "evaluation.json"
# What the Trainer calls a data set that has no name of its own.
FORMATS = {"generator", "arrow", "json", "csv", "pandas", "parquet", "text", "default"}
EMPTY = re.compile(r"more information needed", re.IGNORECASE)
HEADING = re.compile(r"#{1,6} (.*)")

TASKS = {
    "SFTTrainer": ("sft", "supervised fine-tuning"),
    "GRPOTrainer": ("grpo", "GRPO"),
    "DPOTrainer": ("dpo", "DPO"),
    "KTOTrainer": ("kto", "KTO"),
    "RLOOTrainer": ("rloo", "RLOO"),
    "RewardTrainer": ("reward-trainer", "reward modelling"),
}
"""Trainers of TRL with the tag and the words for what they do."""
# What the card says itself, or what says nothing: sections of this name are not taken over from other cards.
OWN_SECTIONS = {
    *("Quick start", "Memory report", "Evaluation", "Hyperparameters", "Results", "Versions"),
    *("Training hyperparameters", "Training results", "Framework versions", "Citation of the optimizer"),
}
HYPERPARAMETERS = (
    *("optim", "optim_args", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_length", "packing", "beta", "loss_type", "num_generations", "max_completion_length", "temperature"),
    *("bf16", "fp16", "gradient_checkpointing", "seed"),
)
"""Arguments that are told where the trainer has them and they are not None, empty or false."""
OPTIMIZER_OPTIONS = {
    "multinorm": (
        "norms",
        "num_iterations",
        "lr_scale",
        "whitening",
        "ns_steps",
        "ns_beta",
        "ns_dtype",
        "stochastic_rounding",
        "min_signal",
        "momentum",
        "momentum_dtype",
        "width_rule",
    ),
    "adamw": ("betas", "eps"),
    "adamw_8bit": ("betas", "eps"),
}
METRICS = {
    "loss": "Loss",
    "perplexity": "Perplexity",
    "accuracy": "Accuracy",
    "mean_token_accuracy": "Mean token accuracy",
    "reward": "Mean reward",
    "rewards/accuracies": "Reward accuracy",
}
LONGEST_TABLE = 12


def collect(trainer: Trainer, own_card: ModelCard, given: Mapping[str, Any]) -> CardFacts:
    """Return what is known about a run.

    Args:
        trainer: a Trainer of transformers or TRL.
        own_card: the card that the trainer has just written.
        given: what the caller knows better: `base_model`, `license`, `datasets`, `data`, `remarks`.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    inner, adapter = base_of(model), adapter_of(model)
    name = given.get("base_model", inner.config.name_or_path) or ""
    base, is_local = _base_model(name)
    tag, words = next((TASKS[k.__name__] for k in type(trainer).__mro__ if k.__name__ in TASKS), (None, None))
    if tag is None and base is None:
        tag, words = "pretraining", None
    facts = CardFacts(
        name=(trainer.hub_model_id or Path(args.output_dir).resolve().name).split("/")[-1],
        model=type(inner).__name__,
        parameters=inner.num_parameters(),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        base_model=base,
        base_is_local=is_local,
        adapter=adapter and ("LoRA" if adapter[0] == "LORA" else adapter[0]),
        task=words,
        repository=trainer.hub_model_id,
        chat=bool(getattr(trainer.processing_class, "chat_template", None)),
        needs_import=any(True for _ in int8_layers(inner)),
        data=without_folders(given["data"]) if given.get("data") else None,
        remarks=[without_folders(remark) for remark in given.get("remarks") or ()],
        hyperparameters=_hyperparameters(trainer, adapter and adapter[1]),
        versions=_versions(type(trainer), adapter),
    )
    with_perplexity = tag in ("pretraining", "sft") and "CausalLM" in facts.model
    log = [_with_perplexity(entry) if with_perplexity else entry for entry in trainer.state.log_history]
    facts.results = _results(log)
    theirs: dict[str, Any] = own_card.data.to_dict()  # type: ignore[no-untyped-call]
    datasets = list(given.get("datasets", [name for name in theirs.get("datasets") or () if name not in FORMATS]))
    facts.evaluation = _evaluation(log, args.output_dir, ", ".join(datasets))
    for heading, body in _sections(own_card.text):
        if heading == "Training procedure":
            facts.notes = body
        elif heading == "Citations":
            facts.citations = body
        elif heading not in OWN_SECTIONS:
            facts.kept[heading] = body
    known = given.get("license") or theirs.get("license")
    licence = {"license": known} if known else _licence_of(name) if base else {}
    facts.metadata = {**_metadata(facts, theirs, tag, datasets), **licence}
    loaded = inner.config.name_or_path or ""
    private = {loaded: Path(loaded).name} if os.path.isdir(loaded) else {}
    private |= {os.path.abspath(args.output_dir): facts.name, os.getcwd(): ".", str(Path.home()): "~"}
    return CardFacts(**_shortened(asdict(facts), private))


def _shortened(value: Any, private: Mapping[str, Any]) -> Any:
    """Return plain values with the folders of this machine replaced in every text."""
    if isinstance(value, Mapping):
        return {key: _shortened(inner, private) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shortened(inner, private) for inner in value]
    for folder in sorted(private, key=len, reverse=True):
        if isinstance(value, str) and len(folder) > 1:
            value = value.replace(folder, str(private[folder]))
    return value


@cache
def _licence_of(model: str) -> dict[str, str]:
    """Return the keys of a model's card that tell its licence; nothing if the card cannot be had."""
    place = Path(model) / CARD_FILE if os.path.isdir(model) else model
    try:
        data = ModelCard.load(place, ignore_metadata_errors=True).data
    except (OSError, ValueError, httpx.HTTPError):
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def _base_model(name: str) -> tuple[str | None, bool]:
    """Return what may be told about the model that was trained further, and whether it is a local folder."""
    if not name or os.path.isfile(name):  # a config, from which a model with random weights was made
        return None, False
    known = hub_id(name)
    return (known, False) if known else (Path(name).name, True)


def _hyperparameters(trainer: Trainer, adapter: Any) -> dict[str, Any]:
    args, values = trainer.args, {}
    for name in HYPERPARAMETERS:
        value = getattr(args, name, None)
        value = getattr(value, "value", value)
        if value is not None and value is not False and value != "" and value != {}:
            values[name] = without_folders(value) if isinstance(value, str) else value
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    values.update(processes=args.world_size, sequences_per_step=sequences, steps=trainer.state.global_step)
    values.update(_optimizer_options(trainer))
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules"):
        value = getattr(adapter, name, None)
        if isinstance(value, (set, list)):
            value = sorted({module.rsplit(".", 1)[-1] for module in value})
        if value is not None:
            values[name] = value
    return values


def _optimizer_options(trainer: Trainer) -> dict[str, Any]:
    """Return what the groups of a live optimizer of this package say: what was run, defaults included."""
    found: dict[str, Any] = {}
    for group in trainer.optimizer.param_groups if trainer.optimizer else ():
        unused = set() if "spectral" in group.get("norms", ()) else {"whitening", "ns_steps", "ns_beta", "ns_dtype"}
        unused |= set() if group.get("momentum") else {"momentum_dtype"}
        for name in OPTIMIZER_OPTIONS.get(group.get("algorithm"), ()):
            if name not in unused and group.get(name) not in (None, 0, "none"):
                found.setdefault(f"{name} ({group['algorithm']})", group[name])
    return found


def _versions(trainer: type, adapter: Any) -> dict[str, str]:
    packages = ["hf_stateless", "transformers", "torch", "accelerate", "datasets", "tokenizers"]
    packages += [package for package in ("trl",) if trainer.__module__.startswith(package)]
    packages += ["peft"] if adapter else []
    found = versions(packages)
    return {"Python": found.pop("python"), **found}


def _with_perplexity(entry: Mapping[str, Any]) -> dict[str, Any]:
    if "eval_loss" not in entry:
        return dict(entry)
    return {**entry, "eval_perplexity": exp(min(entry["eval_loss"], 700.0))}


def _results(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the evaluations with the last training loss before each, or the training log if there are none."""
    rows, loss = [], None
    for entry in log:
        loss = entry.get("loss", loss)
        known = {name: entry[f"eval_{name}"] for name in METRICS if f"eval_{name}" in entry}
        if known:
            held_out = {f"held-out {METRICS[name].lower()}": value for name, value in known.items()}
            rows.append({"step": entry["step"], **({} if loss is None else {"training loss": loss}), **held_out})
    if not rows:
        names = {name: METRICS[name].lower() for name in METRICS if any(name in entry for entry in log)}
        rows = [
            {"step": entry["step"], **{text: entry[name] for name, text in names.items() if name in entry}}
            for entry in log
            if any(name in entry for name in names)
        ]
    every = -(-len(rows) // LONGEST_TABLE) or 1
    return rows[:-1][::every] + rows[-1:]


def _evaluation(log: list[dict[str, Any]], folder: str, dataset: str) -> list[dict[str, Any]]:
    """Return the last held-out metrics of the log, and those of `evaluation.json` in the output folder."""
    entries = [entry for entry in log if "eval_loss" in entry]
    where = dataset or "held-out part of the training data"
    before, after = (entries[0] if entries and entries[0]["step"] == 0 else {}), (entries or [{}])[-1]
    found = [
        {
            "type": name,
            "name": title,
            "before": before.get(f"eval_{name}"),
            "value": after[f"eval_{name}"],
            "dataset": where,
        }
        for name, title in METRICS.items()
        if f"eval_{name}" in after
    ]
    file = Path(folder) / EVALUATION_FILE
    return found + (_compared(read_json(file)) if file.is_file() else [])


def _compared(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the metrics of the recipes' `evaluation.json`: means before and after training."""
    where = f"{evaluation['questions']} held-out questions of {', '.join(evaluation['tasks'])}"
    return [
        {
            "type": name,
            "name": name.replace("_", " ").capitalize(),
            "before": evaluation["before"][name]["mean"],
            "value": figure["mean"],
            "standard_error": figure["standard_error"],
            "dataset": f"{where}, {evaluation['decoding']} decoding",
        }
        for name, figure in evaluation["after"].items()
    ]


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield heading and body of every section that says something; what stands before the second heading is left out.

    A body that asks for more information, or holds nothing but comments, says nothing.
    """
    found: list[tuple[str, list[str]]] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else HEADING.fullmatch(line.rstrip())
        if heading:
            found.append((heading.group(1).strip(), []))
        elif found:
            found[-1][1].append(line)
    for name, lines in found[1:]:
        body = "\n".join(lines).strip()
        if re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL).strip() and not EMPTY.search(body):
            yield name, re.sub(r"\n\s*\n", "\n\n", body)


def _metadata(facts: CardFacts, theirs: dict[str, Any], task: str | None, datasets: list[str]) -> dict[str, Any]:
    """Return the YAML block: what the trainer's card has, corrected and completed."""
    kept = {key: value for key, value in theirs.items() if key in ("language", "metrics")}
    pipeline_tag = theirs.get("pipeline_tag") or _pipeline_tag(facts.model)
    own = ["hf_stateless", facts.optimizer.removesuffix(LAYERWISE), "multi-normalization", "memory-efficient"]
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

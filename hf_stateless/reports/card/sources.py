"""Where the facts of a model card come from: the trainer, its log, and the card that it wrote itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from ...optimizer.rules import COMMON, told_options
from ...weights.int8.convert import int8_layers
from ..provenance import published_options, published_values, versions, without_folders
from ..run_facts import adapter_of, base_of, hub_id
from .facts import CARD_FILE, CardFacts
from .own_card import metadata, take_sections
from .training_log import evaluation_of, results


if TYPE_CHECKING:
    from transformers import Trainer

# What the Trainer calls a data set that has no name of its own.
FORMATS = {"generator", "arrow", "json", "csv", "pandas", "parquet", "text", "default"}
TASKS = {
    "SFTTrainer": ("sft", "supervised fine-tuning"),
    "GRPOTrainer": ("grpo", "GRPO"),
    "DPOTrainer": ("dpo", "DPO"),
    "KTOTrainer": ("kto", "KTO"),
    "RLOOTrainer": ("rloo", "RLOO"),
    "RewardTrainer": ("reward-trainer", "reward modelling"),
}
"""Trainers of TRL with the tag and the words for what they do."""
HYPERPARAMETERS = (
    *("optim", "optim_args", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_length", "packing", "beta", "loss_type", "num_generations", "max_completion_length", "temperature"),
    *("bf16", "fp16", "gradient_checkpointing", "seed"),
)
"""Arguments that the card lists when they are set."""


def collect(trainer: Trainer, own_card: ModelCard, given: Mapping[str, Any]) -> CardFacts:
    """Return what is known about a run: from its trainer, the card that it has just written, and who knows better."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    inner, adapter = base_of(model), adapter_of(model)
    loaded = inner.config.name_or_path or ""
    name = given.get("base_model", loaded) or ""
    base, is_local = _base_model(name)
    tag, words = _task(trainer, base)
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
    theirs: dict[str, Any] = own_card.data.to_dict()  # type: ignore[no-untyped-call]
    datasets = list(given.get("datasets", [name for name in theirs.get("datasets") or () if name not in FORMATS]))
    _take_log(facts, trainer, tag, datasets)
    take_sections(facts, own_card.text)
    known = given.get("license") or theirs.get("license")
    licence = {"license": known} if known else _licence_of(name) if base else {}
    facts.metadata = {**metadata(facts, theirs, tag, datasets), **licence}
    private = {loaded: Path(loaded).name} if os.path.isdir(loaded) else {}
    private |= {os.path.abspath(args.output_dir): facts.name, os.getcwd(): ".", str(Path.home()): "~"}
    return CardFacts(**_shortened(asdict(facts), private))


def _task(trainer: Trainer, base: str | None) -> tuple[str | None, str | None]:
    """Return the tag of what the trainer does, and words for it where it is not plain training."""
    known = next((TASKS[kind.__name__] for kind in type(trainer).__mro__ if kind.__name__ in TASKS), None)
    return known or ("pretraining" if base is None else None, None)


def _take_log(facts: CardFacts, trainer: Trainer, tag: str | None, datasets: list[str]) -> None:
    log = [dict(entry) for entry in trainer.state.log_history]
    predicts_tokens = tag in ("pretraining", "sft") and "CausalLM" in facts.model
    for entry in log:
        if predicts_tokens and "eval_loss" in entry:
            entry["eval_perplexity"] = exp(min(entry["eval_loss"], 700.0))
    facts.results = results(log)
    facts.evaluation = evaluation_of(log, trainer.args.output_dir, ", ".join(datasets))


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
    """Return the public name of the model that was trained further, and whether it is a local folder."""
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
    if args.optim_args:
        values["optim_args"] = ",".join(f"{key}={value}" for key, value in published_options(args.optim_args).items())
    if "lr_scheduler_kwargs" in values:
        values["lr_scheduler_kwargs"] = published_values(values["lr_scheduler_kwargs"])
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
        # What every group has is told once, with the first of them.
        left_out = COMMON if found else {}
        for name, value in (told_options(group) if "algorithm" in group else {}).items():
            if name not in left_out:
                found.setdefault(f"{name} ({group['algorithm']})", value)
    return found


def _versions(trainer: type, adapter: Any) -> dict[str, str]:
    packages = ["hf_stateless", "transformers", "torch", "accelerate", "datasets", "tokenizers"]
    packages += ["trl"] if trainer.__module__.startswith("trl") else []
    packages += ["peft"] if adapter else []
    found = versions(packages)
    return {"Python": found.pop("python"), **found}

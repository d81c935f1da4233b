"""Where the facts of a model card come from: the trainer, its log, and the card that it wrote itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from ...optimizer.rules import COMMON, told_options
from ...weights.int8.compressed import has_kernels
from ...weights.int8.convert import can_be_packed, int8_layers, int8_weights, without_scales
from ..measured.footprint import count_parameters
from ..provenance import published_options, published_values, versions, without_folders
from ..run_facts import adapter_of, base_of, hub_id, is_hub_id
from .facts import CARD_FILE, CardFacts
from .markdown import metadata_values, one_line, plain, visible
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
LICENCE = ("license", "license_name", "license_link")
"""Keys of a card that tell the licence."""
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
    own_name = (trainer.hub_model_id or Path(args.output_dir).resolve().name).split("/")[-1]
    in_8_bits = any(True for _ in int8_weights(inner)) and not adapter
    packed = in_8_bits and can_be_packed(inner)
    facts = CardFacts(
        name=one_line(given.get("model_name") or own_name),
        model=type(inner).__name__,
        parameters=sum(count_parameters(without_scales(inner)).values()),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        base_model=base,
        base_is_local=is_local,
        adapter=adapter and ("LoRA" if adapter[0] == "LORA" else adapter[0]),
        task=words,
        repository=trainer.hub_model_id,
        chat=bool(getattr(trainer.processing_class, "chat_template", None)),
        tokenizer=trainer.processing_class is not None,
        needs_import=in_8_bits and not packed,
        in_8_bits=in_8_bits and packed,
        served=in_8_bits and packed and has_kernels(layer for _, layer in int8_layers(inner)),
        data=_data(given),
        remarks=[without_folders(remark) for remark in given.get("remarks") or ()],
        limits=[without_folders(limit) for limit in given.get("limits") or ()],
        beside=list(given.get("beside") or ()),
        hyperparameters=_hyperparameters(trainer, adapter and adapter[1]),
        versions=_versions(type(trainer), adapter),
    )
    theirs: dict[str, Any] = own_card.data.to_dict()  # type: ignore[no-untyped-call]
    known = [name for name in theirs.get("datasets") or () if name not in FORMATS]
    datasets = listed(given["datasets"]) if "datasets" in given else known
    _take_log(facts, trainer, tag, listed(given.get("dataset_names")) or datasets)
    text = own_card.text
    for raw in filter(None, (loaded, args.optim_args)):  # a line break in them would begin a section of its own
        text = text.replace(raw, one_line(raw))
    take_sections(facts, text)
    licence = given.get("license") or theirs.get("license")
    of_base = _told_of(name, args.hub_token) if base and (is_local or not licence) else {}
    if is_local and not adapter and is_hub_id(of_base.get("base_model", "")):
        facts.origin = of_base["base_model"]
    licences = {"license": licence} if licence else {key: of_base[key] for key in LICENCE if key in of_base}
    facts.metadata = metadata_values({**metadata(facts, theirs, tag, datasets, given), **licences})
    private = {loaded: Path(loaded).name} if os.path.isdir(loaded) else {}
    private |= {os.path.abspath(args.output_dir): facts.name, os.getcwd(): ".", str(Path.home()): "~"}
    return CardFacts(**_shortened(asdict(facts), private))


def listed(value: str | Iterable[str] | None) -> list[str]:
    """Return one name or several as a list."""
    return [] if value is None else [value] if isinstance(value, str) else [str(name) for name in value]


def _data(given: Mapping[str, Any]) -> str | None:
    """Return what is said about the data: the given sentence, or one with the names that the caller gave."""
    names = listed(given.get("dataset_names"))
    text = given.get("data") or (f"It was trained on {' and '.join(map(plain, names))}." if names else None)
    return without_folders(text) if text else None


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
    """Return plain values with the folders of this machine replaced in every text, and what is not seen left out."""
    if isinstance(value, Mapping):
        return {key: _shortened(inner, private) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shortened(inner, private) for inner in value]
    if not isinstance(value, str):
        return value
    for folder in sorted(private, key=len, reverse=True):
        if len(folder) > 1:
            value = value.replace(folder, str(private[folder]))
    return visible(value)


@cache
def _told_of(model: str, token: str | None) -> dict[str, str]:
    """Return what a model's card tells of its licence and of the model it was made of; nothing without a card."""
    place = Path(model) / CARD_FILE if os.path.isdir(model) else model
    try:
        data = ModelCard.load(place, token=token, ignore_metadata_errors=True).data
        found = {key: data[key] for key in (*LICENCE, "base_model") if data.get(key)}
    except Exception:  # whatever stands in somebody else's card, ours is written
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


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

"""Train a LLaMA from scratch on text and report its held-out perplexity.

With no arguments it trains a small model with `optim: sinkgd_polar` on the text that every Python installation holds:

    accelerate launch recipes/pretrain.py

With a recipe, and any field of `ModelArguments`, `DataArguments` or `TrainingArguments` as a flag on top of it:

    accelerate launch recipes/pretrain.py --config recipes/llama-60m/pretrain/sinkgd.yaml --learning_rate 0.01
"""

import os
import platform
import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass, field, fields
from math import exp
from pathlib import Path
from typing import Literal

import torch
from adamw_by_kind import adamw_by_kind
from pretraining_data import load_blocks
from pretraining_text import DataArguments, InputError
from resume import train_or_finish
from script_start import (
    PushArguments,
    find_checkpoint,
    prepare_push,
    read_recipe,
    refuse_other_optimizers,
    use_all_cores,
)
from torch.optim import AdamW
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import hf_stateless  # makes swan, sinkgd and the others valid in --optim: before the parser is built
from hf_stateless.reports.card.attach import attach_model_card, save
from hf_stateless.reports.card.pushing import PushError, push, repository_later


RECIPES = Path(__file__).parent
DEFAULT_RECIPE = RECIPES / "llama-tiny" / "pretrain" / "sinkgd_polar.yaml"


@dataclass
class ModelArguments(PushArguments):
    """Which model is trained, from random weights."""

    _argument_group_name = "model"

    model_config: str = field(
        default="tiny",
        metadata={"help": "A size (tiny, 10m, 60m, 130m, 350m, 1b) or the path of a config.json of any causal LM."},
    )
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Type of the weights."})
    load_in_8bit_training: bool = field(
        default=False, metadata={"help": "Store linear layers in 8 bits and train them so."}
    )
    prompt: str | None = field(default=None, metadata={"help": "Completed at the end; default: some held-out text."})
    cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads of one process on CPU; default: all cores."}
    )
    adamw_rates: Literal["finetuning", "pretraining"] = field(
        default="finetuning",
        metadata={"help": "With --optim adamw_torch: rates by kind, as optim_args=rates=pretraining gives ours."},
    )
    compare_with: str | None = field(default=None, metadata={"help": "A line that is printed at the end."})


def parse_arguments(args: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Read the recipe named by `--config`, then the flags, which win.

    `TrlParser` does the same; this one needs no extra and answers a wrong name with one line.
    """
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    parser = HfArgumentParser(kinds, usage="pretrain.py [--config FILE.yaml] [--NAME VALUE ...]")
    config_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", default=str(DEFAULT_RECIPE))
    config, args = config_parser.parse_known_args(args)
    # The Trainer's filter of losses reads each one: on a GPU every step then waits for the device before it goes on.
    parser.set_defaults(output_dir="runs/llama-{model_config}-{optim}", logging_nan_inf_filter=False)
    parser.set_defaults(**read_recipe(config.config, known=[name.name for kind in kinds for name in fields(kind)]))
    try:
        return parser.parse_args_into_dataclasses(args, look_for_args_file=False)
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from error


def load_config(size: str) -> PretrainedConfig:
    """Return the model config of a size in `recipes/configs`, or of a config.json."""
    sizes = {file.stem.removeprefix("llama-"): file for file in (RECIPES / "configs").glob("llama-*.json")}
    file = sizes.get(size, Path(size))
    if not file.is_file():
        raise InputError(
            f"Unknown model_config {size!r}. Sizes: {', '.join(sorted(sizes))}; or give the path of a config.json."
        )
    return AutoConfig.from_pretrained(file)


def build_model(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with random weights whose vocabulary and special tokens are the tokenizer's."""
    config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def describe_text(args: DataArguments) -> dict[str, object]:
    """Return what the model card says about the text."""
    if args.dataset_name and not os.path.exists(args.dataset_name):
        link = f"[{args.dataset_name}](https://huggingface.co/datasets/{args.dataset_name})"
        return {"datasets": [args.dataset_name], "data": f"The text is that of {link}."}
    python = f"the sources and documentation of the standard library of Python {platform.python_version()}"
    text = "local files" if args.dataset_name or args.train_files else python
    return {"datasets": [], "data": f"The text is {text}."}


def make_baseline(model: PreTrainedModel, model_args: ModelArguments, args: TrainingArguments) -> AdamW | None:
    """Return AdamW with rates by kind where it is asked for; None where the Trainer makes the optimizer."""
    rates = model_args.adamw_rates
    if rates == "finetuning":
        return None
    if not args.optim.value.startswith("adamw_torch"):
        raise InputError(
            f"Got adamw_rates={rates} with optim={args.optim.value}: it is for adamw_torch. The optimizers of "
            f"hf_stateless take --optim_args rates={rates}."
        )
    return adamw_by_kind(model, args, rates)


def report(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments, seconds: float) -> None:
    """Print the perplexities, what they are compared with, a sampled completion and where the model lies."""
    state, folder = trainer.state, trainer.args.output_dir
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    opening = (
        tokenizer(model_args.prompt, add_special_tokens=False)["input_ids"]
        if model_args.prompt
        else trainer.eval_dataset[0]["input_ids"][:32]
    )
    inputs = torch.tensor([opening], device=trainer.model.device)
    set_seed(trainer.args.seed)
    room = max(1, trainer.model.config.max_position_embeddings - len(opening))
    options = {"max_new_tokens": min(64, room), "do_sample": True, "top_p": 0.9}
    output = trainer.model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
    print(f"\nHeld-out perplexity: {exp(losses[0]):.1f} before, {exp(losses[-1]):.1f} after {state.global_step} steps")
    if model_args.compare_with:
        print(model_args.compare_with)
    print(f"Sample completion, of:\n{tokenizer.decode(opening)}\n--- continued as:")
    print(f"{tokenizer.decode(output[0, len(opening) :])}\n")
    print(f'Model: {folder}, for AutoModelForCausalLM.from_pretrained("{folder}")')
    print(f"Time: {seconds:.0f} s")


def main() -> None:
    start = time.perf_counter()
    model_args, data_args, args = parse_arguments()
    if data_args.streaming and args.max_steps <= 0:
        raise InputError("A streamed dataset has no known length: give --max_steps.")
    config = load_config(model_args.model_config)
    positions = config.max_position_embeddings
    if data_args.block_size > positions:
        raise InputError(f"Got block_size={data_args.block_size}, but the model has {positions} positions.")
    size = Path(model_args.model_config).stem
    args.output_dir = args.output_dir.replace("{model_config}", size).replace("{optim}", args.optim.value)
    if model_args.load_in_8bit_training:
        refuse_other_optimizers(args)
    checkpoint = find_checkpoint(args)
    use_all_cores(args, model_args.cpu_threads)

    with args.main_process_first(desc="data preparation"):
        train_blocks, held_out_blocks, tokenizer = load_blocks(data_args, config.vocab_size)
    set_seed(args.seed)
    model = build_model(config, tokenizer, getattr(torch, model_args.dtype))
    if model_args.load_in_8bit_training:
        hf_stateless.quantize(model, hf_stateless.Int8TrainingConfig())
    with repository_later(args):
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=train_blocks,
            eval_dataset=held_out_blocks,
            processing_class=tokenizer,
            data_collator=default_data_collator,
            optimizers=(make_baseline(model, model_args, args), None),
        )
    hf_stateless.attach_memory_report(trainer)
    attach_model_card(trainer, base_model="", **describe_text(data_args))
    prepare_push(trainer, model_args)
    if trainer.is_world_process_zero():
        held_out_tokens = len(held_out_blocks) * data_args.block_size
        print(f"{trainer.model.num_parameters():,} parameters, vocabulary of {len(tokenizer):,}")
        print(f"Perplexity is measured on {held_out_tokens:,} held-out tokens")
    train_or_finish(trainer, checkpoint)
    if all(entry["step"] < trainer.state.global_step for entry in trainer.state.log_history if "eval_loss" in entry):
        trainer.evaluate()
    save(trainer)
    if trainer.is_world_process_zero():
        report(trainer, tokenizer, model_args, time.perf_counter() - start)
    if args.push_to_hub:
        push(trainer)


if __name__ == "__main__":
    try:
        main()
    except (InputError, PushError) as error:
        sys.exit(f"pretrain.py: error: {error}")

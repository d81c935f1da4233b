"""Train a LLaMA from scratch on text and report its held-out perplexity.

With no arguments it trains a small model with `optim: sinkgd` on the text that every Python installation holds:

    accelerate launch recipes/pretrain.py

With a recipe, and any field of `ModelArguments`, `DataArguments` or `TrainingArguments` as a flag on top of it:

    accelerate launch recipes/pretrain.py --config recipes/llama-60m/pretrain/sinkgd.yaml --learning_rate 0.01
"""

import difflib
import os
import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass, field, fields
from math import exp
from pathlib import Path
from typing import Literal

import psutil
import torch
import yaml
from pretraining_data import load_blocks
from pretraining_text import DataArguments, InputError
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
from transformers.trainer_utils import get_last_checkpoint

import hf_stateless  # noqa: F401  (makes swan, sinkgd and multinorm valid in --optim: before the parser is built)


RECIPES = Path(__file__).parent
DEFAULT_RECIPE = RECIPES / "llama-tiny" / "pretrain" / "sinkgd.yaml"


@dataclass
class ModelArguments:
    """Which model is trained, from random weights."""

    _argument_group_name = "model"

    model_config: str = field(
        default="tiny",
        metadata={"help": "A size (tiny, 10m, 60m, 130m, 350m, 1b) or the path of a config.json of any causal LM."},
    )
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Type of the weights."})
    prompt: str | None = field(default=None, metadata={"help": "Completed at the end; default: some held-out text."})
    cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads of one process on CPU; default: all cores."}
    )


def parse_arguments(args: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Read the recipe named by `--config`, then the flags, which win.

    `TrlParser` does the same; this one needs no extra and answers a wrong name with one line.
    """
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    parser = HfArgumentParser(kinds, usage="pretrain.py [--config FILE.yaml] [--NAME VALUE ...]")
    config_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", default=str(DEFAULT_RECIPE))
    config, args = config_parser.parse_known_args(args)
    parser.set_defaults(output_dir="runs/llama-{model_config}-{optim}")
    parser.set_defaults(**_read_recipe(config.config, known=[name.name for kind in kinds for name in fields(kind)]))
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


def find_checkpoint(args: TrainingArguments) -> str | None:
    """Return the checkpoint to resume from; refuse to mix a new run with the checkpoints of an old one."""
    latest = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    wanted = str(args.resume_from_checkpoint or False)
    if wanted.lower() == "false" and latest:
        raise InputError(
            f"{args.output_dir} holds checkpoints of an earlier run: continue it with --resume_from_checkpoint true, "
            "or choose another --output_dir."
        )
    found = {"true": latest, "false": None}.get(wanted.lower(), wanted)
    if wanted.lower() != "false" and not (found and os.path.isdir(found)):
        raise InputError(f"No checkpoint at {found or args.output_dir}: give its folder, or true for the latest one.")
    return found


def report(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, prompt: str | None, seconds: float) -> None:
    """Print the perplexities, a sampled completion and where the model lies."""
    state, folder = trainer.state, trainer.args.output_dir
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    opening = (
        tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if prompt
        else trainer.eval_dataset[0]["input_ids"][:32]
    )
    inputs = torch.tensor([opening], device=trainer.model.device)
    set_seed(trainer.args.seed)
    room = max(1, trainer.model.config.max_position_embeddings - len(opening))
    options = {"max_new_tokens": min(64, room), "do_sample": True, "top_p": 0.9}
    output = trainer.model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
    print(f"\nHeld-out perplexity: {exp(losses[0]):.1f} before, {exp(losses[-1]):.1f} after {state.global_step} steps")
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
    checkpoint = find_checkpoint(args)
    if args.device.type == "cpu" and args.world_size == 1:
        # accelerate launch sets OMP_NUM_THREADS=1, which would leave all cores but one idle.
        torch.set_num_threads(model_args.cpu_threads or psutil.cpu_count(logical=False) or 1)

    with args.main_process_first(desc="data preparation"):
        train_blocks, held_out_blocks, tokenizer = load_blocks(data_args, config.vocab_size)
    set_seed(args.seed)
    trainer = Trainer(
        model=build_model(config, tokenizer, getattr(torch, model_args.dtype)),
        args=args,
        train_dataset=train_blocks,
        eval_dataset=held_out_blocks,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    if trainer.is_world_process_zero():
        held_out_tokens = len(held_out_blocks) * data_args.block_size
        print(f"{trainer.model.num_parameters():,} parameters, vocabulary of {len(tokenizer):,}")
        print(f"Perplexity is measured on {held_out_tokens:,} held-out tokens")
    trainer.train(resume_from_checkpoint=checkpoint)
    if all(entry["step"] < trainer.state.global_step for entry in trainer.state.log_history if "eval_loss" in entry):
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        report(trainer, tokenizer, model_args.prompt, time.perf_counter() - start)
    if args.push_to_hub:
        trainer.push_to_hub()


def _read_recipe(file: str, known: list[str]) -> dict[str, object]:
    if not os.path.isfile(file):
        raise InputError(f"File not found: --config {file}")
    values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no YAML mapping of NAME: VALUE.")
    for name in values.keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1)
        raise InputError(f"Unknown key {name!r} in {file}." + (f" Did you mean {near[0]!r}?" if near else ""))
    return values


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"pretrain.py: error: {error}")

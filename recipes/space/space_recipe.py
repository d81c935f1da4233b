"""What a visitor copies: the command that predicts, the YAML of a recipe, the command that trains, and a link."""

from __future__ import annotations

import shlex

from space_choice import OURS, UPLOADED, Choice


def memory_command(choice: Choice) -> str:
    """Return the command whose table has the figures of the page."""
    model = "config.json" if choice.model == UPLOADED else choice.model
    return shlex.join(["hf-stateless", "memory", model, *choice.arguments()])


def train_command(choice: Choice) -> str:
    """Return the command that trains with the YAML of the page, saved as `mine.yaml`."""
    several = "--config_file recipes/accelerate_configs/fsdp2.yaml "
    ranks = f"{several}--num_processes {choice.gpus} " if choice.gpus > 1 else ""
    training = 'recipes/sft.py --config mine.yaml --train_files "data/*.jsonl"'
    return f"accelerate launch {ranks}{training}"


def recipe(choice: Choice) -> str:
    """Return the YAML of `recipes/sft.py` for a choice."""
    adapters = choice.lora > 0
    lines = [
        f"model_name_or_path: {'MODEL' if choice.model == UPLOADED else choice.model}",
        f"dtype: {'float32' if choice.dtype == 'fp32' else 'bfloat16'}",
        *(["load_in_8bit_training: true"] if choice.dtype == "int8" else []),
        *(["use_peft: true", f"lora_r: {choice.lora}"] if adapters else []),
        f"max_length: {choice.seq}",
        "packing: true  # every sequence has max_length tokens",
        f"per_device_train_batch_size: {choice.batch}",
        f"bf16: {'false' if choice.dtype == 'fp32' else 'true'}",
        f"gradient_checkpointing: {'true' if choice.checkpointing else 'false'}",
        f"optim: {choice.optim()}",
        *(["optim_target_modules: all-linear"] if choice.method == "galore_adamw" else []),
        f"learning_rate: {'1.0e-3' if adapters else '1.0e-4'}  # a start, not the result of a sweep",
        "weight_decay: 0.0",
    ]
    return "\n".join(lines) + "\n"


def install_line(choice: Choice) -> str:
    """Return how to install what the training command needs."""
    extras = ["trl", *(["peft"] if choice.lora else []), *(["bnb"] if choice.method == "adamw_bnb_8bit" else [])]
    extras += ["peers"] if choice.method not in (*OURS, "adamw_torch_fused", "adamw_bnb_8bit") else []
    return f'pip install -e ".[{",".join(extras)}]"'

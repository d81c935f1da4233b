"""Fine-tune a causal language model on chats or on prompts with completions, with SFTTrainer of TRL.

With no arguments it trains SmolLM2-135M-Instruct with `optim: sinkgd` on questions that reasoning-gym makes:

    accelerate launch recipes/sft.py

With a recipe, and any field of `SFTConfig`, TRL's `ModelConfig` or `DataArguments` as a flag on top of it:

    accelerate launch recipes/sft.py --config recipes/smollm2-135m/sft/sinkgd.yaml --train_files chats.jsonl --packing
    accelerate launch recipes/sft.py --config recipes/smollm2-135m/sft-lora/sinkgd.yaml --load_in_8bit
"""

import time

from finetuning_data import DataArguments, describe_rows, load_rows
from finetuning_model import (
    ModelArguments,
    before_and_after,
    building,
    complete,
    describe_model,
    find_checkpoint,
    find_model,
    loading_line,
    parse_arguments,
    prepare_push,
    prepare_trainer,
    run_script,
    train_and_save,
    use_all_cores,
)
from trl import DatasetMixtureConfig, SFTConfig, SFTTrainer, get_peft_config

import hf_stateless
from hf_stateless.reports.card.attach import attach_model_card
from hf_stateless.reports.card.pushing import push


def split_last_answer(row: dict) -> tuple[str | list[dict], str] | None:
    """Return the prompt of a row and the answer it has, or None where it is plain text."""
    if "prompt" in row:
        prompt, answer = row["prompt"], row["completion"]
        return prompt, answer if isinstance(answer, str) else answer[-1]["content"]
    messages = row.get("messages") or []
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return None
    return messages[:-1], messages[-1]["content"]


def report(trainer: SFTTrainer, row: dict) -> None:
    """Print the held-out loss before and after, and one answer."""
    print(f"\nHeld-out loss: {before_and_after(trainer, 'eval_loss')}")
    if (parts := split_last_answer(row)) is not None:
        prompt, answer = parts
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        print(f"A held-out question:\n{question.strip()}\n--- the data answers:\n{answer.strip()}")
        print(f"--- the model answers:\n{complete(trainer, prompt)}\n")


def main() -> None:
    start = time.perf_counter()
    args, model_args, data_args, mixture = parse_arguments(
        "sft", SFTConfig, ModelArguments, DataArguments, DatasetMixtureConfig
    )
    checkpoint = find_checkpoint(args)
    use_all_cores(args, model_args.cpu_threads)
    with args.main_process_first(desc="model and data"):
        model = find_model(args, model_args)
        train, held_out = load_rows("sft", data_args, mixture, args.dataset_text_field)
    with building(args):
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            peft_config=get_peft_config(model_args),
        )
    prepare_trainer(trainer)
    hf_stateless.attach_memory_report(trainer)
    attach_model_card(trainer, **describe_model(model_args, model), **describe_rows(data_args, mixture))
    prepare_push(trainer, model_args)
    train_and_save(trainer, checkpoint)
    if trainer.is_world_process_zero():
        report(trainer, next(iter(held_out)))
        print(loading_line(args.output_dir, model_args.use_peft))
        print(f"Time: {time.perf_counter() - start:.0f} s")
    if args.push_to_hub:
        push(trainer)


if __name__ == "__main__":
    run_script(main)

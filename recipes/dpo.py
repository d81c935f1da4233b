"""Train a causal language model on preferences, pairs of a chosen and a rejected answer, with DPOTrainer of TRL.

With no arguments it trains SmolLM2-135M-Instruct with `optim: sinkgd` on right and wrong answers to questions that
reasoning-gym makes:

    accelerate launch recipes/dpo.py

With a recipe, and any field of `DPOConfig`, TRL's `ModelConfig` or `DataArguments` as a flag on top of it:

    accelerate launch recipes/dpo.py --config recipes/smollm2-135m/dpo/sinkgd.yaml --train_files preferences.jsonl
"""

import time

from finetuning_data import DataArguments, describe_rows, load_rows
from finetuning_model import (
    ModelArguments,
    before_and_after,
    building,
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
from trl import DatasetMixtureConfig, DPOConfig, DPOTrainer, get_peft_config

import hf_stateless
from hf_stateless.reports.card.attach import attach_model_card
from hf_stateless.reports.card.pushing import push


def main() -> None:
    start = time.perf_counter()
    args, model_args, data_args, mixture = parse_arguments(
        "dpo", DPOConfig, ModelArguments, DataArguments, DatasetMixtureConfig
    )
    checkpoint = find_checkpoint(args)
    use_all_cores(args, model_args.cpu_threads)
    with args.main_process_first(desc="model and data"):
        model = find_model(args, model_args)
        train, held_out = load_rows("dpo", data_args, mixture)
    with building(args):
        trainer = DPOTrainer(
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
        print(f"\nHeld-out loss: {before_and_after(trainer, 'eval_loss')}")
        print(f"Held-out pairs told apart: {before_and_after(trainer, 'eval_rewards/accuracies')}")
        print(loading_line(args.output_dir, model_args.use_peft))
        print(f"Time: {time.perf_counter() - start:.0f} s")
    if args.push_to_hub:
        push(trainer)


if __name__ == "__main__":
    run_script(main)

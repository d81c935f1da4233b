"""Train a chat model by GRPO on questions whose answers a program can check, and report how many it answers.

With no arguments it trains SmolLM2-135M-Instruct with `optim: sinkgd` on sums of one-digit numbers:

    accelerate launch recipes/grpo.py

With a recipe, and any field of TRL's `GRPOConfig` and `ModelConfig` or of `TaskArguments` as a flag on top of it:

    accelerate launch recipes/grpo.py --config recipes/smollm2-135m/grpo/swan.yaml --task leg_counting --use_peft
"""

import importlib.util
import time

import torch
from finetuning_model import (
    InputError,
    ModelArguments,
    building,
    describe_model,
    find_checkpoint,
    find_model,
    loading_line,
    parse_arguments,
    prepare_push,
    prepare_trainer,
    run_script,
    use_all_cores,
)
from held_out_evaluation import compare, describe, evaluate, write_evaluation
from reasoning_tasks import ReasoningTasks, TaskArguments
from resume import train_or_finish
from trl import GRPOConfig, GRPOTrainer, get_peft_config

import hf_stateless
from hf_stateless.reports.card.attach import attach_model_card, save
from hf_stateless.reports.card.pushing import push


CAN_USE_VLLM = importlib.util.find_spec("vllm") is not None and torch.cuda.is_available()


def check_arguments(args: GRPOConfig) -> None:
    """Refuse what TRL would refuse later, and settle what depends on the machine."""
    if args.use_vllm and not CAN_USE_VLLM:
        raise InputError("Got use_vllm, which needs a CUDA device and `pip install vllm`: leave it out.")
    args.use_vllm = args.use_vllm and not args.use_cpu
    if args.eval_strategy == "no":
        args.eval_on_start = False  # TRL's own evaluation; this script evaluates before and after in any case


def make_trainer(args: GRPOConfig, model_args: ModelArguments, tasks: ReasoningTasks) -> tuple[GRPOTrainer, list[str]]:
    """Return the trainer and what its card remarks on the model.

    The verifier's score and the format are two rewards that are logged apart.
    """
    with args.main_process_first(desc="model"):
        model = find_model(args, model_args)
    with building(args):
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[tasks.verifier_reward, tasks.format_reward],
            args=args,
            train_dataset=tasks.train,
            eval_dataset=tasks.held_out if args.eval_strategy != "no" else None,
            peft_config=get_peft_config(model_args),
        )
    prepare_trainer(trainer)
    hf_stateless.attach_memory_report(trainer)
    said = describe_model(model_args, model)
    attach_model_card(trainer, **said, data=describe_questions(tasks))
    prepare_push(trainer, model_args)
    return trainer, list(said.get("remarks", []))


def describe_questions(tasks: ReasoningTasks) -> str:
    """Return what the model card says about the data."""
    return f"The data are {len(tasks.train):,} questions that reasoning-gym made ({', '.join(tasks.args.task)})."


def main() -> None:
    start = time.perf_counter()
    args, model_args, task_args = parse_arguments(
        "grpo", GRPOConfig, ModelArguments, TaskArguments, use_vllm=CAN_USE_VLLM
    )
    check_arguments(args)
    checkpoint = find_checkpoint(args)
    use_all_cores(args, model_args.cpu_threads)
    tasks = ReasoningTasks(task_args)
    trainer, remarks = make_trainer(args, model_args, tasks)
    if trainer.is_world_process_zero():
        print(f"{len(tasks.train):,} train and {len(tasks.held_out):,} held-out questions, none in both")
    before = evaluate(trainer, tasks)
    train_or_finish(trainer, checkpoint)
    report = compare(tasks, before, evaluate(trainer, tasks))
    if trainer.is_world_process_zero():
        file = write_evaluation(report, args.output_dir)
    attach_model_card(trainer, remarks=[*remarks, " ".join(describe(report).splitlines())])
    save(trainer)
    if trainer.is_world_process_zero():
        print(f"\n{describe(report)}\nEach question with its answers: {file}")
        print(loading_line(args.output_dir, is_adapter=model_args.use_peft))
        print(f"Time: {time.perf_counter() - start:.0f} s")
    if args.push_to_hub:
        push(trainer)


if __name__ == "__main__":
    run_script(main)

"""How many held-out questions a model answers, before and after training, with standard errors."""

import os
import statistics
from collections import Counter
from typing import Any

import torch
from accelerate.utils import gather_object
from reasoning_tasks import ReasoningTasks
from trl import GRPOTrainer

from hf_stateless.reports.files import write_json


FILE = "evaluation.json"
FIGURES = ("passed", "verifier_reward", "format_reward")

Answers = list[dict[str, Any]]


def evaluate(trainer: GRPOTrainer, tasks: ReasoningTasks) -> Answers:
    """Return, for each held-out question, its completions and its figures, averaged over them.

    `passed` is the part of the completions to which the verifier gives its full score of 1.
    """
    answers = []
    for number, completions in zip(tasks.held_out["question"], _complete(trainer, tasks), strict=True):
        numbers = [number] * len(completions)
        scores = tasks.verifier_reward(completions, numbers)
        figures = {
            "passed": statistics.fmean(score >= 1 for score in scores),
            "verifier_reward": statistics.fmean(scores),
            "format_reward": statistics.fmean(tasks.format_reward(completions, numbers)),
        }
        answers.append({"completions": completions, **figures})
    return answers


def compare(tasks: ReasoningTasks, before: Answers, after: Answers) -> dict[str, Any]:
    """Return what goes into `evaluation.json`: means with their standard errors over the questions.

    The difference is taken question by question, and its standard error is that of these differences. What a model
    would pass that gives the most common answer each time stands beside them.
    """
    entries = [tasks.questions[number].entry for number in tasks.held_out["question"]]
    (constant, times), *_ = Counter(entry["answer"] for entry in entries).most_common(1)
    report = {
        "tasks": tasks.args.task,
        "questions": len(entries),
        "most_common_answer": {"answer": constant, "share": times / len(entries)},
        "completions_per_question": max(1, tasks.args.eval_samples),
        "decoding": "sampled" if tasks.args.eval_samples else "greedy",
        "before": {figure: mean_and_error([a[figure] for a in before]) for figure in FIGURES},
        "after": {figure: mean_and_error([a[figure] for a in after]) for figure in FIGURES},
        "difference": {
            figure: mean_and_error([late[figure] - early[figure] for early, late in zip(before, after, strict=True)])
            for figure in FIGURES
        },
    }
    report["answers"] = [
        {"question": entry["question"], "answer": entry["answer"], "before": early, "after": late}
        for entry, early, late in zip(entries, before, after, strict=True)
    ]
    return report


def mean_and_error(values: list[float]) -> dict[str, float]:
    """Return the mean and its standard error, the sample standard deviation over sqrt(n)."""
    return {"mean": statistics.fmean(values), "standard_error": statistics.stdev(values) / len(values) ** 0.5}


def write_evaluation(report: dict[str, Any], folder: str) -> str:
    """Write `evaluation.json` into a folder and return its path."""
    file = os.path.join(folder, FILE)
    write_json(file, report)
    return file


def describe(report: dict[str, Any]) -> str:
    """Return the comparison in words."""
    before, after, difference = (report[name]["passed"] for name in ("before", "after", "difference"))
    formats = [report[name]["format_reward"]["mean"] for name in ("before", "after")]
    error = difference["standard_error"]
    size = f", {abs(difference['mean']) / error:.1f} standard errors" if error else ""
    how = f"{report['completions_per_question']} sampled each" if report["decoding"] == "sampled" else "greedy"
    return (
        f"Held-out questions passed, of {report['questions']} ({how}): "
        f"{before['mean']:.3f} (standard error {before['standard_error']:.3f}) before, "
        f"{after['mean']:.3f} ({after['standard_error']:.3f}) after; "
        f"the difference is {difference['mean']:+.3f} with a standard error of {error:.3f}{size}.\n"
        f"Answers of the right shape: {formats[0]:.3f} before, {formats[1]:.3f} after. "
        f"The most common answer, given to every question, would pass {report['most_common_answer']['share']:.3f}."
    )


def _complete(trainer: GRPOTrainer, tasks: ReasoningTasks) -> list[list[str]]:
    """Return the completions of each held-out question; every process answers its share."""
    rows = list(enumerate(tasks.held_out["prompt"]))
    size = trainer.args.per_device_eval_batch_size
    model = trainer.accelerator.unwrap_model(trainer.model)
    was_training = model.training
    model.eval()
    found = []
    # Padded shares: with sharded weights each process has to run as many batches as the others.
    with trainer.accelerator.split_between_processes(rows, apply_padding=True) as share, torch.random.fork_rng():
        torch.manual_seed(trainer.args.seed + trainer.accelerator.process_index)
        for start in range(0, len(share), size):
            numbers, prompts = zip(*share[start : start + size], strict=True)
            found += zip(numbers, _generate(trainer, model, list(prompts), tasks.args.eval_samples), strict=True)
    model.train(was_training)
    by_row = dict(gather_object(found))
    return [by_row[row] for row, _ in rows]


@torch.no_grad()
def _generate(trainer: GRPOTrainer, model: torch.nn.Module, prompts: list, samples: int) -> list[list[str]]:
    tokenizer, args = trainer.processing_class, trainer.args
    texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    if samples:
        how = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    else:
        how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    tokens = model.generate(
        **inputs.to(model.device),
        **how,
        num_return_sequences=samples or 1,
        max_new_tokens=args.max_completion_length,
        synced_gpus=trainer.accelerator.num_processes > 1,
    )
    new = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [new[i : i + (samples or 1)] for i in range(0, len(new), samples or 1)]

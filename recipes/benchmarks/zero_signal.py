"""GRPO where most groups of completions say nothing: what the steps of such groups do, and what a guard saves.

    python recipes/benchmarks/zero_signal.py --learning_rates 1e-3 3e-3 --seeds 0 1 --output results.json
    python recipes/benchmarks/zero_signal.py --empty 0 --steps 100 --rows AdamW "AdamW, matrices apart" sinkgd swan \
        --learning_rates 3e-4 1e-3 3e-3 1e-2 3e-2 1e-1 --seeds 0 1 2 --output results.json

A tiny LLaMA is to answer a word with words of its kind, one of four. One group of completions is one step; in a known
share of the steps (`--empty`) all completions get the same reward up to a noise of 1e-3. Rewards are not scaled, so
that the gradient is about a hundredth of its usual size there: AdamW's moments keep its step small, while a normalised
update has its full size, in a random direction. Shown is the share of right words before and after, sampled from the
model: with the informative groups alone and with the empty ones in between, with the guard (`min_signal`) and without.
The table stands in hf_stateless/optimizer/README.md. With `--empty 0` all groups say something, and what is printed
is the share after training by learning rate, which stands in recipes/README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, disable_progress_bars
from quality_plan import AdamWFactory
from result_files import write_results
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

import hf_stateless


ANSWER, GROUP, NOISE = 8, 32, 1e-3
# The rate of matrices, as a part of that of the words, which learn most here.
MATRICES = 0.2
SPECIAL = ["<pad>", "<end>"]
WORDS = [f"{kind}{number}" for kind in "abcd" for number in range(8)]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"optim": "adamw_torch"},
    "AdamW, matrices apart": {"optim": "adamw_torch", "apart": True},
    "sinkgd": {"optim": "sinkgd"},
    "sinkgd, guarded": {"optim": "sinkgd", "min_signal": True},
    "swan": {"optim": "swan"},
    "swan, guarded": {"optim": "swan", "min_signal": True},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of which every word is one token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def make_model(seed: int) -> LlamaForCausalLM:
    """Return an untrained LLaMA of 0.1M parameters."""
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=len(SPECIAL + WORDS),
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def share_right(prompt: str, completion: str) -> float:
    """Return the share of the words of an answer that are of the prompt's kind."""
    return sum(word[0] == prompt[0] for word in completion.split()) / ANSWER


def rewards(prompts: list[str], completions: list[str], informative: list[bool], **_: Any) -> list[float]:
    """Return the share of right words, or noise where the group says nothing."""
    noise = (NOISE * torch.randn(len(prompts))).tolist()
    return [
        share_right(prompt, completion) if says else noise[i]
        for i, (prompt, completion, says) in enumerate(zip(prompts, completions, informative, strict=True))
    ]


def make_questions(steps: int, empty: float, seed: int) -> Dataset:
    """Return one question for each step, in order; the informative ones are the same whatever the empty share."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(WORDS), (steps,), generator=generator).tolist()
    # The share holds in each stretch of steps, so that the run does not begin or end with a long one of either.
    says = [int((i + 1) * (1 - empty) + 1e-9) > int(i * (1 - empty) + 1e-9) for i in range(steps)]
    return Dataset.from_dict({"prompt": [WORDS[i] for i in order], "informative": says})


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, samples: int) -> float:
    """Return the mean share of right words over sampled answers to every word."""
    torch.manual_seed(0)
    model.eval()
    prompts = [word for word in WORDS for _ in range(samples)]
    inputs = tokenizer(prompts, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, do_sample=True, max_new_tokens=ANSWER, top_k=0)
    answers = tokenizer.batch_decode(output[:, 1:], skip_special_tokens=True)
    model.train()
    return statistics.mean(map(share_right, prompts, answers))


def train(row: str, lr: float, questions: Dataset, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the rewards and what was held back."""
    options = dict(OPTIMIZERS[row])
    ours = [f"embeddings=adamw,lr_scale={MATRICES}"] if options["optim"] in hf_stateless.PRESETS else []
    apart = options.pop("apart", False)
    ours += [f"min_signal={args.min_signal}"] if options.pop("min_signal", False) else []
    optim_args = ",".join(ours) or None
    model, tokenizer, start = make_model(seed), make_tokenizer(), time.perf_counter()
    before = evaluate(model, tokenizer, args.samples)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            **options,
            optim_args=optim_args,
            learning_rate=lr,
            lr_scheduler_type="constant",
            max_steps=len(questions),
            per_device_train_batch_size=GROUP,
            num_generations=GROUP,
            max_completion_length=ANSWER,
            scale_rewards="none",
            beta=0.0,
            shuffle_dataset=False,
            seed=seed,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        optimizers = (AdamWFactory()(model, MATRICES * lr, lr) if apart else None, None)
        trainer = GRPOTrainer(
            model, rewards, config, train_dataset=questions, processing_class=tokenizer, optimizers=optimizers
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        "optimizer": row,
        "learning_rate": lr,
        "seed": seed,
        "steps": len(questions),
        "empty_steps": questions["informative"].count(False),
        "held_steps": getattr(inner, "held_steps", 0),
        "before": round(before, 4),
        "after": round(evaluate(model, tokenizer, args.samples), 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Render the means over seeds as a Markdown table."""
    lines = ["| optimizer | learning rate | before | informative groups alone | with empty groups | steps held back |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row, lr in dict.fromkeys((r["optimizer"], r["learning_rate"]) for r in records):
        of_row = [r for r in records if (r["optimizer"], r["learning_rate"]) == (row, lr)]
        alone, mixed = ([r for r in of_row if bool(r["empty_steps"]) == empty] for empty in (False, True))
        before, *after = (
            f"{statistics.mean(r[key] for r in runs):.3f}" if runs else ""
            for key, runs in (("before", of_row), ("after", alone), ("after", mixed))
        )
        held = f"{sum(r['held_steps'] for r in mixed)} of {sum(r['steps'] for r in mixed)}"
        lines.append(f"| {row} | {lr:g} | {before} | {' | '.join(after)} | {held} |")
    return "\n".join(lines)


def rate_table(records: list[dict[str, Any]]) -> str:
    """Render the share of right words after training by learning rate, means over seeds; the best of a row is bold."""
    rates = sorted({r["learning_rate"] for r in records})
    lines = [f"| Optimizer | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---|" + "---:|" * len(rates)]
    for row in dict.fromkeys(r["optimizer"] for r in records):
        ends: dict[float, list[float]] = {}
        for r in records:
            if r["optimizer"] == row:
                ends.setdefault(r["learning_rate"], []).append(r["after"])
        means = {rate: statistics.mean(of_rate) for rate, of_rate in ends.items()}
        best = max(means.values())
        cells = [
            "not run" if rate not in means else f"**{mean:.3f}**" if (mean := means[rate]) == best else f"{mean:.3f}"
            for rate in rates
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, train, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=500, help="of the run with empty groups")
    parser.add_argument("--empty", type=float, default=0.8, help="share of groups that say nothing")
    parser.add_argument("--min_signal", type=float, default=0.1)
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--samples", type=int, default=16, help="answers per word in the evaluation")
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    disable_progress_bars()
    torch.set_num_threads(1)
    setup = {"torch": torch.__version__, "trl": trl.__version__, "hf_stateless": hf_stateless.__version__}
    setup |= {"min_signal": args.min_signal, "noise": NOISE, "group": GROUP, "answers": args.samples * len(WORDS)}
    records = []
    for row in args.rows:
        for lr in args.learning_rates:
            for seed in args.seeds:
                mixed = make_questions(args.steps, args.empty, seed)
                alone = [mixed.filter(lambda question: question["informative"])] if args.empty else []
                for questions in (*alone, mixed):
                    records.append(train(row, lr, questions, seed, args))
                    print(json.dumps(records[-1]), flush=True)
    print(table(records) if args.empty else rate_table(records))
    if args.output:
        write_results(args.output, setup, records=records)


if __name__ == "__main__":
    main()

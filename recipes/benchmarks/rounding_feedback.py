"""Held-out loss of a tiny LLaMA in 8 bits with momentum, with and without `rounding_feedback`, at equal steps.

    python recipes/benchmarks/rounding_feedback.py --arms stochastic feedback --output results.json
    python recipes/benchmarks/rounding_feedback.py --report recipes/benchmarks/results/rounding-feedback-cpu.json

0.1M parameters learn the bytes of modules of Python's standard library. `--rate` is the entry RMS of a step at its
peak; it falls to a tenth. The table stands in hf_stateless/weights/README.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from expert_formats import learn
from result_files import versions, write_results
from transformers import LlamaConfig, LlamaForCausalLM

import hf_stateless


RATE, SEEDS, STEPS = 3e-4, (0, 1, 2), (500, 1500)
# The name in the table, and whether weights are in 8 bits and what the optimizer is told.
ARMS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "float32": ("float32 weights", False, {}),
    "stochastic": ("int8, stochastic rounding", True, {}),
    "feedback": ("int8, with `rounding_feedback`", True, {"rounding_feedback": True}),
}
CONFIG = {
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
}


def train(arm: str, seed: int, steps: int, rate: float) -> float:
    """Train one model and return its loss on held-out text."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    _, in_8_bits, options = ARMS[arm]
    if in_8_bits:
        hf_stateless.quantize(model.bfloat16())
    options = {"lr_scale": 1.0, "adamw_lr": 2e-3, "embeddings": "adamw", "momentum": 0.9, "seed": seed, **options}
    optimizer = hf_stateless.create_optimizer(model, "sinkgd", lr=rate, **options)
    return learn(model, optimizer, seed, steps, warm_up=max(1, steps // 10), held_out_batches=64)


def table(records: list[dict[str, Any]]) -> str:
    """Render the records at RATE as a Markdown table, each run against stochastic rounding with the same seed."""
    lines = [
        "| Linear weights | Steps | Held-out loss | Over stochastic rounding, each seed |",
        "|---|---:|---:|---:|",
    ]
    for steps in STEPS:
        losses = {
            arm: {
                r["seed"]: r["eval_loss"] for r in records if (r["arm"], r["steps"], r["rate"]) == (arm, steps, RATE)
            }
            for arm in ARMS
        }
        base = losses["stochastic"]
        for arm, (name, _, _) in ARMS.items():
            if losses[arm]:
                over = ", ".join(
                    f"{100 * (loss / base[seed] - 1):+.2f} %" for seed, loss in losses[arm].items() if seed in base
                )
                mean = statistics.mean(losses[arm].values())
                lines.append(f"| {name} | {steps:,} | {mean:.3f} | {over if arm != 'stochastic' else ''} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line; train what is missing, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--output", type=Path, help="the records as JSON; runs that it has are not repeated")
    parser.add_argument("--report", type=Path, help="print the table of a file of results")
    args = parser.parse_args()
    if args.report:
        print(table(json.loads(args.report.read_text())["records"]))
        return
    records = json.loads(args.output.read_text())["records"] if args.output and args.output.is_file() else []
    for arm, steps, seed in ((a, n, s) for n in args.steps for s in args.seeds for a in args.arms):
        run = {"arm": arm, "seed": seed, "steps": steps, "rate": args.rate}
        if any(run.items() <= record.items() for record in records):
            continue
        records.append({**run, "eval_loss": train(arm, seed, steps, args.rate)})
        print(records[-1], flush=True)
        if args.output:
            write_results(args.output, {"device": platform.machine() + " CPU", **versions()}, records=records)


if __name__ == "__main__":
    main()

"""Held-out loss of a tiny mixture of experts with its weights in bf16 and in 8 bits, at equal steps.

    python recipes/benchmarks/expert_formats.py --output results.json
    python recipes/benchmarks/expert_formats.py --report recipes/benchmarks/results/expert-formats-cpu.json

A Qwen3-MoE of 0.3M parameters learns the bytes of modules of Python's standard library. The table stands in
hf_stateless/weights/README.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sysconfig
from pathlib import Path
from typing import Any

import torch
from result_files import versions, write_results
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import hf_stateless


OPTIMIZERS, FORMATS = ("sinkgd", "swan"), ("bf16", "int8")
RATE, WARM_UP, SEQUENCES, LENGTH, HELD_OUT_BATCHES = 0.01, 10, 8, 64, 16
CONFIG = {
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
}


def text() -> tuple[Tensor, Tensor]:
    """Return the bytes to train on, and the last tenth, which is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    data = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    return data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]


def batch(data: Tensor, generator: torch.Generator) -> Tensor:
    """Return sequences from random places."""
    places = torch.randint(0, len(data) - LENGTH - 1, (SEQUENCES,), generator=generator)
    return torch.stack([data[place : place + LENGTH] for place in places])


def train(optimizer: str, form: str, seed: int, steps: int) -> float:
    """Train one model and return its loss on held-out text."""
    torch.manual_seed(seed)
    model: PreTrainedModel = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG)).bfloat16()
    if form == "int8":
        hf_stateless.quantize(model)
    chosen = hf_stateless.create_optimizer(model, optimizer, lr=RATE, seed=seed)
    return learn(model, chosen, seed, steps, warm_up=WARM_UP, held_out_batches=HELD_OUT_BATCHES)


def learn(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    seed: int,
    steps: int,
    *,
    warm_up: int,
    held_out_batches: int,
) -> float:
    """Train a model on the text, its rate falling to a tenth, and return its loss on batches of what is held out."""
    train_data, held_out = text()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm_up) * max(0.1, 1 - step / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = batch(train_data, generator)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        rows_of = (batch(held_out, generator) for _ in range(held_out_batches))
        return statistics.mean(model.eval()(input_ids=rows, labels=rows).loss.item() for rows in rows_of)


def table(records: list[dict[str, Any]]) -> str:
    """Render the records as a Markdown table: 8 bits over bf16 with the same seed."""
    lines = ["| Held-out loss | bf16 | int8 | Over bf16, each seed | Mean |", "|---|---:|---:|---:|---:|"]
    for optimizer in OPTIMIZERS:
        bf16, int8 = (
            {r["seed"]: r["eval_loss"] for r in records if (r["optimizer"], r["format"]) == (optimizer, form)}
            for form in FORMATS
        )
        over = [100 * (int8[seed] / bf16[seed] - 1) for seed in bf16]
        means = " | ".join(f"{statistics.mean(losses.values()):.4f}" for losses in (bf16, int8))
        each = ", ".join(f"{one:+.2f} %" for one in over)
        lines.append(f"| `{optimizer}` | {means} | {each} | {statistics.mean(over):+.2f} % |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line; train, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    parser.add_argument("--report", type=Path, help="print the table of a file of results")
    args = parser.parse_args()
    if args.report:
        print(table(json.loads(args.report.read_text())["records"]))
        return
    records = []
    for optimizer in OPTIMIZERS:
        for seed in args.seeds:
            for form in FORMATS:
                loss = train(optimizer, form, seed, args.steps)
                print(f"{optimizer}, {form}, seed {seed}: {loss:.4f}", flush=True)
                records.append({"optimizer": optimizer, "format": form, "seed": seed, "eval_loss": loss})
    print(table(records))
    if args.output:
        setup = {"device": platform.machine() + " CPU", "steps": args.steps, "learning_rate": RATE, **versions()}
        write_results(args.output, setup, records=records)


if __name__ == "__main__":
    main()

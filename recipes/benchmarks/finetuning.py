"""Held-out loss of SFT after equal steps: AdamW, LoRA+, SinkGD and SWAN, each at its own best learning rate.

    python recipes/benchmarks/wordnet_pairs.py pairs
    python recipes/benchmarks/finetuning.py --data pairs --tuning layers --rows adamw sinkgd swan
    python recipes/benchmarks/finetuning.py --data pairs --tuning lora
    python recipes/benchmarks/finetuning.py --data pairs --tuning layers --rows "sinkgd, bf16" "sinkgd, int8" --lr 3e-3
    python recipes/benchmarks/finetuning.py --report recipes/benchmarks/results/finetuning-cpu.json

The learning rate of each row walks in factors of two from `--start` until the best one has a worse neighbour on both
sides and at least `--rates` were tried. The walk is done on the first seed, and the `--repeat` rates around the best
one (default: all) are repeated with the other seeds; with `--lr` there is no walk and every row has this one rate. A
seed decides the order of the data and how adapters start.

Weights are float32 unless the row says otherwise: bf16, or bf16 with the linear layers but the head stored in 8 bits;
both are written with stochastic rounding, the row "nearest" with rounding to nearest.

Each run is a JSON file in `--runs`, named by its configuration: what is there is not run again, so that a broken sweep
goes on, and several processes may work on different rows. `--report` gathers the files and prints the tables: those of
recipes/README.md, and that of 8-bit weights in hf_stateless/weights/README.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from rate_walk import nearest, walk
from result_files import versions, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer

import hf_stateless
from hf_stateless.reports.files import write_json


# The `optim` and `optim_args` of a row; `loraplus` is made by PEFT. What follows a comma is read by `weights_of`. With
# this scale a step of a matrix is as large as AdamW's.
ROWS: dict[str, tuple[str, str | None]] = {
    "adamw": ("adamw_torch_fused", None),
    "loraplus": ("adamw_torch_fused", None),
    "sinkgd": ("sinkgd", "lr_scale=0.2"),
    "swan": ("swan", "lr_scale=0.2"),
    "sinkgd, product": ("sinkgd", "lora=product,lr_scale=0.2"),
    "swan, product": ("swan", "lora=product,lr_scale=0.2"),
    "sinkgd, bf16": ("sinkgd", "lr_scale=0.2"),
    "sinkgd, int8": ("sinkgd", "lr_scale=0.2"),
    "sinkgd, int8 nearest": ("sinkgd", "lr_scale=0.2,stochastic_rounding=false"),
}
LORAPLUS_RATIO = 8
START = 4e-4


def weights_of(row: str) -> str:
    """Return how the weights of a row are stored: float32, bf16 or int8."""
    return next((kind for kind in ("bf16", "int8") if kind in row), "float32")


DEFAULT_ROWS = [row for row in ROWS if weights_of(row) == "float32"]


def load_data(folder: Path, name: str, count: int) -> Dataset:
    """Return the first pairs of a file of `wordnet_pairs.py`."""
    return load_dataset("json", data_files=str(folder / f"{name}.jsonl"), split=f"train[:{count}]")


def load_model(row: str, args: argparse.Namespace, seed: int) -> PreTrainedModel:
    """Return the model with what is trained: the last layers, LoRA on the last layers, or everything."""
    weights = weights_of(row)
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    if weights == "int8":
        hf_stateless.quantize(model)
    layers = range(model.config.num_hidden_layers)[-args.layers :]
    if args.tuning == "lora":
        set_seed(seed)
        linear = {name.rpartition(".")[2] for name, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
        lora = LoraConfig(
            r=args.lora_r,
            lora_alpha=2 * args.lora_r,
            target_modules=sorted(linear),
            layers_to_transform=list(layers),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, lora)
    if args.tuning == "layers":
        model.requires_grad_(False)
        for layer in layers:
            model.model.layers[layer].requires_grad_(True)
    return model


def run(row: str, lr: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the held-out loss with what was run."""
    optim, optim_args = ROWS[row]
    config = SFTConfig(
        output_dir=str(args.runs / "scratch"),
        optim=optim,
        optim_args=optim_args,
        learning_rate=lr,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        warmup_steps=args.steps // 10,
        lr_scheduler_type="cosine",
        max_length=128,
        seed=seed,
        save_strategy="no",
        logging_steps=5,
        report_to="none",
        bf16=False,
        use_cpu=args.device == "cpu",
        disable_tqdm=True,
        **{
            "activation_checkpointing"
            if hasattr(SFTConfig, "activation_checkpointing")
            else "gradient_checkpointing": False
        },
    )
    model = load_model(row, args, seed)
    optimizer = None
    if row == "loraplus":
        optimizer = create_loraplus_optimizer(
            model, optimizer_cls=torch.optim.AdamW, lr=lr, loraplus_lr_ratio=LORAPLUS_RATIO, fused=True
        )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=load_data(args.data, "train", args.steps * args.batch_size * 2),
        eval_dataset=load_data(args.data, "test", args.test_pairs),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        optimizers=(optimizer, None),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        **configuration(row, lr, seed, args),
        "eval_loss": trainer.evaluate()["eval_loss"],
        "train_losses": [round(loss, 4) for loss in losses],
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(seconds, 1),
    }


def configuration(row: str, lr: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return what names a run; everything that changes its result is in it."""
    depth = {"full": None}.get(args.tuning, args.layers)
    return {
        "model": Path(args.model).name,
        "tuning": args.tuning,
        "layers": depth,
        "lora_r": args.lora_r if args.tuning == "lora" else None,
        "row": row,
        "learning_rate": lr,
        "seed": seed,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "test_pairs": args.test_pairs,
    }


def cached(row: str, lr: float, seed: int, args: argparse.Namespace) -> float:
    """Return the held-out loss of a run, from its file or by training."""
    name = "_".join(str(value).replace(", ", "-") for value in configuration(row, lr, seed, args).values())
    file = args.runs / f"{name}.json"
    if not file.is_file():
        write_json(file, run(row, lr, seed, args))
    loss = float(json.loads(file.read_text())["eval_loss"])
    print(f"{args.tuning} {row}: lr {lr:.2e} seed {seed}: held-out loss {loss:.4f}", flush=True)
    return loss


def sweep(row: str, args: argparse.Namespace) -> None:
    """Try learning rates until the best is an inner one and enough were tried, then repeat them with other seeds.

    With `args.lr` that rate is run with every seed, and no other.
    """
    if args.lr:
        for seed in args.seeds:
            cached(row, args.lr, seed, args)
        return
    first, *others = args.seeds
    losses = walk(lambda k: cached(row, args.start * 2.0**k, first, args), args.rates)
    for seed in others:
        for k in nearest(losses, args.repeat):
            cached(row, args.start * 2.0**k, seed, args)


def best_of(records: list[dict[str, Any]]) -> tuple[float, list[float], dict[float, float]]:
    """Return the best learning rate of a row, the loss of each seed at it, and the mean loss at each rate.

    A rate counts when every seed of the row was run with it.
    """
    seeds = {record["seed"] for record in records}
    by_rate: dict[float, dict[int, float]] = {}
    for record in records:
        by_rate.setdefault(record["learning_rate"], {})[record["seed"]] = record["eval_loss"]
    means = {lr: statistics.mean(by.values()) for lr, by in sorted(by_rate.items()) if set(by) == seeds}
    best = min(means, key=means.__getitem__)
    return best, [by_rate[best][seed] for seed in sorted(seeds)], means


def table(records: list[dict[str, Any]], tuning: str) -> str:
    """Render the runs of one kind of tuning as a Markdown table, best row first."""
    rows = {
        row: best_of([r for r in records if (r["tuning"], r["row"]) == (tuning, row)])
        for row in ROWS
        if any((r["tuning"], r["row"]) == (tuning, row) for r in records)
    }
    lines = [
        "| Trained with | Held-out loss | Each seed | Best learning rate | Loss at half and at double that rate |",
        "|---|---:|---:|---:|---:|",
    ]
    for row, (best, losses, means) in sorted(rows.items(), key=lambda item: statistics.mean(item[1][1])):
        beside = [f"{means[lr]:.3f}" if lr in means else "not run" for lr in (best / 2, best * 2)]
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        lines.append(f"| `{row}` | {statistics.mean(losses):.3f} | {each} | {best:.1e} | {', '.join(beside)} |")
    return "\n".join(lines)


def weights_table(records: list[dict[str, Any]]) -> str:
    """Render runs at one learning rate as a Markdown table: the loss beside that of the first kind of weights."""
    rows = {
        row: {r["seed"]: r["eval_loss"] for r in records if r["row"] == row}
        for row in ROWS
        if any(r["row"] == row for r in records)
    }
    first = next(iter(rows.values()))
    reference = statistics.mean(first.values())
    lines = [
        f"| Trained with | Held-out loss | Each seed | Over `{next(iter(rows))}` | Each seed |",
        "|---|---:|---:|---:|---:|",
    ]
    for row, losses in rows.items():
        mean, each = statistics.mean(losses.values()), ", ".join(f"{losses[seed]:.4f}" for seed in sorted(losses))
        apart = ", ".join(f"{100 * (losses[seed] / first[seed] - 1):+.2f} %" for seed in sorted(losses))
        over = [f"{100 * (mean / reference - 1):+.2f} %", apart] if losses is not first else ["", ""]
        lines.append(f"| `{row}` | {mean:.4f} | {each} | {' | '.join(over)} |".replace("|  |", "| |"))
    return "\n".join(lines)


def setup() -> dict[str, Any]:
    """Return versions and device, for the file of results."""
    return {
        "device": platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "trl": trl.__version__,
        **versions(),
    }


def report(output: Path, runs: Path) -> None:
    """Gather the files of the runs into one, if there are any, and print the tables."""
    records = [json.loads(file.read_text()) for file in sorted(runs.glob("*.json"))]
    if records:
        write_results(output, setup(), records=records)
    records = json.loads(output.read_text())["records"]
    for tuning in dict.fromkeys(record["tuning"] for record in records):
        print(f"\n{tuning}:\n{table(records, tuning)}")
        of_weights = [r for r in records if r["tuning"] == tuning and weights_of(r["row"]) != "float32"]
        if of_weights and len({r["learning_rate"] for r in of_weights}) == 1:
            print(f"\n{tuning}, by weights:\n{weights_table(of_weights)}")


def main() -> None:
    """Parse the command line; sweep the rows or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a name on the Hub or a folder")
    parser.add_argument("--data", type=Path, default=Path("pairs"), help="the folder of wordnet_pairs.py")
    parser.add_argument("--tuning", choices=["layers", "lora", "full"], default="lora")
    parser.add_argument("--layers", type=int, default=6, help="how many of the last layers are trained or adapted")
    parser.add_argument("--lora_r", type=int, default=8)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=DEFAULT_ROWS)
    parser.add_argument("--lr", type=float, help="the only learning rate, instead of the walk")
    parser.add_argument("--start", type=float, default=START, help="learning rate at which the walk starts")
    parser.add_argument("--rates", type=int, default=4, help="least number of learning rates of a row")
    parser.add_argument("--repeat", type=int, help="rates that are repeated with the other seeds; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--test_pairs", type=int, default=96)
    parser.add_argument("--threads", type=int, help="threads of torch on CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=Path, default=Path("runs/finetuning"), help="folder of the runs' JSON files")
    parser.add_argument("--report", type=Path, help="gather the runs into this file and print the tables")
    args = parser.parse_args()
    if args.report:
        report(args.report, args.runs)
        return
    if args.tuning == "lora" and any(weights_of(row) != "float32" for row in args.rows):
        parser.error("--tuning lora trains float32 adapters: rows with bf16 or int8 need --tuning layers or full")
    if not (args.data / "train.jsonl").is_file():
        parser.error(
            f"no train.jsonl in {args.data}: make it with python recipes/benchmarks/wordnet_pairs.py {args.data}"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    for row in args.rows:
        sweep(row, args)


if __name__ == "__main__":
    main()

"""Held-out loss of SFT after equal steps, each row at its own best learning rate and at that of AdamW.

    python recipes/benchmarks/wordnet_pairs.py wordnet
    python recipes/benchmarks/reasoning_pairs.py reversal --task word_sequence_reversal:min_words=4,max_words=6
    python recipes/benchmarks/finetuning.py --data wordnet --tuning all --rows adamw "sinkgd, lr_scale=0.4"
    python recipes/benchmarks/finetuning.py --data reversal --tuning lora --lora_r 32 --start 1e-3
    python recipes/benchmarks/finetuning.py --data pairs --tuning layers --layers 6 --rows "sinkgd, int8" --lr 3e-3
    python recipes/benchmarks/finetuning.py --report recipes/benchmarks/results/finetuning-cpu.json

The learning rate of each row walks in factors of two from `--start` until the best one has a worse neighbour on both
sides and at least `--rates` were tried. The walk is done on the first seed, and the `--repeat` rates around the best
one (default: all) are repeated with the other seeds; with `--lr` there is no walk and every row has these rates. A
seed decides the order of the data and how adapters start. Rates are picked on one half of the held-out pairs
(`pick_loss`), and the other half is reported (`eval_loss`).

Weights are float32 unless the row says otherwise: bf16, or bf16 with the linear layers but the head stored in 8 bits;
both are written with stochastic rounding, the row "nearest" with rounding to nearest.

Each run is a JSON file in `--runs`, named by its configuration: what is there is not run again, so that a broken sweep
goes on, and several processes may work on different rows. `--report` gathers the files and prints the tables of
`finetuning_report.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, load_dataset
from finetuning_report import studies, table, weights_table
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from rate_walk import nearest, walk
from result_files import versions, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer

import hf_stateless
from hf_stateless.reports.files import write_json


# The `optim` and `optim_args` of a row; `loraplus` is made by PEFT. bf16 and int8 are read by `weights_of`. A row
# names its scale and what updates embeddings, since the defaults may change.
ROWS: dict[str, tuple[str, str | None]] = {
    "adamw": ("adamw_torch_fused", None),
    "loraplus": ("adamw_torch_fused", None),
    "sinkgd, lr_scale=0.4": ("sinkgd", "lr_scale=0.4,embeddings=adamw"),
    "sinkgd, lr_scale=0.2": ("sinkgd", "lr_scale=0.2,embeddings=adamw"),
    "sinkgd, lr_scale=0.8": ("sinkgd", "lr_scale=0.8,embeddings=adamw"),
    "sinkgd, lr_scale=0.4, row moments": ("sinkgd", "lr_scale=0.4,embeddings=row_moment"),
    "sinkgd, lr_scale=0.8, row moments": ("sinkgd", "lr_scale=0.8,embeddings=row_moment"),
    "sinkgd_polar, lr_scale=1": ("sinkgd_polar", "lr_scale=1,embeddings=adamw"),
    "sinkgd_polar, lr_scale=1, row moments": ("sinkgd_polar", "lr_scale=1,embeddings=row_moment"),
    "sinkgd_polar by operator, lr_scale=1": ("sinkgd_polar", "scale=operator,lr_scale=1,embeddings=adamw"),
    "sinkgd_polar by operator, lr_scale=4": ("sinkgd_polar", "scale=operator,lr_scale=4,embeddings=adamw"),
    "sinkgd_polar by operator, lr_scale=8": ("sinkgd_polar", "scale=operator,lr_scale=8,embeddings=adamw"),
    "sinkgd_polar by operator, lr_scale=16": ("sinkgd_polar", "scale=operator,lr_scale=16,embeddings=adamw"),
    "swan, lr_scale=0.2": ("swan", "lr_scale=0.2,embeddings=adamw"),
    "swan, lr_scale=2": ("swan", "lr_scale=2,embeddings=adamw"),
    "sinkgd, product, lr_scale=0.2": ("sinkgd", "lora=product,lr_scale=0.2"),
    "swan, product, lr_scale=0.2": ("swan", "lora=product,lr_scale=0.2"),
    "sinkgd, bf16": ("sinkgd", "lr_scale=0.2"),
    "sinkgd, int8": ("sinkgd", "lr_scale=0.2"),
    "swan, bf16": ("swan", "lr_scale=2,embeddings=row_moment"),
    "swan, int8": ("swan", "lr_scale=2,embeddings=row_moment"),
    "sinkgd, row moments, bf16": ("sinkgd", "lr_scale=0.8,embeddings=row_moment"),
    "sinkgd, row moments, int8": ("sinkgd", "lr_scale=0.8,embeddings=row_moment"),
    "sinkgd, int8 nearest": ("sinkgd", "lr_scale=0.2,stochastic_rounding=false"),
}
LORAPLUS_RATIO = 8
START = 1e-4
EVAL_BATCH = 8


def weights_of(row: str) -> str:
    """Return how the weights of a row are stored: float32, bf16 or int8."""
    return next((kind for kind in ("bf16", "int8") if kind in row), "float32")


DEFAULT_ROWS = [row for row in ROWS if weights_of(row) == "float32"]


def load_data(folder: Path, name: str, count: int) -> Dataset:
    """Return the first pairs of a file of `wordnet_pairs.py`."""
    return load_dataset("json", data_files=str(folder / f"{name}.jsonl"), split=f"train[:{count}]")


def held_out(args: argparse.Namespace) -> dict[str, Dataset]:
    """Return the test pairs in two halves, by length so that batches need little padding."""
    pairs = load_data(args.data, "test", args.test_pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]["prompt"] + pairs[i]["completion"]))
    return {"pick": pairs.select(order[::2]), "report": pairs.select(order[1::2])}


def load_model(row: str, args: argparse.Namespace, seed: int) -> PreTrainedModel:
    """Return the model with what is trained: the last layers, LoRA on the last layers, or everything."""
    weights = weights_of(row)
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    if weights == "int8":
        hf_stateless.quantize(model)
    layers = range(model.config.num_hidden_layers)[-args.layers if args.layers else None :]
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
    """Train once and return the held-out losses with what was run."""
    optim, optim_args = ROWS[row]
    config = SFTConfig(
        output_dir=str(args.runs / "scratch"),
        optim=optim,
        optim_args=optim_args,
        learning_rate=lr,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=EVAL_BATCH,
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
        eval_dataset=held_out(args),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        optimizers=(optimizer, None),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ends = trainer.evaluate()
    return {
        **configuration(row, lr, seed, args),
        "pick_loss": ends["eval_pick_loss"],
        "eval_loss": ends["eval_report_loss"],
        "train_losses": [round(loss, 4) for loss in losses],
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(seconds, 1),
    }


def configuration(row: str, lr: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return what names a run; everything that changes its result is in it."""
    return {
        "model": Path(args.model).name,
        "data": args.data.name,
        "tuning": args.tuning,
        "layers": args.layers,
        "lora_r": args.lora_r if args.tuning == "lora" else None,
        "row": row,
        "learning_rate": lr,
        "seed": seed,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "test_pairs": args.test_pairs,
    }


def cached(row: str, lr: float, seed: int, args: argparse.Namespace) -> float:
    """Return the loss that rates are picked by, from the file of a run or by training."""
    name = "_".join(str(value).replace(", ", "-") for value in configuration(row, lr, seed, args).values())
    file = args.runs / f"{name}.json"
    if not file.is_file():
        write_json(file, run(row, lr, seed, args))
    record = json.loads(file.read_text())
    loss = float(record["pick_loss"])
    print(f"{args.tuning} {row}: lr {lr:.2e} seed {seed}: {loss:.4f}, reported {record['eval_loss']:.4f}", flush=True)
    return loss


def sweep(row: str, args: argparse.Namespace) -> None:
    """Try learning rates until the best is an inner one and enough were tried, then repeat them with other seeds.

    With `args.lr` these rates are run with every seed, and no others.
    """
    if args.lr:
        for seed, lr in itertools.product(args.seeds, args.lr):
            cached(row, lr, seed, args)
        return
    first, *others = args.seeds
    losses = walk(lambda k: cached(row, args.start * 2.0**k, first, args), args.rates)
    for seed in others:
        for k in nearest(losses, args.repeat):
            cached(row, args.start * 2.0**k, seed, args)


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
    float32 = [record for record in records if weights_of(record["row"]) == "float32"]
    for title, rows in studies(float32).items():
        print(f"\n{title}:\n{table(rows)}")
    if len(float32) < len(records):
        print(f"\nby weights:\n{weights_table([r for r in records if weights_of(r['row']) != 'float32'])}")


def main() -> None:
    """Parse the command line; sweep the rows or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a name on the Hub or a folder")
    parser.add_argument("--data", type=Path, default=Path("pairs"), help="the folder of wordnet_pairs.py")
    parser.add_argument("--tuning", choices=["layers", "lora", "all"], default="lora")
    parser.add_argument("--layers", type=int, help="how many of the last layers are trained or adapted; default: all")
    parser.add_argument("--lora_r", type=int, default=8)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=DEFAULT_ROWS)
    parser.add_argument("--lr", type=float, nargs="+", help="the only learning rates, instead of the walk")
    parser.add_argument("--start", type=float, default=START, help="learning rate at which the walk starts")
    parser.add_argument("--rates", type=int, default=4, help="least number of learning rates of a row")
    parser.add_argument("--repeat", type=int, help="rates that are repeated with the other seeds; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--test_pairs", type=int, default=64)
    parser.add_argument("--threads", type=int, help="threads of torch on CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=Path, default=Path("runs/finetuning"), help="folder of the runs' JSON files")
    parser.add_argument("--report", type=Path, help="gather the runs into this file and print the tables")
    args = parser.parse_args()
    if args.report:
        report(args.report, args.runs)
        return
    if args.tuning == "lora" and any(weights_of(row) != "float32" for row in args.rows):
        parser.error("--tuning lora trains float32 adapters: rows with bf16 or int8 need --tuning layers or all")
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

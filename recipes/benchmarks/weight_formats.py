"""Held-out loss of the embedded pretraining with weights in bf16 and in 8 bits, at equal steps.

    python recipes/benchmarks/weight_formats.py --seeds 0 1 2
    python recipes/benchmarks/weight_formats.py --report recipes/benchmarks/results/weight-formats-cpu.json

Each run is `recipes/pretrain.py` with the recipe of an optimizer for the tiny LLaMA, embeddings as in the recipes in
8 bits, and one format of the weights; rounding to nearest stands beside as the control that stalls. Runs that are in
`--runs` already are not repeated. The table stands in hf_stateless/weights/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from result_files import versions, write_results


RECIPES = Path(__file__).parent.parent
OPTIMIZERS = ("sinkgd", "swan")
OPTIONS = "rates=pretraining,embedding_lr_scale=32,embeddings=row_moment"
NEAREST = f"{OPTIONS},stochastic_rounding=false"
FORMATS: dict[str, list[str]] = {
    "bf16": ["--optim_args", OPTIONS],
    "int8": ["--optim_args", OPTIONS, "--load_in_8bit_training"],
    "int8, nearest": ["--optim_args", NEAREST, "--load_in_8bit_training"],
}


def train(optim: str, name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run the recipe of an optimizer once and return its record."""
    folder = args.runs / f"{optim}-{name.replace(', ', '-')}-{seed}"
    state = folder / "trainer_state.json"
    if not state.is_file():
        command = [sys.executable, str(RECIPES / "pretrain.py")]
        command += ["--config", str(RECIPES / "llama-tiny" / "pretrain" / f"{optim}.yaml")]
        command += ["--dtype", "bfloat16", "--seed", str(seed), *FORMATS[name]]
        # Only the end is compared.
        command += ["--output_dir", str(folder), "--eval_strategy", "no", "--eval_on_start", "false"]
        command += ["--max_steps", str(args.steps), "--report_to", "none", "--disable_tqdm", "true"]
        command += ["--cpu_threads", str(args.threads)] if args.threads else []
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, stderr=None if args.verbose else subprocess.DEVNULL
        )
    history = json.loads(state.read_text())["log_history"]
    loss = next(entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry)
    print(f"{optim}, {name}: seed {seed}: held-out loss {loss:.4f}", flush=True)
    losses = [(entry["step"], round(entry["loss"], 4)) for entry in history if "loss" in entry]
    what = {"optim": optim, "format": name, "seed": seed, "steps": args.steps}
    return {**what, "eval_loss": loss, "train_losses": losses}


def run_of(record: dict[str, Any]) -> tuple[str, str, int, int]:
    """Return what tells a run from others."""
    return record["optim"], record["format"], record["seed"], record["steps"]


def table(records: list[dict[str, Any]]) -> str:
    """Render the records as a Markdown table: each format against bf16 with the same optimizer and seed."""
    lines = ["| Optimizer | Linear weights | Held-out loss | Over bf16, each seed |", "|---|---|---:|---:|"]
    for optim, name in itertools.product(OPTIMIZERS, FORMATS):
        base, losses = (
            {r["seed"]: r["eval_loss"] for r in records if (r["optim"], r["format"]) == (optim, form)}
            for form in ("bf16", name)
        )
        if losses:
            over = [f"{100 * (loss / base[seed] - 1):+.2f} %" for seed, loss in losses.items() if seed in base]
            mean = f"{statistics.mean(losses.values()):.3f}"
            lines.append(f"| `{optim}` | {name} | {mean} | {', '.join(over) if name != 'bf16' else ''} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line; train what is missing, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500, help="those of the recipes")
    parser.add_argument("--threads", type=int, help="threads of torch on CPU")
    parser.add_argument("--verbose", action="store_true", help="show what the recipe prints to stderr")
    parser.add_argument("--runs", type=Path, default=Path("runs/weight-formats"), help="folder of the models")
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    parser.add_argument("--report", type=Path, help="print the table of a file of results")
    args = parser.parse_args()
    if args.report:
        print(table(json.loads(args.report.read_text())["records"]))
        return
    runs = itertools.product(args.seeds, args.optimizers, args.formats)
    records = [train(optim, name, seed, args) for seed, optim, name in runs]
    if args.output and args.output.is_file():  # what it has of other runs stays
        done = {run_of(record) for record in records}
        others = json.loads(args.output.read_text())["records"]
        records = [record for record in others if run_of(record) not in done] + records
    print(table(records))
    if args.output:
        write_results(args.output, {"device": platform.machine() + " CPU", **versions()}, records=records)


if __name__ == "__main__":
    main()

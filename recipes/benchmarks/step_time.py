"""Time of one optimizer step on the linear layers of LLaMA, as ratios to torch's fused AdamW.

    python recipes/benchmarks/step_time.py                                   # 60m and 130m, float32 and bf16, CPU
    python recipes/benchmarks/step_time.py --slow --layers 2 --rounds 3      # Muon and SWAN
    python recipes/benchmarks/step_time.py --models 350m 1b --dtypes bfloat16 --slow --train_step 131072      # a GPU
    python recipes/benchmarks/step_time.py --report results.json             # the table of a file of results

All optimizers step in turn within each round, so that whatever else the machine does falls on all of them; the ratio
is taken within a round and the median over rounds is printed with its spread. Weights and gradients are random; the
steps are real ones. Each row has weights, gradients and state of its own: `--layers` or `--rows` if memory is short.
Bytes are counted, the least that a step can move; over the measured time they give the bandwidth that is reached, told
as a part of what copying a large tensor reaches in the same round (its reads and writes counted). Updates in place can
pass 100 %: a CPU may move more bytes a second through one tensor than from one tensor to another.

`--train_step N` also times forward and backward of the model on a few sequences, without activation checkpointing,
scaled to N tokens, and tells which part of a training step of so many tokens the optimizer's step is. The tables stand
in README.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from result_files import write_results
from step_time_rows import BASELINE, ROWS, SLOW
from transformers import LlamaConfig, LlamaForCausalLM

import hf_stateless


# hidden size, intermediate size, layers and heads of the GaLore benchmark's LLaMA configurations.
MODELS = {
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "7b": (4096, 11008, 32, 32),
}
SEQUENCE = 256
COPIED = 1 << 28
"""Bytes of the tensor that is copied: no cache holds it."""
ON_HOST = ", on the host"


def linear_shapes(model: str, layers: int | None) -> list[tuple[int, int]]:
    """Return the (out, in) shapes of the linear layers of one LLaMA, or of its first layers."""
    hidden, intermediate, depth, _ = MODELS[model]
    block = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    return block * min(depth, layers or depth)


def make(row: str, shapes: list[tuple[int, int]], dtype: torch.dtype, device: str) -> torch.optim.Optimizer:
    """Return the optimizer of a row over its own random weights, with gradients in place."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        weight = torch.randn(shape, generator=generator, device=device).mul_(0.02).to(dtype)
        param = torch.nn.Parameter(weight)
        param.grad = torch.randn(shape, generator=generator, device=device).mul_(1e-4).to(dtype)
        params.append(param)
    return ROWS[row].make(params)


def seconds(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Time one call: until the device is idle, and until the call returns, which is the time of the host alone."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    returned = time.perf_counter()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, returned - start


def rounds(shapes: list[tuple[int, int]], dtype: torch.dtype, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of a copy and of every row's step in each round; a round before them is not counted.

    Those of the host alone stand under the name of the row with `ON_HOST`.
    """
    optimizers = {row: make(row, shapes, dtype, args.device) for row in args.rows}
    source, target = (torch.ones(COPIED, dtype=torch.uint8, device=args.device) for _ in range(2))
    times: dict[str, list[float]] = {}
    for round_number in range(args.rounds + 1):
        elapsed = {"copy": seconds(lambda: target.copy_(source), args.device)[0]}
        for row, optimizer in optimizers.items():
            with ROWS[row].at_work():
                elapsed[row], elapsed[row + ON_HOST] = seconds(optimizer.step, args.device)
        for row, value in elapsed.items():
            times.setdefault(row, []).extend([value] if round_number else [])
    return times


def seconds_per_token(model: str, dtype: torch.dtype, device: str) -> float:
    """Time forward and backward on a few sequences, and return the median of three over their tokens."""
    hidden, intermediate, layers, heads = MODELS[model]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    with torch.device(device):
        llama = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=32000)).to(dtype)
        tokens = torch.randint(0, 32000, (1 if device == "cpu" else 8, SEQUENCE))

    def work() -> None:
        llama(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    times = [seconds(work, device)[0] for _ in range(4)]
    return statistics.median(times[1:]) / tokens.numel()


def spread(values: list[float], digits: int) -> tuple[float, list[float]]:
    """Return the median and the quartiles, rounded."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return round(median, digits), [round(low, digits), round(high, digits)]


def measure(model: str, dtype: torch.dtype, args: argparse.Namespace) -> list[dict[str, object]]:
    """Return one record per row: time, its ratio to the baseline, bandwidth and share of a training step."""
    shapes = linear_shapes(model, args.layers)
    times = rounds(shapes, dtype, args)
    copies = [2 * COPIED / value for value in times.pop("copy")]
    on_host = {row: times.pop(row + ON_HOST) for row in list(times) if row + ON_HOST in times}
    training = args.train_step * seconds_per_token(model, dtype, args.device) if args.train_step else 0.0
    depth = len(linear_shapes(model, None)) / len(shapes)
    records = []
    for row, values in times.items():
        least = ROWS[row].least_bytes(shapes, torch.finfo(dtype).bits // 8)
        milliseconds, milliseconds_quartiles = spread([1e3 * value for value in values], 3)
        ratio, ratio_quartiles = spread([a / b for a, b in zip(values, times[BASELINE], strict=True)], 3)
        of_copy, of_copy_quartiles = spread([least / a / b for a, b in zip(values, copies, strict=True)], 4)
        record: dict[str, object] = {
            "model": model,
            "dtype": str(dtype).removeprefix("torch."),
            "optimizer": row,
            "milliseconds": milliseconds,
            "milliseconds_quartiles": milliseconds_quartiles,
            "ratio": ratio,
            "ratio_quartiles": ratio_quartiles,
            "least_bytes": least,
            "copy_gib_per_second": round(statistics.median(copies) / 2**30, 2),
            "of_copy_bandwidth": of_copy,
            "of_copy_bandwidth_quartiles": of_copy_quartiles,
        }
        if row in on_host:
            record["host_milliseconds"] = round(1e3 * statistics.median(on_host[row]), 3)
        if training:
            step = depth * milliseconds / 1e3
            record["forward_and_backward_seconds"] = round(training, 3)
            record["share_of_training_step"] = float(f"{step / (step + training):.4g}")
        records.append(record)
    return records


def setup(args: argparse.Namespace) -> dict[str, object]:
    """Return what has to stand beside the numbers."""
    packages = ["transformers", *sorted({ROWS[row].needs for row in args.rows if ROWS[row].needs})]
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "layers": args.layers or "all",
        "tokens_of_a_training_step": args.train_step or "not measured",
        "left_out": args.left_out,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "hf_stateless": hf_stateless.__version__,
        "command": " ".join(["python recipes/benchmarks/step_time.py", *sys.argv[1:]]),
        "how": "measured, interleaved, medians over rounds, ratios within a round; bytes counted; "
        "forward and backward measured on a few sequences and scaled to the tokens",
    }


def table(records: list[dict[str, object]]) -> str:
    """Render records as a Markdown table with one column for each model and dtype."""
    columns = list(dict.fromkeys((r["model"], r["dtype"]) for r in records))
    lines = ["| | " + " | ".join(f"{str(m).upper()} {str(d).replace('bfloat16', 'bf16')}" for m, d in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for row in dict.fromkeys(str(r["optimizer"]) for r in records):
        cells = {(r["model"], r["dtype"]): r for r in records if r["optimizer"] == row}
        shown = [f"{cells[c]['ratio']:.2f}x, {100 * cells[c]['of_copy_bandwidth']:.0f} %" for c in columns]  # type: ignore[operator]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def shares(records: list[dict[str, object]]) -> str:
    """Render the shares of a training step, if they were measured."""
    lines = [
        f"{r['model']} {r['dtype']} {r['optimizer']}: {100 * r['share_of_training_step']:.3f} % of a training step"  # type: ignore[operator]
        for r in records
        if "share_of_training_step" in r
    ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["60m", "130m"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all but the slow ones; the baseline always")
    parser.add_argument("--slow", action="store_true", help="the rows of many matrix products instead of the others")
    parser.add_argument("--layers", type=int, help="only the first layers of each model")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--train_step", type=int, help="tokens of a training step, for the share of it")
    parser.add_argument("--threads", type=int, help="threads of torch on CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    parser.add_argument("--report", type=Path, help="print the table of a file of results")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds={args.rounds}: at least 2 are needed for a spread")
    if args.train_step is not None and args.train_step < 1:
        parser.error(f"--train_step={args.train_step}: expected a number of tokens such as 131072")
    return args


def choose_rows(args: argparse.Namespace) -> None:
    """Set the rows to run, the baseline first, and why others are left out."""
    rows = args.rows or [row for row in ROWS if (row in SLOW) == args.slow]
    reasons = {row: ROWS[row].missing(args.device) for row in rows}
    args.left_out = {row: reason for row, reason in reasons.items() if reason}
    args.rows = [BASELINE, *(row for row in rows if row != BASELINE and not reasons[row])]


def main() -> None:
    """Measure, print the table and write the JSON, or print a table of before."""
    args = parse()
    if args.report:
        records = json.loads(args.report.read_text())["records"]
        print("\n".join(filter(None, [table(records), shares(records)])))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    choose_rows(args)
    records: list[dict[str, object]] = []
    for model in args.models:
        for dtype in args.dtypes:
            print(f"measuring {model} {dtype} ...", flush=True)
            records += measure(model, getattr(torch, dtype), args)
    print("\n".join(filter(None, [table(records), shares(records)])))
    print("\n".join(f"{key}: {value}" for key, value in setup(args).items()))
    if args.output:
        write_results(args.output, setup(args), records=records)


if __name__ == "__main__":
    main()

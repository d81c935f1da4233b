"""Time of one optimizer step on the linear layers of LLaMA, as ratios to torch's fused AdamW.

    python recipes/benchmarks/step_time.py                                   # 60m and 130m, float32 and bf16, CPU
    python recipes/benchmarks/step_time.py --models 60m --dtypes float32 --rounds 20 --output results.json

All optimizers step in turn within each round, so that whatever else the machine does falls on all of them; the ratio
is taken within a round and the median over rounds is printed with its spread. Weights and gradients are random; the
steps are real ones. Nothing is compiled unless a row says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import hf_stateless
from hf_stateless import PRESETS, StatelessOptimizer


# hidden size, intermediate size and layers of the GaLore benchmark's LLaMA configurations.
MODELS = {
    "60m": (512, 1376, 8),
    "130m": (768, 2048, 12),
    "350m": (1024, 2736, 24),
    "1b": (2048, 5461, 24),
    "7b": (4096, 11008, 32),
}
BASELINE = "AdamW (fused)"


def linear_shapes(model: str, layers: int | None) -> list[tuple[int, int]]:
    """Return the (out, in) shapes of the linear layers of one LLaMA, or of its first layers."""
    hidden, intermediate, depth = MODELS[model]
    block = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    return block * min(depth, layers or depth)


def preset_row(name: str, **options: object) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    """Return a constructor of our optimizer with one group of matrices."""
    preset = PRESETS[name]
    group = {"algorithm": "multinorm", "norms": preset.norms, "num_iterations": preset.num_iterations, **options}
    return lambda params: StatelessOptimizer([{"params": params, **group}])


ROWS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    BASELINE: lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW (foreach)": lambda params: torch.optim.AdamW(params, foreach=True),
    "SGD (fused)": lambda params: torch.optim.SGD(params, lr=1e-3, fused=True),
    "Muon (torch)": lambda params: torch.optim.Muon(params, lr=1e-3),
    "sinkgd": preset_row("sinkgd"),
    "sinkgd, L=1": preset_row("sinkgd", num_iterations=1),
    "swan": preset_row("swan"),
    "swan, polar_express": preset_row("swan", whitening="polar_express"),
}


def make(row: str, shapes: list[tuple[int, int]], dtype: torch.dtype, device: str) -> torch.optim.Optimizer:
    """Return the optimizer of a row over its own random weights, with gradients in place."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        weight = torch.randn(shape, generator=generator, device=device).mul_(0.02).to(dtype)
        param = torch.nn.Parameter(weight)
        param.grad = torch.randn(shape, generator=generator, device=device).mul_(1e-4).to(dtype)
        params.append(param)
    return ROWS[row](params)


def seconds(optimizer: torch.optim.Optimizer, device: str) -> float:
    """Time one step."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: str, dtype: torch.dtype, args: argparse.Namespace) -> list[dict[str, object]]:
    """Return one record per row: median time, and the median and quartiles of the ratio to the baseline."""
    shapes = linear_shapes(model, args.layers)
    optimizers = {row: make(row, shapes, dtype, args.device) for row in args.rows}
    for optimizer in optimizers.values():
        seconds(optimizer, args.device)
    times: dict[str, list[float]] = {row: [] for row in optimizers}
    for _ in range(args.rounds):
        for row, optimizer in optimizers.items():
            times[row].append(seconds(optimizer, args.device))
    records = []
    for row, values in times.items():
        ratios = [value / base for value, base in zip(values, times[BASELINE], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        records.append(
            {
                "model": model,
                "dtype": str(dtype).removeprefix("torch."),
                "optimizer": row,
                "milliseconds": round(1e3 * statistics.median(values), 2),
                "ratio": round(statistics.median(ratios), 2),
                "ratio_quartiles": [round(low, 2), round(high, 2)],
            }
        )
    return records


def setup(args: argparse.Namespace) -> dict[str, object]:
    """Return what has to stand beside the numbers."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {platform.machine()}"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "layers": args.layers or "all",
        "torch": torch.__version__,
        "hf_stateless": hf_stateless.__version__,
        "how": "measured, interleaved, median over rounds of the ratio within a round",
    }


def table(records: list[dict[str, object]]) -> str:
    """Render records as a Markdown table with one column for each model and dtype."""
    columns = list(dict.fromkeys((r["model"], r["dtype"]) for r in records))
    lines = ["| optimizer | " + " | ".join(f"{model} {dtype}" for model, dtype in columns) + " |"]
    lines.append("|---|" + "--:|" * len(columns))
    for row in dict.fromkeys(r["optimizer"] for r in records):
        cells = {(r["model"], r["dtype"]): r for r in records if r["optimizer"] == row}
        shown = [f"{cells[c]['ratio']:.2f}x ({cells[c]['milliseconds']:.1f} ms)" for c in columns]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["60m", "130m"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="the baseline is always added")
    parser.add_argument("--layers", type=int, help="only the first layers of each model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="threads of torch on CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds={args.rounds}: at least 2 are needed for a spread")
    args.rows = [BASELINE, *(row for row in args.rows if row != BASELINE)]
    if args.threads:
        torch.set_num_threads(args.threads)
    records: list[dict[str, object]] = []
    for model in args.models:
        for dtype in args.dtypes:
            print(f"measuring {model} {dtype} ...", flush=True)
            records += measure(model, getattr(torch, dtype), args)
    print(table(records))
    print("\n".join(f"{key}: {value}" for key, value in setup(args).items()))
    if args.output:
        part = args.output.with_suffix(".part")
        part.write_text(json.dumps({"setup": setup(args), "records": records}, indent=1) + "\n")
        part.replace(args.output)


if __name__ == "__main__":
    main()

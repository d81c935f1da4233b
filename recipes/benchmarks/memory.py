"""Peak memory of training a LLaMA with AdamW, SinkGD, and SinkGD layer by layer; each run in a process of its own.

    python recipes/benchmarks/memory.py                                       # 200M parameters, float32, CPU
    python recipes/benchmarks/memory.py --time --rows "sinkgd_layerwise"       # also the time of a step
    python recipes/benchmarks/memory.py --model llama-7b --device cuda         # bf16, max_memory_allocated
    python recipes/benchmarks/memory.py --model llama-7b --int8                # 8-bit linear layers beside bf16

On CPU the peak is the largest resident set of the process, libraries included; what these take is measured too and
printed beside it. glibc is told to give back freed blocks of 1 MiB and more at once: it would else keep up to 0.1 GiB
of them, more in one run than in the next. On CUDA the peak is `max_memory_allocated`. Weights are random, steps are
real ones on random tokens, clipped as the Trainer does. A row that does not fit says so, as AdamW on 7B on a small
card, and the ratios are then left out. `--time` alternates steps with and without hooks in one process and prints the
median of their ratio. The tables stand in hf_stateless/optimizer/README.md and, with `--int8`, in
hf_stateless/weights/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from memory_rows import BASELINE, DEFAULT_ROWS, INT8_ROWS, ROWS, predicted_gib
from result_files import write_results
from transformers import LlamaConfig, LlamaForCausalLM

import hf_stateless
from hf_stateless.reports.files import GIB
from hf_stateless.weights.int8.convert import layers_to_quantize
from hf_stateless.weights.int8.linear import Int8Linear


# hidden size, intermediate size, layers and heads; 1b and 7b are those of the GaLore benchmark.
MODELS = {
    "llama-tiny": (32, 48, 2, 2),
    "llama-20m": (256, 688, 8, 4),
    "llama-200m": (768, 2048, 21, 12),
    "llama-1b": (2048, 5461, 24, 32),
    "llama-7b": (4096, 11008, 32, 32),
}
# Exit status of a process that torch told so, and of one that the system killed.
OUT_OF_MEMORY = (77, -9)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def config_of(args: argparse.Namespace) -> LlamaConfig:
    """Return the config of the model."""
    hidden, intermediate, layers, heads = MODELS[args.model]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.length,
        use_cache=False,
    )


def build(args: argparse.Namespace, row: str = BASELINE) -> LlamaForCausalLM:
    """Return the model on its device, made there and in its dtype, with 8-bit layers where the row says so."""
    config = config_of(args)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device("meta" if "int8" in row else args.device):
        model = LlamaForCausalLM(config)
    if "int8" in row:
        fill_in_8_bits(model, torch.device(args.device))
    torch.set_default_dtype(torch.float32)
    model.train()
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def fill_in_8_bits(model: LlamaForCausalLM, device: torch.device) -> None:
    """Give a model on the meta device random weights, one layer at a time: its float weights are never together."""
    for name in layers_to_quantize(model, None):
        empty = model.get_submodule(name)
        linear = torch.nn.Linear(empty.in_features, empty.out_features, bias=False, device=device)
        torch.nn.init.normal_(linear.weight, std=model.config.initializer_range)
        model.set_submodule(name, Int8Linear.from_float(linear))
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.nn.init.normal_(module.to_empty(device=device).weight, std=model.config.initializer_range)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            torch.nn.init.ones_(module.to_empty(device=device).weight)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def watch_gradients(model: torch.nn.Module) -> list[int]:
    """Return a list to which the bytes of all gradients are added whenever backward completes one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    seen: list[int] = [0]

    def see(_: torch.Tensor) -> None:
        seen.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

    for p in parameters:
        p.register_post_accumulate_grad_hook(see)
    return seen


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> None:
    """Run one training step on random tokens, with the gradient norm that the Trainer computes and clips by."""
    tokens = torch.randint(args.vocab_size, (args.batch_size, args.length), device=args.device)
    model(input_ids=tokens, labels=tokens).loss.backward()
    Accelerator(cpu=args.device == "cpu").clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def resident() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(row: str, args: argparse.Namespace) -> dict[str, float]:
    """Train a few steps in this process and return its sizes in GiB."""
    libraries = 0 if args.device == "cuda" else resident()
    model = build(args, row)
    gradients = watch_gradients(model)  # before the optimizer, so that each gradient is seen before it is freed
    optimizer = ROWS[row](model)
    for _ in range(args.steps):
        train_step(model, optimizer, args)
    groups = [group["params"] for group in optimizer.param_groups if group.get("algorithm", "adamw") != "multinorm"]
    sizes = {
        "peak": torch.cuda.max_memory_allocated() if args.device == "cuda" else resident(),
        "libraries": libraries,
        "weights": sum(t.nbytes for t in model.state_dict().values()),
        # bitsandbytes counts steps in a plain number.
        "state": sum(
            t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)
        ),
        "gradients": max(gradients),
        "gradients_of_adamw": sum(p.nbytes for params in groups for p in params),
        "largest_gradient": max(p.nbytes for p in model.parameters()),
    }
    return {name: size / GIB for name, size in sizes.items()}


def measure_in_process(row: str, args: argparse.Namespace) -> dict[str, float] | None:
    """Measure one row in a process of its own; None where the memory does not suffice."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", row]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **MALLOC})
    if done.returncode in OUT_OF_MEMORY:
        return None
    done.check_returncode()
    sizes: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return sizes


def time_ratio(row: str, args: argparse.Namespace) -> dict[str, object]:
    """Return how much longer a step takes with hooks: both kinds of step in turn, in one process."""
    model = build(args, row)
    optimizer = ROWS[row](model)
    times: dict[bool, list[float]] = {True: [], False: []}
    for round_number in range(args.rounds + 1):
        for hooked in (True, False) if round_number % 2 else (False, True):
            if hooked:
                optimizer.release.install()
            else:
                optimizer.release.remove()
            start = time.perf_counter()
            train_step(model, optimizer, args)
            if args.device == "cuda":
                torch.cuda.synchronize()
            times[hooked].append(time.perf_counter() - start)
    ratios = [with_hooks / without for with_hooks, without in zip(times[True][1:], times[False][1:], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratio_quartiles": [round(low, 3), round(high, 3)],
        "seconds": round(statistics.median(times[True][1:]), 3),
        "seconds_without_hooks": round(statistics.median(times[False][1:]), 3),
    }


def measure_all(args: argparse.Namespace) -> list[dict[str, object]]:
    """Return one record per row: medians over the runs, which go through all rows in turn; written after each run."""
    runs: dict[str, list[dict[str, float]]] = {row: [] for row in args.rows}
    predicted = predicted_gib(args.rows, config_of(args), args) if args.predict else {}
    for number in range(args.runs):
        for row in list(runs):
            print(f"run {number + 1}: {row} ...", flush=True)
            sizes = measure_in_process(row, args)
            if sizes is None:
                print(f"{row}: out of memory", flush=True)
                del runs[row]
            else:
                runs[row].append(sizes)
                write(args, records_of(runs, predicted, args))
    records = records_of(runs, predicted, args)
    for record in records:
        if args.time and "layerwise" in (row := str(record["optimizer"])):
            print(f"timing {row} ...", flush=True)
            record |= time_ratio(row, args)
    write(args, records)
    return records


def records_of(
    runs: dict[str, list[dict[str, float]]], predicted: dict[str, float], args: argparse.Namespace
) -> list[dict[str, object]]:
    """Return a record for each row that has run: medians, and how far the peak lies above what is predicted."""
    records: list[dict[str, object]] = []
    for row, measured in runs.items():
        if not measured:
            continue
        medians = {f"{name}_gib": round(statistics.median(run[name] for run in measured), 3) for name in measured[0]}
        peaks = [run["peak"] for run in measured]
        record = {"model": args.model, "dtype": args.dtype, "optimizer": row, **medians}
        record |= ratios(measured, runs.get(BASELINE))
        record |= {"peak_gib_range": [round(min(peaks), 3), round(max(peaks), 3)]}
        if row in predicted:
            over = statistics.median(peaks) / predicted[row] - 1
            record |= {"predicted_gib": round(predicted[row], 3), "over_predicted": round(over, 4)}
        records.append(record)
    return records


def write(args: argparse.Namespace, records: list[dict[str, object]]) -> None:
    """Write the records where a file is wanted: who is stopped later keeps them."""
    if args.output:
        write_results(args.output, setup(args), records=records)


def ratios(measured: list[dict[str, float]], baseline: list[dict[str, float]] | None) -> dict[str, object]:
    """Return the peak as a part of AdamW's, as it is and above what Python and its libraries take."""
    if baseline is None:
        return {}
    of_peak, of_training = (
        statistics.median(run["peak"] - without * run["libraries"] for run in measured)
        / statistics.median(run["peak"] - without * run["libraries"] for run in baseline)
        for without in (0, 1)
    )
    return {"ratio": round(of_peak, 3), "ratio_above_libraries": round(of_training, 3)}


def setup(args: argparse.Namespace) -> dict[str, object]:
    """Return what has to stand beside the numbers."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {platform.machine()}"
    resident_set = f"largest resident set, libraries included, with {MALLOC}"
    peak = "max_memory_allocated" if args.device == "cuda" else resident_set
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "runs": args.runs,
        "steps": args.steps,
        "tokens": f"{args.batch_size} x {args.length}",
        "vocab_size": args.vocab_size,
        "torch": torch.__version__,
        "hf_stateless": hf_stateless.__version__,
        "how": f"measured, one process per run, medians; peak is the {peak}",
    }


def table(records: list[dict[str, object]]) -> str:
    """Render records as a Markdown table."""
    titles = ["optimizer", "peak GiB", "ratio", "weights", "state", "gradients at peak", "libraries"]
    timed = any("time_ratio" in record for record in records)
    lines = ["| " + " | ".join(titles + ["step time with hooks"] * timed) + " |", "|---|" + "--:|" * (5 + 1 + timed)]
    for record in records:
        cells = [f"{record[f'{name}_gib']:.2f}" for name in ("weights", "state", "gradients", "libraries")]
        ratio = f"{record['ratio']:.2f}x" if "ratio" in record else ""
        cells = [str(record["optimizer"]), f"{record['peak_gib']:.2f}", ratio, *cells]
        if timed:
            cells.append(f"{record['time_ratio']:.2f}x" if "time_ratio" in record else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-200m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on CUDA and with --int8")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="the baseline is always added")
    parser.add_argument("--int8", action="store_true", help="8-bit linear layers beside bf16, without optimizer state")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="training steps of a run")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--length", type=int, help="default: 64 on CPU, 512 on CUDA, 2048 with --int8")
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--time", action="store_true", help="also time steps with and without hooks")
    parser.add_argument("--predict", action="store_true", help="also what hf-stateless memory predicts for a GPU")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each kind that are timed")
    parser.add_argument("--threads", type=int, help="threads of torch on CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 2 or args.runs < 1:
        parser.error(f"--rounds={args.rounds} --runs={args.runs}: at least 2 rounds and 1 run are needed")
    on_cuda = args.device == "cuda"
    args.checkpointing = on_cuda
    args.dtype = args.dtype or ("bfloat16" if on_cuda or args.int8 else "float32")
    args.length = args.length or ((2048 if args.int8 else 512) if on_cuda else 64)
    rows = args.rows or (INT8_ROWS if args.int8 else DEFAULT_ROWS)
    args.rows = [BASELINE, *(row for row in rows if row != BASELINE and ROWS[row].is_here())]
    return args


def main() -> None:
    """Measure, print the table and write the JSON."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.measure:
        try:
            print(json.dumps(measure(args.measure, args)))
        except torch.OutOfMemoryError:
            sys.exit(OUT_OF_MEMORY[0])
        return
    records = measure_all(args)
    print(table(records))
    print("\n".join(f"{key}: {value}" for key, value in setup(args).items()))


if __name__ == "__main__":
    main()

"""Time of one whitening, and how close it comes to the SWAN paper's polynomial in float64, on gradients of a LLaMA.

    python recipes/benchmarks/whitening.py --output results.json                        # CPU, one thread
    python recipes/benchmarks/whitening.py --models 60m 1b --rounds 0 --output results.json     # cosines alone
    python recipes/benchmarks/whitening.py --device cuda --models 60m 350m 1b --batch 8

The gradients are those of a LLaMA with one layer after `--steps` steps of AdamW on the sources of Python's standard
library, row-standardised as in SWAN: badly conditioned as in any training, and singular, since rows are centred.
Times are those of one square and one wide matrix (on CUDA of a batch of `--batch` alike); all methods take their turn
in each round, and the ratio to the paper's iteration written down plainly in float32 is taken within a round. On CPU,
time is that of the thread. The cosine is the lowest over the four square or the three other matrices of the layer.
The table stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sysconfig
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result_files import write_results
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hf_stateless
from hf_stateless.norms.projections import row_standardize
from hf_stateless.norms.whitening import eigh, newton_schulz, polar_express


# hidden and intermediate size of the GaLore benchmark's LLaMA configurations, and two small ones.
MODELS = {
    "tiny": (128, 344),
    "10m": (256, 688),
    "60m": (512, 1376),
    "130m": (768, 2048),
    "350m": (1024, 2736),
    "1b": (2048, 5461),
    "7b": (4096, 11008),
}
VOCABULARY, LENGTH = 8192, 128
LARGEST_ON_CPU = 1024
"""Shorter side above which a CPU takes one matrix of each kind, and no float16, which it emulates in minutes."""
BASELINE = "the paper's iteration, float32"
HALF = "`newton_schulz`, `ns_dtype=float16`"
ONE_STEP = "`polar_express`, `ns_steps=1`"


def paper_polynomial(grad: Tensor) -> Tensor:
    """Iterate Y and Z as the SWAN paper writes them (k = 10, beta = 0.8), in the dtype of the gradient."""
    if grad.shape[-2] > grad.shape[-1]:
        return paper_polynomial(grad.mT).mT
    x = grad / torch.linalg.vector_norm(grad, dim=(-2, -1), keepdim=True)
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    y, z = x @ x.mT, identity
    for _ in range(10):
        bracket = 3 * identity - z @ y
        y, z = 0.8 * (y @ bracket), 0.8 * (bracket @ z)
    return z @ x


def muon(grad: Tensor) -> Tensor:
    """Return the update of `torch.optim.Muon` without momentum: five quintic steps in bf16, one matrix at a time."""
    matrices = list(grad.reshape(-1, *grad.shape[-2:]))
    weights = [torch.zeros_like(matrix) for matrix in matrices]
    muon_step_(weights, matrices)
    return -torch.stack(weights).view(grad.shape)


def muon_step_(weights: list[Tensor], grads: list[Tensor]) -> None:
    """Step weights by `torch.optim.Muon` without momentum."""
    params = [torch.nn.Parameter(weight) for weight in weights]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    torch.optim.Muon(params, lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()


@dataclass(frozen=True)
class Method:
    """A way to whiten."""

    run: Callable[..., Tensor]
    options: tuple[tuple[str, Any], ...] = ()
    has_float64: bool = True
    """Whether it is the same map in float64: not where rounding decides which singular values count as zero."""

    def __call__(self, grad: Tensor) -> Tensor:
        return self.run(grad, **dict(self.options))

    def in_float64(self, grad: Tensor) -> Tensor:
        """Return what it would be without rounding."""
        return self.run(grad.double(), **{key: value for key, value in self.options if key != "ns_dtype"})


METHODS = {
    BASELINE: Method(paper_polynomial),
    "`newton_schulz`": Method(newton_schulz),
    HALF: Method(newton_schulz, (("ns_dtype", "float16"),)),
    "`polar_express`, `ns_dtype=float32`": Method(polar_express, (("ns_dtype", "float32"),)),
    "`polar_express`, `ns_dtype=bfloat16`": Method(polar_express, (("ns_dtype", "bfloat16"),)),
    ONE_STEP: Method(polar_express, (("ns_steps", 1), ("ns_dtype", "bfloat16"))),
    "`torch.optim.Muon`, bf16": Method(muon, has_float64=False),
    "`eigh`": Method(eigh, has_float64=False),
}


def tokens() -> Tensor:
    """Return the words of Python's standard library, each hashed to a number."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    words = [word for file in files for word in file.read_text(encoding="utf-8", errors="replace").split()]
    return torch.tensor([zlib.crc32(word.encode()) % VOCABULARY for word in words])


def gradients(hidden: int, intermediate: int, steps: int) -> list[Tensor]:
    """Train a LLaMA with one layer for some steps and return the row-standardised gradients of its seven matrices."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": hidden // 64 or 1}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = tokens()
    for step in range(steps + 1):
        starts = torch.randint(len(text) - LENGTH, (8,)).tolist()
        batch = torch.stack([text[start : start + LENGTH] for start in starts])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        if step < steps:
            optimizer.step()
    return [row_standardize(p.grad) for p in model.model.layers.parameters() if p.ndim == 2]


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two matrices."""
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def seconds(method: Callable[[Tensor], Tensor], grad: Tensor) -> float:
    """Time one call: of the thread on CPU, until the device is idle on CUDA."""
    if grad.device.type == "cpu":
        start = time.thread_time()
        method(grad)
        return time.thread_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    method(grad)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(grads: list[Tensor], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one record per method for gradients of one shape, turned or not."""
    large = args.device == "cpu" and min(grads[0].shape) > LARGEST_ON_CPU
    grads = grads[-1:] if large else grads
    exact = [paper_polynomial(grad.double()) for grad in grads]
    wide = grads[-1].to(args.device)
    batch = wide.expand(args.batch, *wide.shape).contiguous() if args.device == "cuda" else wide
    # Half products of a CPU are emulated: their time says nothing.
    timed = [name for name in METHODS if args.device == "cuda" or name != HALF]
    times: dict[str, list[float]] = {name: [] for name in timed}
    for round_number in range(args.rounds + 1 if args.rounds else 0):
        for name in timed:
            elapsed = seconds(METHODS[name], batch)
            times[name] += [elapsed] if round_number else []
    records = []
    for name, method in METHODS.items():
        if name == HALF and large:
            continue
        results = [method(grad.to(args.device)).cpu().double() for grad in grads]
        pairs = list(zip(results, exact, strict=True))
        record: dict[str, Any] = {
            "shape": list(wide.shape),
            "method": name,
            "cosine": min(cosine(a, b) for a, b in pairs),
            "relative_error": max(((a - b).norm() / b.norm()).item() for a, b in pairs),
        }
        if method.has_float64:
            own = exact if name == BASELINE else [method.in_float64(grad) for grad in grads]
            record["cosine_to_float64"] = min(cosine(a, b) for a, b in zip(results, own, strict=True))
        if times.get(name):
            ratios = [value / base for value, base in zip(times[name], times[BASELINE], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            record |= {
                "milliseconds": round(1e3 * statistics.median(times[name]) / (len(batch) if batch.ndim > 2 else 1), 3),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_quartiles": [round(low, 3), round(high, 3)],
            }
        records.append(record)
    return records


def setup(args: argparse.Namespace) -> dict[str, object]:
    """Return what has to stand beside the numbers."""
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "batch": args.batch if args.device == "cuda" else 1,
        "rounds": args.rounds,
        "steps": args.steps,
        "torch": torch.__version__,
        "hf_stateless": hf_stateless.__version__,
        "how": "measured, interleaved, medians over rounds; ratios within a round",
    }


def table(records: list[dict[str, Any]]) -> str:
    """Render the times and ratios of each shape, and the range of the cosines, as a Markdown table."""
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in records))
    lines = ["| Method | " + " | ".join(f"{m} x {n}" for m, n in shapes) + " | Cosine |"]
    lines.append("|---|" + "---:|" * (len(shapes) + 1))
    for name in dict.fromkeys(r["method"] for r in records):
        cells = {tuple(r["shape"]): r for r in records if r["method"] == name}
        shown = [
            f"{cells[s]['milliseconds']:.1f} ms, {cells[s]['ratio']:.2f}x" if "ratio" in cells[s] else "not measured"
            for s in shapes
        ]
        cosines = sorted(f"{cell['cosine']:.4f}" for cell in cells.values())
        span = cosines[0] if cosines[0] == cosines[-1] else f"{cosines[0]} to {cosines[-1]}"
        lines.append(f"| {name} | " + " | ".join(shown) + f" | {span} |")
    return "\n".join(lines)


def rounding_table(records: list[dict[str, Any]]) -> str:
    """Render how close each method comes to itself in float64, and to the paper's polynomial, as a Markdown table."""
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in records))
    lines = ["| Form | " + " | ".join(f"{m} x {n}" for m, n in shapes) + " | To the paper's |"]
    lines.append("|---|" + "---:|" * (len(shapes) + 1))
    for name in dict.fromkeys(r["method"] for r in records if "cosine_to_float64" in r):
        cells = {tuple(r["shape"]): r for r in records if r["method"] == name}
        own = " | ".join(f"{cells[s]['cosine_to_float64']:.4f}" if s in cells else "not measured" for s in shapes)
        low, high = (f(cell["cosine"] for cell in cells.values()) for f in (min, max))
        lines.append(f"| {name} | {own} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tiny", "10m", "60m", "130m"])
    parser.add_argument("--steps", type=int, default=20, help="training steps before the gradients are taken")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8, help="matrices at once on CUDA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    args = parser.parse_args()
    if args.rounds == 1 or args.rounds < 0:
        parser.error(f"--rounds={args.rounds}: at least 2 are needed for a spread, 0 for cosines alone")
    if args.device == "cpu":
        torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    for model in args.models:
        print(f"measuring {model} ...", flush=True)
        grads = gradients(*MODELS[model], args.steps)
        for square in (True, False):
            records += measure([g for g in grads if (g.shape[0] == g.shape[1]) == square], args)
    print(table(records) if args.rounds else rounding_table(records))
    print("\n".join(f"{key}: {value}" for key, value in setup(args).items()))
    if args.output:
        write_results(args.output, setup(args), records=records)


if __name__ == "__main__":
    main()

"""Products, FLOPs and bytes of one step of each chain and of torch's Muon, counted without a device.

    python recipes/benchmarks/whitening_cost.py --output results.json

Every operation that a step would launch on a GPU runs on tensors without contents. FLOPs are those of its matrix
products, bytes are what its operations read and write, for nothing is fused. The time is predicted for an H100, with
products at 990 TFLOP/s in bf16 and float16 and at 67 in float32 and bytes at 3.0 TB/s, one after the other. No kernel
reaches these rates, so a step takes longer: read the ratios. Weights and gradients are bf16. What writes weights is
left out: it is the same for all.
The table stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from result_files import write_results
from step_time import MODELS, linear_shapes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from whitening import muon_step_

import hf_stateless
from hf_stateless import PRESETS
from hf_stateless.norms.chain import Chain


RATES = {torch.bfloat16: 990e12, torch.float16: 990e12, torch.float32: 67e12}
"""FLOP/s of an H100's matrix units, from its data sheet."""
BANDWIDTH = 3.0e12
"""Bytes a second."""
MOVE_NOTHING = (
    *(torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty),
    torch.ops.aten._unsafe_view,
)
MUON = "torch.optim.Muon"


class Count(TorchDispatchMode):
    """Counts products, their FLOPs by dtype, and the bytes that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.bytes = 0, 0
        self.flops: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and func.overloadpacket not in MOVE_NOTHING:
            read = {name: value for name, value in kwargs.items() if name != "out"}  # what is the result
            tensors = [t for t in tree_leaves((args, read, result)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        flops = flop_registry.get(func.overloadpacket)
        if flops:
            self.products += 1
            self.flops[result.dtype] += flops(*args, **kwargs, out_val=result)
        return result

    @property
    def seconds(self) -> float:
        """The predicted time."""
        return sum(count / RATES[dtype] for dtype, count in self.flops.items()) + self.bytes / BANDWIDTH


def chain(name: str, **options: Any) -> Callable[[Tensor], object]:
    """Return what normalises a gradient by the chain of a preset with other options."""
    return Chain.of({**PRESETS[name].group(), **options}).normalize


ROWS: dict[str, Callable[[Tensor], object]] = {
    MUON: lambda grad: muon_step_([torch.empty_like(grad)], [grad]),
    "`swan`": chain("swan"),
    "`swan`, `ns_dtype=float32`": chain("swan", ns_dtype="float32"),
    "`swan`, `whitening=newton_schulz`": chain("swan", whitening="newton_schulz"),
    "`swan`, `whitening=newton_schulz,ns_dtype=float16`": chain("swan", whitening="newton_schulz", ns_dtype="float16"),
    "`sinkgd_polar`": chain("sinkgd_polar"),
}


def count(step: Callable[[Tensor], object], shapes: list[tuple[int, int]]) -> Count:
    """Count a step over matrices of some shapes."""
    counted = Count()
    grads = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    with counted:
        for grad in grads:
            step(grad)
    return counted


def measure(model: str) -> list[dict[str, object]]:
    """Return one record for each row; a layer is counted, times the layers of the model."""
    layers, shapes = MODELS[model][2], linear_shapes(model, 1)
    counts = {name: count(step, shapes) for name, step in ROWS.items()}
    return [
        {
            "model": model,
            "row": name,
            "products_of_a_matrix": counted.products / len(shapes),
            "tflop": sum(counted.flops.values()) * layers / 1e12,
            "gigabytes": counted.bytes * layers / 1e9,
            "predicted_milliseconds": 1e3 * counted.seconds * layers,
            "to_muon": counted.seconds / counts[MUON].seconds,
        }
        for name, counted in counts.items()
    ]


def table(records: list[dict[str, Any]]) -> str:
    """Render the records as a Markdown table."""
    lines = [
        "| Model | Step | Products of a matrix | TFLOP | GB | H100, predicted | To Muon |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        lines.append(
            f"| {r['model']} | {r['row']} | {r['products_of_a_matrix']:.0f} | {r['tflop']:.1f} | {r['gigabytes']:.0f} "
            f"| {r['predicted_milliseconds']:.0f} ms | {r['to_muon']:.2f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, count, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1b", "7b"])
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    args = parser.parse_args()
    records = [record for model in args.models for record in measure(model)]
    print(table(records))
    if args.output:
        setup = {
            "torch": torch.__version__,
            "hf_stateless": hf_stateless.__version__,
            "how": "counted; times predicted from 990 and 67 TFLOP/s and 3.0 TB/s",
        }
        write_results(args.output, setup, records=records)


if __name__ == "__main__":
    main()

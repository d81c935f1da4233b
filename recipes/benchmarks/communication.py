"""Collectives and bytes that one optimizer step sends under FSDP2, counted without data and without a network.

    python recipes/benchmarks/communication.py                               # LLaMA-1.3B and 7B on 8 ranks, bf16
    python recipes/benchmarks/communication.py --models 7b --ranks 64 --output results.json

The real step runs on tensors that have shapes but no data, on a process group that sends nothing, once as each rank;
the rank that sends most is shown. Bytes are what a ring sends: 2 (N-1)/N of an all-reduce, (N-1)/N of the result of an
all-gather, and of an all-to-all what is for others. Only the linear layers are counted: AdamW of the rest adds one
all-reduce of flags. FSDP2 itself gathers the weights twice and scatters the gradients once, which stands beside it.
The table stands in hf_stateless/ranks/README.md.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from result_files import write_results
from step_time import MODELS, linear_shapes
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import hf_stateless
from hf_stateless import PRESETS, StatelessOptimizer


Parameters = list[torch.nn.Parameter]
# Of a LLaMA: four of the attention, three of the MLP.
MATRICES_OF_A_LAYER = 7


class Traffic(TorchDispatchMode):
    """Counts the collectives that are called inside, and the bytes that this rank sends for them."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.collectives, self.bytes = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operation, and do it."""
        sent = self._sent(func, args) if func.namespace in ("c10d", "_c10d_functional") else None
        if sent is not None:
            self.collectives += 1
            self.bytes += sent
        return func(*args, **(kwargs or {}))

    def _sent(self, func: Any, args: Any) -> float | None:
        name = func.__name__.split(".")[0]
        if name == "allreduce_":
            return 2 * (self.ranks - 1) / self.ranks * args[0][0].nbytes
        if name == "alltoall_base_":
            own = args[4][self.rank] if args[4] else args[1].numel() // self.ranks
            return (args[1].numel() - own) * args[1].itemsize
        if name == "all_gather_into_tensor":
            return (self.ranks - 1) * args[0].nbytes
        if name == "wait_tensor":
            return None
        raise NotImplementedError(f"No rule for the bytes of {func}: add one to Traffic.")


def preset_step(name: str) -> Callable[[Parameters], None]:
    """Return the step of a preset over all matrices together."""
    return lambda params: _optimizer(name, params).step() and None


def preset_in_parts(name: str, size: int) -> Callable[[Parameters], None]:
    """Return the steps of a preset over so many matrices at a time; layer-wise updates take those of one layer."""

    def steps(params: Parameters) -> None:
        optimizer = _optimizer(name, params)
        for first in range(0, len(params), size):
            optimizer.update_parameters(range(first, min(first + size, len(params))))

    return steps


def gather_everything(params: Parameters) -> None:
    """Gather every gradient on every rank."""
    for p in params:
        p.grad.full_tensor()


ROWS: dict[str, Callable[[Parameters], None]] = {
    "sinkgd": preset_step("sinkgd"),
    "sinkgd, one layer at a time": preset_in_parts("sinkgd", MATRICES_OF_A_LAYER),
    "sinkgd, one matrix at a time": preset_in_parts("sinkgd", 1),
    "swan": preset_step("swan"),
    "swan, one layer at a time": preset_in_parts("swan", MATRICES_OF_A_LAYER),
    "swan, one matrix at a time": preset_in_parts("swan", 1),
    "whole matrices on every rank": gather_everything,
}


def _optimizer(name: str, params: Parameters) -> StatelessOptimizer:
    chain = PRESETS[name].group()
    group = {"params": params, "algorithm": "multinorm", "stochastic_rounding": False, **chain}
    return StatelessOptimizer([group], lr=1e-3)


def sharded(shapes: list[tuple[int, int]], mesh: DeviceMesh, rank: int, dtype: torch.dtype) -> Parameters:
    """Return parameters with gradients, cut by rows as FSDP2 does, without data."""
    params = []
    for out_features, in_features in shapes:
        chunk = -(-out_features // mesh.size())
        rows = max(0, min(chunk, out_features - rank * chunk))
        local = torch.empty(rows, in_features, dtype=dtype)
        layout = {"shape": torch.Size((out_features, in_features)), "stride": (in_features, 1), "run_check": False}
        param = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], **layout))
        param.grad = DTensor.from_local(local.clone(), mesh, [Shard(0)], **layout)
        params.append(param)
    return params


def count(row: str, shapes: list[tuple[int, int]], ranks: int, rank: int, dtype: torch.dtype) -> Traffic:
    """Return what one rank sends in one step."""
    # Whether a gradient is zero cannot be read without data; called zero, it is left out after everything was sent.
    unknown = mock.patch.object(FakeTensor, "tolist", lambda tensor: np.zeros(tuple(tensor.shape)).tolist())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        with FakeTensorMode(), unknown:
            params = sharded(shapes, mesh, rank, dtype)
            with Traffic(rank, ranks) as traffic:
                ROWS[row](params)
    finally:
        dist.destroy_process_group()
    return traffic


def measure(model: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Return one record per row."""
    shapes = linear_shapes(model, args.layers)
    dtype = getattr(torch, args.dtype)
    own = 3 * (args.ranks - 1) / args.ranks * sum(m * n for m, n in shapes) * dtype.itemsize
    records = []
    for row in args.rows:
        of_ranks = [count(row, shapes, args.ranks, rank, dtype) for rank in range(args.ranks)]
        most = max(of_ranks, key=lambda traffic: traffic.bytes)
        records.append(
            {
                "model": model,
                "matrices": len(shapes),
                "step": row,
                "collectives": most.collectives,
                "mib_sent": round(most.bytes / 2**20, 1),
                "part_of_fsdp": round(most.bytes / own, 4),
                "fsdp_mib_sent": round(own / 2**20, 1),
            }
        )
    return records


def setup(args: argparse.Namespace) -> dict[str, object]:
    """Return what has to stand beside the numbers."""
    return {
        "ranks": args.ranks,
        "dtype": args.dtype,
        "layers": args.layers or "all",
        "torch": torch.__version__,
        "hf_stateless": hf_stateless.__version__,
        "how": "counted on fake tensors and a fake process group; the rank that sends most",
    }


def table(records: list[dict[str, object]]) -> str:
    """Render records as a Markdown table with one column for each model."""
    models = list(dict.fromkeys(r["model"] for r in records))
    lines = ["| one step | " + " | ".join(str(model) for model in models) + " |"]
    lines.append("|---|" + "--:|" * len(models))
    for row in dict.fromkeys(r["step"] for r in records):
        cells = {r["model"]: r for r in records if r["step"] == row}
        shown = [
            f"{cells[m]['collectives']} collectives, {cells[m]['mib_sent']:,} MiB ({cells[m]['part_of_fsdp']:.2%})"
            for m in models
        ]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    own = {r["model"]: r["fsdp_mib_sent"] for r in records}
    lines.append("| FSDP2 itself | " + " | ".join(f"{own[m]:,} MiB (100 %)" for m in models) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, count, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1b", "7b"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--layers", type=int, help="only the first layers of each model")
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error(f"--ranks={args.ranks}: at least 2 are needed to send anything")
    logging.getLogger("torch").setLevel(logging.ERROR)
    records: list[dict[str, object]] = []
    for model in args.models:
        print(f"counting {model} ...", flush=True)
        records += measure(model, args)
    print(table(records))
    print("\n".join(f"{key}: {value}" for key, value in setup(args).items()))
    if args.output:
        write_results(args.output, setup(args), records=records)


if __name__ == "__main__":
    main()

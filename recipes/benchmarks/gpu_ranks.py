"""Two processes against one: DDP and FSDP2 with SinkGD and SWAN, over gloo and NCCL.

    python recipes/benchmarks/gpu_ranks.py --output results.json
    python recipes/benchmarks/gpu_ranks.py --backends gloo --hidden 16 --layers 1 --steps 1     # CPU

Each backend is tried by two new processes. On one card gloo copies tensors through the host, and NCCL, which refuses a
card that it has already, gets one process: the calls are the same. Every process also trains alone, with the batches
of all. Told are how far the weights are apart afterwards, the norm of the difference over that of what training
changed, and the time of a step; or the line with which a way failed. Weights are float32.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any


LIMIT = 90
VOCABULARY, LENGTH, BATCH = 512, 64, 2
OPTIMIZERS, WAYS = ("sinkgd", "swan"), ("DDP", "FSDP2")


def device_of(rank: int) -> Any:
    """Return the device of a rank: two ranks share one card where there is only one."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def train(optim: str, way: str | None, rank: int, args: argparse.Namespace) -> tuple[Any, Any, float]:
    """Return the weights before and after training and the seconds of a step, alone or as one of two processes."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    import hf_stateless

    torch.manual_seed(0)
    device = device_of(rank)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 2 * args.hidden, "num_hidden_layers": args.layers}
    config = LlamaConfig(**sizes, num_attention_heads=2, vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
    model = LlamaForCausalLM(config).to(device)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    runs: Any = model
    if way == "DDP":
        runs = torch.nn.parallel.DistributedDataParallel(model)
    elif way == "FSDP2":
        mesh = init_device_mesh(device.type, (args.world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = hf_stateless.create_optimizer(model, optim, lr=1e-3)
    batches = torch.randint(0, VOCABULARY, (args.steps + 1, args.world * BATCH, LENGTH)).to(device)
    times = []
    for batch in batches:
        start = time.perf_counter()
        tokens = batch[rank * BATCH : (rank + 1) * BATCH] if way else batch
        runs(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start if device.type == "cpu" else _until_idle(start))
    whole = [p.detach() if way != "FSDP2" else p.full_tensor() for p in model.parameters()]
    return before, torch.cat([p.detach().flatten() for p in whole]), sum(times[1:]) / args.steps


def _until_idle(start: float) -> float:
    import torch

    torch.cuda.synchronize()
    return time.perf_counter() - start


def work(backend: str, rank: int, folder: Path, args: argparse.Namespace) -> None:
    """Be one of the two processes; the first writes what was found, after every way."""
    import torch.distributed as dist

    from hf_stateless.reports.files import write_json

    device_of(rank)
    limit = timedelta(seconds=LIMIT)
    dist.init_process_group(backend, f"file://{folder / backend}", limit, args.world, rank)
    records: list[dict[str, object]] = []
    # A way may end the process: what comes before it is written.
    for way in WAYS:
        for optim in OPTIMIZERS:
            before, alone, seconds_alone = train(optim, None, rank, args)
            record: dict[str, object] = {"backend": backend, "processes": args.world, "way": way, "optimizer": optim}
            try:
                _, together, seconds = train(optim, way, rank, args)
                difference = ((together - alone).norm() / (alone - before).norm()).item()
                record |= {"difference": float(f"{difference:.3g}"), "seconds": round(seconds, 4)}
                record |= {"seconds_alone": round(seconds_alone, 4)}
            except (RuntimeError, NotImplementedError) as error:  # dist's own errors are RuntimeErrors
                record |= {"failed": str(error).split("\n")[0][:200]}
            records.append(record)
            if rank == 0:
                write_json(folder / f"{backend}.json", records)
    os._exit(0)  # threads of a process group now and then abort a process that ends in the ordinary way


def attempt(backend: str, world: int, folder: Path) -> list[dict[str, Any]]:
    """Return the records of one backend, or one with the line with which it failed."""
    own = ["--folder", str(folder), "--world", str(world), "--as_backend", backend, "--as_rank"]
    command = [sys.executable, __file__, *sys.argv[1:], *own]
    log = folder / f"{backend}.log"
    with log.open("w") as output:
        ranks = [subprocess.Popen([*command, str(rank)], stdout=output, stderr=output) for rank in range(world)]
        try:
            ends = time.monotonic() + LIMIT
            codes = [rank.wait(max(1, ends - time.monotonic())) for rank in ranks]
        except subprocess.TimeoutExpired:
            codes = [None]
        finally:
            for rank in ranks:
                rank.kill()
    file = folder / f"{backend}.json"
    records: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    if any(codes) or None in codes:
        from gpu_process import last_lines, telling_line

        ended = next((signal.Signals(-code).name for code in codes if code and code < 0), "")
        line = f"ended by {ended}" if ended else telling_line(last_lines(log))
        why = line if None not in codes else f"no end after {LIMIT} s"
        records.append({"backend": backend, "processes": world, "way": "", "optimizer": "", "failed": why})
    return records


def setup(args: argparse.Namespace) -> dict[str, object]:
    """Return what has to stand beside the numbers."""
    import torch
    from result_files import versions

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"device": device, "cards": cards, "hidden": args.hidden, "layers": args.layers, **versions()}


def main() -> None:
    """Try each backend in two processes and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=["nccl", "gloo"], default=["nccl", "gloo"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    for name, kind in (("--folder", Path), ("--world", int), ("--as_backend", str), ("--as_rank", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_backend:
        work(args.as_backend, args.as_rank, args.folder, args)
    found = setup(args)
    with tempfile.TemporaryDirectory() as folder:
        worlds = [(backend, 1 if backend == "nccl" and found["cards"] == 1 else 2) for backend in args.backends]
        records = [record for backend, world in worlds for record in attempt(backend, world, Path(folder))]
    for record in records:
        print(", ".join(f"{key}: {value}" for key, value in record.items() if value != ""))
    if all("failed" in record for record in records):
        sys.exit(f"No way worked: error: {records[-1]['failed']}")
    if args.output:
        from result_files import write_results

        write_results(args.output, found, records=records)


if __name__ == "__main__":
    main()

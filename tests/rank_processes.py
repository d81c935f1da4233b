"""Several ranks on this machine, without the seconds that each would need to import torch and transformers."""

import multiprocessing
import tempfile
from pathlib import Path

import torch


# One process imports these once and is forked for every rank. It has run nothing, so there is no thread to lose.
multiprocessing.set_forkserver_preload(["torch", "transformers", "accelerate", "peft", "hypothesis", "pytest"])


def on_ranks(worker, world):
    """Run `worker(rank, folder)` in `world` processes; return what each has saved as `folder/{rank}.pt`."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(worker, (folder,), nprocs=world, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]

"""Several ranks on this machine, without the seconds that each would need to import torch and transformers."""

import contextlib
import gc
import multiprocessing
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist


# One process imports these once and is forked for every rank. It has run nothing, so there is no thread to lose.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch", "transformers", "accelerate", "peft", "hypothesis", "pytest"])


@contextlib.contextmanager
def joined(rank, folder, world):
    """Join the other ranks of `on_ranks` by gloo; the given function saves what `on_ranks` returns of this one."""
    gc.freeze()  # as in conftest.py
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        yield partial(torch.save, f=Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_ranks(worker, world):
    """Run `worker(rank, folder)` in `world` processes; return what each has saved as `folder/{rank}.pt`."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(worker, (folder,), nprocs=world, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]


def announce_rank(rank, world):
    """Set what torchrun would, for what reads it although the process group is there."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29501")


def errors_of(acts):
    """Do what cannot work, one after the other; return the errors by name."""
    said = {}
    for name, act in acts.items():
        try:
            act()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said

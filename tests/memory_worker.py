"""One process of a distributed run with a memory report, started by `accelerate launch`; ranks write FOLDER/r.json."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_worker import arguments, let_accelerate_shard_on_cpu, odd_llama, rows
from torch.distributed.tensor import DTensor
from transformers import Trainer

import hf_stateless


def local_bytes(tensors):
    return sum(
        (local := t.to_local() if isinstance(t, DTensor) else t).numel() * local.element_size() for t in tensors
    )


def main():
    folder, optim = sys.argv[1:]
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_accelerate_shard_on_cpu()
    options = {"optim": optim, "max_steps": 4, "logging_strategy": "steps", "logging_steps": 2, "output_dir": folder}
    args = arguments({"arguments": options}, folder, int(os.environ["WORLD_SIZE"]))
    trainer = Trainer(odd_llama(), args, train_dataset=rows())
    callback = hf_stateless.attach_memory_report(trainer)
    hoard = []  # which the last rank alone allocates, in its second step
    compute_loss = trainer.compute_loss

    def compute_and_hoard(*args, **kwargs):
        if trainer.state.global_step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            hoard.append(torch.ones(16 << 20))
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = compute_and_hoard
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    facts = {
        "weights": local_bytes([*trainer.model.parameters(), *trainer.model.buffers()]),
        "optimizer_state": local_bytes(t for state in optimizer.state.values() for t in state.values()),
        "sharded": sum(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "logs": trainer.state.log_history,
        "has_report": callback.report() is not None,
    }
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo now and then abort a process that ends in the ordinary way


if __name__ == "__main__":
    main()

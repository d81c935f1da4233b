"""What ranks of `test_zero_trainer.py` do: runs of the Trainer under DeepSpeed, one after the other."""

import gc
import logging
import os
from unittest import mock

import torch
from rank_processes import announce_rank, joined
from transformers import TrainerCallback
from zero_runs import config_of, record, train


MOMENTUM = "momentum=0.9,momentum_dtype=float32"
SWAN = {"optim_args": "lr_scale=0.2"}
CASES = {
    "swan, stage 0, accumulated": ("swan", 0, {**SWAN, "gradient_accumulation_steps": 2}),
    "swan, stage 1": ("swan", 1, SWAN),
    "sinkgd, stage 1, accumulated, not clipped": ("sinkgd", 1, {"gradient_accumulation_steps": 2, "max_grad_norm": 0}),
    "sinkgd, stage 2": ("sinkgd", 2, {}),
    "sinkgd with momentum, stage 2": ("sinkgd", 2, {"optim_args": MOMENTUM}),
    "swan with momentum, stage 3": ("swan", 3, {"optim_args": f"lr_scale=0.2,{MOMENTUM}"}),
    "swan, stage 3, accumulated": ("swan", 3, {**SWAN, "gradient_accumulation_steps": 2}),
}
# A model that `zero.Init` has cut before the optimizer sees it, in parts of a few parameters.
LOADED = {"sinkgd, stage 3, loaded": ("sinkgd", {"max_grad_norm": 0.0}), "swan, stage 3, loaded": ("swan", SWAN)}
FEW = {"sub_group_size": 3000, "stage3_param_persistence_threshold": 100}
ON_FOUR = {"swan, stage 2, on four": ("swan", 2, SWAN), "sinkgd, stage 3, on four": ("sinkgd", 3, {})}
RECORDED = {
    "sinkgd, stage 0, bf16": ("sinkgd", 0, torch.bfloat16),
    "swan, stage 1, bf16": ("swan", 1, torch.bfloat16),
    "sinkgd, stage 3, bf16": ("sinkgd", 3, torch.bfloat16),
    "swan, stage 1, fp16": ("swan", 1, torch.float16),
    "sinkgd, stage 2, fp16": ("sinkgd", 2, torch.float16),
    "swan, stage 3, fp16": ("swan", 3, torch.float16),
}
RESUMED = ("sinkgd with momentum, stage 2", "swan with momentum, stage 3")
LAST_STEP = 3  # of the rank that dies


def prepare(rank, world):
    """Let DeepSpeed run on CPU, in a process that torchrun has not started."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    announce_rank(rank, world)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it is compiled at the first use: a minute
    deepspeed.utils.logger.setLevel(logging.ERROR)
    gc.freeze()  # the collections of each run would go through all modules


def run(folder, case, **options):
    """Train under DeepSpeed as a case says."""
    optim, stage, said = (CASES | ON_FOUR)[case]
    return train(folder, optim, config_of(stage), **said, **options)


def saved(folder, case):
    """Return the last checkpoint of the run of which a rank died."""
    return str(folder / case / "out" / f"checkpoint-{LAST_STEP}")


def on_two(rank, store, folder):
    prepare(rank, 2)
    with joined(rank, store, 2) as save:
        results = {case: run(folder, case) for case in CASES}
        results |= {f"{case}, resumed": run(folder, case, resume=saved(folder, case)) for case in RESUMED}
        for case, (optim, options) in LOADED.items():
            results[case] = train(folder, optim, config_of(3, **FEW), loaded=folder / "model", **options)
        # A CPU may lack instructions for float16; torch computes without them.
        asked = "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported"
        with mock.patch(asked, return_value=True):
            results |= {case: record(folder, *values) for case, values in RECORDED.items()}
        save(results)


class Death(TrainerCallback):
    """End one rank in a step: the others wait for it in a collective."""

    def __init__(self, leave):
        self.leave = leave

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == LAST_STEP and args.process_index == 1:
            self.leave({})
            os._exit(0)


def on_two_of_which_one_dies(rank, store, folder, case):
    """The survivor says with what its run ended."""
    prepare(rank, 2)
    often = {"save_strategy": "steps", "save_steps": 1, "ddp_timeout": 20}
    with joined(rank, store, 2) as save:
        try:
            run(folder / case, case, callbacks=[Death(save)], **often)
        except RuntimeError as error:
            save({"error": str(error)})


def on_four(rank, store, folder):
    """Train on four, and try to go on from checkpoints of two."""
    prepare(rank, 4)
    with joined(rank, store, 4) as save:
        results = {case: run(folder, case) for case in ON_FOUR}
        for case in RESUMED:
            try:
                run(folder, case, resume=saved(folder, case))
            except Exception as error:
                results[f"{case}, resumed"] = str(error)
        save(results)

"""What ranks of `test_zero_trainer.py` do: runs of the Trainer under DeepSpeed, one after the other."""

import gc
import logging
import os
from unittest import mock

import torch
from rank_processes import announce_rank, joined
from transformers import TrainerCallback
from zero_runs import config_of, record, train


SWAN = {"optim_args": "lr_scale=0.2"}
CASES = {
    "swan, stage 0, accumulated": ("swan", 0, {**SWAN, "gradient_accumulation_steps": 2}),
    "swan, stage 1": ("swan", 1, SWAN),
    "sinkgd, stage 1, accumulated, not clipped": ("sinkgd", 1, {"gradient_accumulation_steps": 2, "max_grad_norm": 0}),
    "sinkgd, stage 2": ("sinkgd", 2, {}),
    "sinkgd, stage 3": ("sinkgd", 3, {}),
    "swan, stage 3, accumulated": ("swan", 3, {**SWAN, "gradient_accumulation_steps": 2}),
    "sinkgd, stage 3, not clipped": ("sinkgd", 3, {"max_grad_norm": 0.0}),
}
# A model that `zero.Init` has cut before the optimizer sees it, in parts of a few parameters.
LOADED = {"sinkgd, stage 3, loaded": ("sinkgd", {}), "swan, stage 3, loaded": ("swan", SWAN)}
FEW = {"sub_group_size": 3000, "stage3_param_persistence_threshold": 100}
ON_FOUR = {"swan, stage 2": ("swan", 2, SWAN), "sinkgd, stage 3": ("sinkgd", 3, {})}
RECORDED = {
    "sinkgd, stage 0, bf16": ("sinkgd", 0, torch.bfloat16),
    "swan, stage 1, bf16": ("swan", 1, torch.bfloat16),
    "sinkgd, stage 3, bf16": ("sinkgd", 3, torch.bfloat16),
    "swan, stage 1, fp16": ("swan", 1, torch.float16),
    "sinkgd, stage 2, fp16": ("sinkgd", 2, torch.float16),
    "swan, stage 3, fp16": ("swan", 3, torch.float16),
}
RESUMED = (2, 3)
LAST_STEP = 3  # of the rank that dies


def prepare(rank, world):
    """Let DeepSpeed run on CPU, in a process that torchrun has not started."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    announce_rank(rank, world)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it is compiled at the first use: a minute
    deepspeed.utils.logger.setLevel(logging.ERROR)
    gc.freeze()  # the collections of each run would go through all modules


def saved(folder, stage):
    """Return the last checkpoint of the run of which a rank died."""
    return str(folder / f"stage-{stage}" / "out" / f"checkpoint-{LAST_STEP}")


def on_two(rank, store, folder):
    prepare(rank, 2)
    with joined(rank, store, 2) as save:
        results = {
            case: train(folder, optim, config_of(stage), **options) for case, (optim, stage, options) in CASES.items()
        }
        for case, (optim, options) in LOADED.items():
            results[case] = train(folder, optim, config_of(3, **FEW), loaded=folder / "model", **options)
        for stage in RESUMED:
            results[f"resumed, stage {stage}"] = train(folder, "sinkgd", config_of(stage), resume=saved(folder, stage))
        # A CPU may lack instructions for float16; torch computes without them.
        with mock.patch("deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported", lambda self: True):
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


def on_two_of_which_one_dies(rank, store, folder, stage):
    """The survivor says with what its run ended."""
    prepare(rank, 2)
    often = {"save_strategy": "steps", "save_steps": 1, "ddp_timeout": 20}
    with joined(rank, store, 2) as save:
        try:
            train(folder / f"stage-{stage}", "sinkgd", config_of(stage), callbacks=[Death(save)], **often)
        except RuntimeError as error:
            save({"error": str(error)})


def on_four(rank, store, folder):
    """Train on four, and try to go on from checkpoints of two."""
    prepare(rank, 4)
    with joined(rank, store, 4) as save:
        results = {
            case: train(folder, optim, config_of(stage), **options)
            for case, (optim, stage, options) in ON_FOUR.items()
        }
        for stage in RESUMED:
            try:
                train(folder, "sinkgd", config_of(stage), resume=saved(folder, stage))
            except Exception as error:
                results[f"resumed, stage {stage}"] = str(error)
        save(results)

"""Trainers under DeepSpeed, started by torchrun: `python zero_worker.py FOLDER`; also the run of one process."""

import logging
import os
import sys
from pathlib import Path

import torch
from conftest import TINY_MODELS, VOCAB_SIZE
from distributed_models import weights_of
from transformers import Trainer, TrainingArguments


CASES = {
    "sinkgd, stage 2": ("sinkgd", 2, {}),
    "swan, stage 1": ("swan", 1, {"optim_args": "lr_scale=0.2"}),
    "sinkgd, stage 1, accumulated": ("sinkgd", 1, {"gradient_accumulation_steps": 2}),
    "sinkgd, stage 1, not clipped": ("sinkgd", 1, {"max_grad_norm": 0.0}),
}


def train(folder, optim, stage=None, batch_size=2, resume=None, **options):
    """Train 4 steps, under DeepSpeed if there is a stage; return the weights."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCAB_SIZE, (64, 12), generator=generator).tolist()
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {**dict.fromkeys(auto, "auto"), "zero_optimization": {"stage": stage}}
    args = TrainingArguments(
        f"{folder}/out",
        optim=optim,
        deepspeed=None if stage is None else config,
        max_steps=4,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    torch.manual_seed(0)
    trainer = Trainer(TINY_MODELS["llama"](), args, train_dataset=[{"input_ids": r, "labels": r} for r in rows])
    trainer.train(resume_from_checkpoint=resume)
    return weights_of(trainer.accelerator.unwrap_model(trainer.model))


def main(folder):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it is compiled at the first use: a minute
    deepspeed.utils.logger.setLevel(logging.ERROR)
    results = {case: train(folder, optim, stage, **options) for case, (optim, stage, options) in CASES.items()}
    saved = train(folder, "sinkgd", 2, save_strategy="steps", save_steps=2)
    resumed = train(folder, "sinkgd", 2, resume=f"{folder}/out/checkpoint-2")
    torch.save({**results, "saved": saved, "resumed": resumed}, Path(folder) / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1])

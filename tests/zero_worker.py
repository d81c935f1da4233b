"""Trainers under DeepSpeed, started by torchrun: `python zero_worker.py FOLDER`; also the run of one process."""

import logging
import os
import signal
import sys
from pathlib import Path

import torch
from conftest import TINY_MODELS, VOCAB_SIZE
from distributed_models import weights_of
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


CASES = {
    "sinkgd, stage 2": ("sinkgd", 2, {}),
    "swan, stage 1": ("swan", 1, {"optim_args": "lr_scale=0.2"}),
    "sinkgd, stage 1, accumulated": ("sinkgd", 1, {"gradient_accumulation_steps": 2}),
    "sinkgd, stage 1, not clipped": ("sinkgd", 1, {"max_grad_norm": 0.0}),
    "sinkgd, stage 0": ("sinkgd", 0, {}),
    "swan, stage 0, accumulated": ("swan", 0, {"optim_args": "lr_scale=0.2", "gradient_accumulation_steps": 2}),
    "sinkgd, stage 3": ("sinkgd", 3, {}),
    "swan, stage 3, accumulated": ("swan", 3, {"optim_args": "lr_scale=0.2", "gradient_accumulation_steps": 2}),
    "sinkgd, stage 3, not clipped": ("sinkgd", 3, {"max_grad_norm": 0.0}),
}
# A model that `zero.Init` has cut before the optimizer sees it, in parts of a few parameters.
LOADED = {"sinkgd, stage 3, loaded": ("sinkgd", {}), "swan, stage 3, loaded": ("swan", {"optim_args": "lr_scale=0.2"})}


def train(folder, optim, stage=None, batch_size=2, resume=None, loaded=None, callbacks=(), **options):
    """Train 4 steps, under DeepSpeed if there is a stage; return the weights."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCAB_SIZE, (64, 12), generator=generator).tolist()
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": stage, **({"sub_group_size": 3000, "stage3_param_persistence_threshold": 100} if loaded else {})}
    config = {**dict.fromkeys(auto, "auto"), "zero_optimization": zero}
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
    model = LlamaForCausalLM.from_pretrained(loaded) if loaded else TINY_MODELS["llama"]()
    rows = [{"input_ids": r, "labels": r} for r in rows]
    trainer = Trainer(model, args, train_dataset=rows, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if stage != 3:
        return weights_of(model)
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return weights_of(model)


def save_model(folder):
    torch.manual_seed(0)
    TINY_MODELS["llama"]().save_pretrained(folder)


class Death(TrainerCallback):
    """Kill one rank in a step: the others wait for it in a collective."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder, stage):
    train(folder, "sinkgd", stage, callbacks=[Death()], save_strategy="steps", save_steps=1, ddp_timeout=20)


def main(folder, die=None):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it is compiled at the first use: a minute
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if die:
        return killed(f"{folder}/killed{die}", int(die))
    results = {case: train(folder, optim, stage, **options) for case, (optim, stage, options) in CASES.items()}
    for case, (optim, options) in LOADED.items():
        results[case] = train(folder, optim, 3, loaded=f"{folder}/model", **options)
    for stage in (2, 3):
        if Path(folder, f"killed{stage}").exists():
            whole = max(Path(folder, f"killed{stage}", "out").glob("checkpoint-*/trainer_state.json")).parent
            results[f"after a death, stage {stage}"] = train(folder, "sinkgd", stage, resume=str(whole))
        here = f"{folder}/{stage}"
        results[f"saved, stage {stage}"] = train(here, "sinkgd", stage, save_strategy="steps", save_steps=2)
        resumed = train(here, "sinkgd", stage, resume=f"{here}/out/checkpoint-2")
        results[f"resumed, stage {stage}"] = resumed
    torch.save(results, Path(folder) / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])

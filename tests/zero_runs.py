"""Runs of the Trainer under DeepSpeed, and what one process makes of the same batches in plain torch."""

import copy
import math
from dataclasses import dataclass, field

import torch
from conftest import TINY_MODELS, VOCAB_SIZE
from distributed_models import weights_of
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hf_stateless import create_optimizer


STEPS = 20
RATES = {"lr": 1e-2, "weight_decay": 0.1}
HALF = {torch.float16: "fp16", torch.bfloat16: "bf16"}
IN_HALF = 6
"""Steps in half precision, each of which is compared by itself."""
SCALE, OVERFLOWS = 256.0, 1
"""Of losses in float16 at first, and the step in which the gradients of the last rank overflow there."""


def config_of(stage, dtype=torch.float32, **zero):
    """Return a config of DeepSpeed that leaves to the Trainer what that knows."""
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {**dict.fromkeys(auto, "auto"), "zero_optimization": {"stage": stage, **zero}}
    if dtype in HALF:
        config[HALF[dtype]] = {"enabled": "auto"}
    if dtype == torch.float16:
        config["fp16"] |= {"initial_scale_power": int(math.log2(SCALE)), "hysteresis": 1}
    return config


def trainer_of(folder, optim, config=None, *, kind=Trainer, loaded=None, batch_size=2, callbacks=(), **options):
    """Return a Trainer of 20 steps; DeepSpeed's with a config, and of the model in a folder where one is given."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCAB_SIZE, (64, 12), generator=generator).tolist()
    args = TrainingArguments(
        f"{folder}/out",
        optim=optim,
        deepspeed=config,
        per_device_train_batch_size=batch_size,
        learning_rate=RATES["lr"],
        weight_decay=RATES["weight_decay"],
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"max_steps": STEPS, "save_strategy": "no", **options},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(loaded) if loaded else TINY_MODELS["llama"]()
    rows = [{"input_ids": r, "labels": r} for r in rows]
    return kind(model, args, train_dataset=rows, callbacks=list(callbacks))


def train(*arguments, resume=None, **options):
    """Train, and return the weights; those that ZeRO-3 has cut are put together."""
    trainer = trainer_of(*arguments, **options)
    trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not any(hasattr(p, "ds_shape") for p in model.parameters()):
        return weights_of(model)
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return weights_of(model)


def save_model(folder):
    torch.manual_seed(0)
    TINY_MODELS["llama"]().save_pretrained(folder)


class Recorded(Trainer):
    """Keeps the tokens of each step, and the float32 weights before it; one rank overflows if it is told to."""

    overflows = math.inf

    def compute_loss(self, model, inputs, *args, **kwargs):
        spoiled = len(self.batches) == self.overflows and self.args.process_index == self.args.world_size - 1
        self.batches.append(inputs["input_ids"].clone())
        self.weights.append(self.masters())
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * math.inf if spoiled else loss

    def masters(self):
        """Return the weights that the optimizer has in the place of the model's, put together."""
        from deepspeed.utils import safe_get_full_fp32_param

        named, wrapper = dict(self.accelerator.unwrap_model(self.model).named_parameters()), self.optimizer.optimizer
        if not hasattr(wrapper, "fp32_groups"):
            return {name: safe_get_full_fp32_param(p).clone() for name, p in named.items()}
        pairs = zip(sum(wrapper.fp16_groups, []), sum(wrapper.fp32_groups, []), strict=True)  # noqa: RUF017
        copies = dict(pairs)
        return {name: copies[p].detach().clone() for name, p in named.items()}


def record(folder, optim, stage, dtype, **options):
    """Train in half precision; return the tokens of this rank and the float32 weights, before each step and after."""
    half = {HALF[dtype]: True, "lr_scheduler_type": "constant", "max_steps": IN_HALF}
    trainer = trainer_of(folder, optim, config_of(stage, dtype), kind=Recorded, **half, **options)
    trainer.batches, trainer.weights = [], []
    if dtype == torch.float16:
        trainer.overflows = OVERFLOWS
    trainer.train()
    return trainer.batches, [*trainer.weights, trainer.masters()]


@dataclass
class OneProcess:
    """Steps in half precision with float32 masters in plain torch, on the batches of all ranks."""

    optim: str
    dtype: torch.dtype
    options: dict = field(default_factory=dict)
    scale: float = 1.0

    def __post_init__(self):
        torch.manual_seed(0)
        self.master = TINY_MODELS["llama"]()
        self.model = copy.deepcopy(self.master)
        for p in self.model.parameters():
            p.data = p.data.to(self.dtype)
        self.optimizer = create_optimizer(self.master, self.optim, **RATES, **self.options)

    def step(self, of_ranks: list[Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Step from given weights: scale, average in half precision, unscale, clip, update; return the new ones."""
        params = list(self.model.parameters())
        for (name, m), p in zip(self.master.named_parameters(), params, strict=True):
            m.data.copy_(weights[name])
            p.data.copy_(weights[name])
        averages = [torch.zeros_like(p) for p in params]
        for tokens in of_ranks:
            loss = self.model(input_ids=tokens, labels=tokens).loss
            for average, grad in zip(averages, torch.autograd.grad(loss * self.scale, params), strict=True):
                average += grad / len(of_ranks)
        for m, average in zip(self.master.parameters(), averages, strict=True):
            m.grad = average.float() / self.scale
        torch.nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        self.optimizer.step()
        return weights_of(self.master)

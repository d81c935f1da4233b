"""One process of a distributed Trainer run, started by `accelerate launch`; what the tests of DDP and FSDP2 launch.

    accelerate launch --config_file CONFIG --num_processes 2 tests/distributed_worker.py FOLDER JOBS.json

Each job trains a tiny LLaMA of odd sizes; rank r leaves the weights of all jobs in FOLDER/r.pt.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path


if __name__ == "__main__":
    # A third of what a worker costs is importing: collections that find nothing, and bitsandbytes, which no job needs.
    gc.disable()
    sys.modules["bitsandbytes"] = None

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

import hf_stateless
from hf_stateless.trainer.optim_args import optimizer_names


VOCAB_SIZE = 101
BATCH = 4


def let_accelerate_shard_on_cpu():
    """Make accelerate use FSDP on the CPU, which it silently ignores: several CPU processes pass for several GPUs."""
    original = PartialState.__init__

    def init(self, cpu=False, **kwargs):
        original(self, cpu, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init
    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # memory cannot be pinned where there is no GPU


def odd_llama(dtype=torch.float32, layers=2, seed=0):
    """No size is a multiple of 2 or 4, except where rotary embeddings need it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=30,
        intermediate_size=37,
        num_hidden_layers=layers,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=10,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def odd_experts(dtype=torch.float32, seed=0):
    """Three experts, so that two ranks have stacks of different lengths; the head is tied."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        hidden_size=30,
        moe_intermediate_size=14,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=10,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=32,
        num_experts=3,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )
    config._experts_implementation = "eager"
    return Qwen3MoeForCausalLM(config).to(dtype)


def rows():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB_SIZE, (64, 11), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(job, folder, world):
    defaults = {
        "output_dir": str(Path(folder) / job.get("folder", "run")),
        "max_steps": 10,
        "per_device_train_batch_size": BATCH // world,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_timeout": 60,
    }
    chosen = {**defaults, **job["arguments"]}
    if chosen.get("optim") in optimizer_names():
        # Small steps: over many of them whitening amplifies the order in which ranks add up gradients.
        chosen["optim_args"] = ",".join(filter(None, [chosen.get("optim_args"), "lr_scale=0.2"]))
    return TrainingArguments(**chosen)


def die(rank, moment, after):
    """Kill the process of one rank once so many steps are done: in the next step's collective, or the checkpoint's."""
    if int(os.environ["RANK"]) != rank:
        return
    count, original_step, original_save = [0], hf_stateless.StatelessOptimizer.step, dist.checkpoint.save

    def step(self, *args, **kwargs):
        count[0] += 1
        if moment == "step" and count[0] > after:
            dist.all_reduce = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        return original_step(self, *args, **kwargs)

    def save(*args, **kwargs):
        if moment == "checkpoint" and count[0] > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original_save(*args, **kwargs)

    hf_stateless.StatelessOptimizer.step = step
    dist.checkpoint.save = save


def in_8_bits(model, job, folder):
    """Store a model in 8 bits; with `loaded` as who has a folder does it, with `lora` below adapters."""
    config = hf_stateless.Int8TrainingConfig(job["group_size"], embeddings=job.get("tables", False))
    if "loaded" in job:
        kind = {"experts_implementation": "eager"} if "experts" in job else {}  # which takes sizes that are odd
        model = AutoModelForCausalLM.from_pretrained(folder / job["loaded"], quantization_config=config, **kind)
    else:
        hf_stateless.quantize(model, config)
    if "lora" in job:
        targets = {"target_modules": job["lora"], "target_parameters": job.get("lora_experts")}
        model = peft.get_peft_model(model, peft.LoraConfig(**targets, r=2, init_lora_weights=False))
    return model


def train(job, folder, world=1):
    """Train as a job says; return the whole weights and the names of the sharded ones."""
    if "die" in job:
        die(job["die"]["rank"], job["die"]["in"], job["die"]["after"])
    own_seed = int(os.environ.get("RANK", 0)) if job.get("seed_of_rank") else 0
    make = odd_experts if job.get("experts") else odd_llama
    model = make(getattr(torch, job.get("dtype", "float32")), seed=own_seed)
    if "group_size" in job:
        model = in_8_bits(model, job, Path(folder))
    trainer = Trainer(model, arguments(job, folder, world), train_dataset=rows())
    resume = job.get("resume")
    if "report" in job:
        hf_stateless.attach_memory_report(trainer)
    trainer.train(resume_from_checkpoint=str(Path(folder) / resume) if resume else None)
    if "saved" in job:
        trainer.save_model(str(Path(folder) / job["saved"]))
    weights = {name.removeprefix("_orig_mod."): p.detach() for name, p in model.named_parameters()}
    sharded = [name for name, p in weights.items() if isinstance(p, DTensor)]
    if (sharded and "group_size" in job) or job.get("experts"):  # what a weight in 8 bits is made of
        weights = get_model_state_dict(model)
    whole = {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in weights.items()}
    state = trainer.optimizer.optimizer.state if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer.state
    shapes = sorted({tuple(t.shape) for of_p in state.values() for t in of_p.values()})
    split = trainer.optimizer.param_groups[0].get("split_whitening")
    norms = [t for of_p in state.values() for name, t in of_p.items() if name == "recent_norms"]
    state = {"state_shapes": shapes, "split": split, "norms": norms}
    return {"weights": whole, "sharded": sharded, "world": world, **state}


def forget_accelerate():
    """Let the next Trainer of this process read the environment again."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def main():
    gc.freeze()  # as in conftest.py
    gc.enable()
    folder, jobs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_accelerate_shard_on_cpu()
    environment = {name: value for name, value in os.environ.items() if name.startswith("FSDP_")}
    results = {}
    for name, job in jobs.items():
        forget_accelerate()
        os.environ.update({**environment, **job.get("environment", {})})
        results[name] = train(job, folder, world)
        assert PartialState().num_processes == world
    torch.save(results, Path(folder) / f"{rank}.pt")
    if world > 1:
        assert dist.get_world_size() == world
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo now and then abort a process that ends in the ordinary way


if __name__ == "__main__":
    main()

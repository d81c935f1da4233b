"""How a case of `bits.py` is trained: in processes of its own, one for each rank."""

import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from bits_models import TWO_RANKS, Case, batch, make_model, rows
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_callback import PrinterCallback

import hf_stateless


LR = 3e-3
LIMIT = 180  # seconds that a case may take
WEAK = 1 / 64  # factor on the loss of a step that `min_signal` holds back
# Keyword arguments of `create_optimizer` that are arguments of their own in a Trainer.
ARGUMENTS = {"weight_decay": "weight_decay", "target_modules": "optim_target_modules"}
# What `accelerate launch` sets for FSDP2.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
FULL = StateDictOptions(full_state_dict=True)


def whole(value: Any) -> Any:
    """Return a copy of nested dictionaries and lists with tensors that are whole and share no memory."""
    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(each) for each in value)
    if isinstance(value, DTensor):
        return value.full_tensor().clone()
    return value.detach().clone() if isinstance(value, Tensor) else value


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all weights; of 8-bit layers, codes and scales."""
    return whole({name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()})


def make_optimizer(case: Case, model: nn.Module) -> hf_stateless.StatelessOptimizer:
    """Return the optimizer of a case that has no Trainer."""
    if "groups" in case.options:
        left, groups = list(model.parameters()), []
        for group in case.options["groups"]:
            options = {key: value for key, value in group.items() if key not in ("shapes", "turned", "cut")}
            groups.append({"params": [left.pop(0) for _ in group["shapes"]], **options})
        return hf_stateless.StatelessOptimizer(groups, lr=LR)
    create = hf_stateless.create_lora_optimizer if case.way == "lora" else hf_stateless.create_optimizer
    return create(model, case.optimizer, lr=LR, **case.options)


def spoil(case: Case, model: nn.Module, step: int) -> None:
    """Spoil the gradients of some matrices in a step before the state is saved, and in one after it."""
    if not case.spoil or step not in (case.middle - 2, case.steps - 1):
        return
    for name, p in model.named_parameters():
        if "q_proj" in name and p.requires_grad and case.spoil == "nan":
            p.grad.view(-1)[1] = float("nan")
        elif "q_proj" in name and p.requires_grad:
            p.grad = None if case.spoil == "missing" else torch.zeros_like(p)


def shard_weights(case: Case, model: nn.Module) -> None:
    """Cut the weights of groups made by hand over the ranks, each along the dimension that its group names."""
    mesh, first = init_device_mesh("cpu", (dist.get_world_size(),)), 0
    for group in case.options["groups"]:
        placement = Replicate() if group["cut"] is None else Shard(group["cut"])
        for i in range(first, first + len(group["shapes"])):
            model.weights[i] = nn.Parameter(distribute_tensor(model.weights[i].detach(), mesh, [placement]))
        first += len(group["shapes"])


def load_state(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the optimizer's state, whose tensors are whole."""
    if case.way == "fsdp2":
        set_optimizer_state_dict(model, optimizer, state, options=FULL)
        return
    if case.way == "sharded":
        params = [p for group in optimizer.param_groups for p in group["params"]]
        parts = {
            i: {
                name: distribute_tensor(t, params[i].device_mesh, params[i].placements) if t.numel() > 1 else t
                for name, t in of_p.items()
            }
            for i, of_p in state["state"].items()
        }
        state = {**state, "state": parts}
    optimizer.load_state_dict(state)


def saved_state(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a copy of the optimizer's state with whole tensors."""
    by_name = case.way == "fsdp2"
    return whole(get_optimizer_state_dict(model, optimizer, options=FULL) if by_name else optimizer.state_dict())


def train_by_hand(case: Case, folder: Path, rank: int, old: Path | None) -> dict[str, Any]:
    """Train without a Trainer, from the beginning or from what an older run saved."""
    saved = torch.load(old / f"{rank}.pt", weights_only=True) if old else None
    model = make_model(case)
    if saved:
        model.load_state_dict(saved["middle"])
    if case.way == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if case.way == "sharded":
        shard_weights(case, model)
    later = replace(case, options={**case.options, **case.then})
    optimizer = make_optimizer(later if saved else case, model)
    called = DistributedDataParallel(model) if case.way == "ddp" else model
    if saved:
        load_state(case, model, optimizer, saved["state"])
    result: dict[str, Any] = {}
    for step in range(case.middle if saved else 0, case.steps):
        weak = WEAK if step in (case.middle - 2, case.steps - 1) else 1.0
        for part in range(case.accumulate):
            seed = 100 * step + 10 * part + rank
            torch.manual_seed(seed)
            output = called(**batch(case, seed))
            with optimizer.hold() if part < case.accumulate - 1 else contextlib.nullcontext():
                ((output if isinstance(output, Tensor) else output.loss) * weak).backward()
        spoil(case, model, step)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == case.middle:
            result = {"middle": weights_of(model), "state": saved_state(case, model, optimizer)}
            if case.then:
                optimizer = make_optimizer(later, model)
                load_state(case, model, optimizer, whole(result["state"]))
    return {**result, "final": weights_of(model)}


class KeepTheMiddle(transformers.TrainerCallback):
    """Copies weights and optimizer state of a Trainer when the checkpoint is due."""

    def __init__(self, case: Case, result: dict[str, Any]) -> None:
        self.case, self.result = case, result

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy them."""
        if state.global_step == self.case.middle:
            # Each rank has the state of its own parts.
            of_parameters = kwargs["optimizer"].state_dict()["state"]
            self.result |= {"middle": weights_of(kwargs["model"]), "state": {"state": whole(of_parameters)}}


def as_text(value: Any) -> str:
    """Return an option as it is written in `optim_args`."""
    return "+".join(value) if isinstance(value, list) else str(value)


def train_by_trainer(case: Case, folder: Path, rank: int, old: Path | None) -> dict[str, Any]:
    """Train with a Trainer, from the beginning or from the checkpoint that an older run left in its folder."""
    if case.way == "trainer_fsdp2":
        let_accelerate_shard_on_cpu()
    options = {key: value for key, value in case.options.items() if key not in ARGUMENTS}
    arguments = {ARGUMENTS[key]: value for key, value in case.options.items() if key in ARGUMENTS}
    by_name = not case.optimizer.endswith("Factory")
    if by_name:
        optim_args = ",".join(f"{key}={as_text(value)}" for key, value in options.items())
        arguments |= {"optim": case.optimizer, "optim_args": optim_args or None}
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=case.steps,
        save_strategy="steps",
        save_steps=case.middle,
        per_device_train_batch_size=2,
        learning_rate=LR,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_timeout=LIMIT,
        **arguments,
        **case.trainer,
    )
    model, result = make_model(case), {}
    factory = (
        {} if by_name else {"optimizer_cls_and_kwargs": (getattr(hf_stateless, case.optimizer), {"lr": LR, **options})}
    )
    callbacks = [KeepTheMiddle(case, result)]
    trainer = transformers.Trainer(model, args, train_dataset=rows(), callbacks=callbacks, **factory)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(old / f"checkpoint-{case.middle}") if old else None)
    result["final"] = weights_of(trainer.model)
    if case.way in TWO_RANKS:
        dist.barrier()
    if rank == 0:
        shutil.rmtree(folder / f"checkpoint-{case.steps}", ignore_errors=True)
    return result


def call_function(case: Case, folder: Path, rank: int, old: Path | None) -> dict[str, Any]:
    """Normalise some matrices with the function, which has no state."""
    final = {}
    for shape in ((9, 14), (14, 9), (1, 7), (7, 1), (2, 3, 5, 8), (256, 260)):
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            generator = torch.Generator().manual_seed(sum(shape))
            grad = torch.randn(shape, dtype=torch.float64, generator=generator).to(getattr(torch, dtype))
            final[f"{shape} {dtype}"] = hf_stateless.multi_normalize(grad, num_iterations=2, **case.options)
    return {"final": final}


def load_in_8_bits(case: Case, folder: Path, rank: int, old: Path | None) -> dict[str, Any]:
    """Quantise a model while it is loaded, and turn it back."""
    with tempfile.TemporaryDirectory() as saved:
        make_model(case).save_pretrained(saved)
        config = hf_stateless.Int8TrainingConfig(**case.options)
        model = transformers.AutoModelForCausalLM.from_pretrained(saved, quantization_config=config)
        loaded = weights_of(model)
        return {"final": {"loaded": loaded, "float": weights_of(hf_stateless.dequantize(model))}}


def let_accelerate_shard_on_cpu() -> None:
    """Make accelerate use FSDP on the CPU, which it silently ignores: CPU processes pass for several GPUs."""
    original = PartialState.__init__

    def init(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
        original(self, cpu, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init
    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # memory cannot be pinned where there is no GPU


WAYS: dict[str, Callable[[Case, Path, int, Path | None], dict[str, Any]]] = {
    **dict.fromkeys(("create", "lora", "groups", "ddp", "fsdp2", "sharded"), train_by_hand),
    **dict.fromkeys(("trainer", "trainer_ddp", "trainer_fsdp2"), train_by_trainer),
    "function": call_function,
    "quantized": load_in_8_bits,
}


def run_rank(case: Case, folder: Path, rank: int, old: Path | None, store: str) -> None:
    """Run a case in this process, which is one of its ranks, and end the process."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ |= case.environment
    try:
        if case.way in TWO_RANKS:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **(FSDP2 if case.way == "trainer_fsdp2" else {})}
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        result = WAYS[case.way](case, folder, rank, old)
    except BaseException as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}".replace(str(folder), "FOLDER")}
    torch.save(result, folder / f"{rank}.pt")
    sys.stdout.flush()
    os._exit(0)  # threads of gloo now and then abort a process that ends in the ordinary way


def run_case(case: Case, folder: Path, old: Path | None = None) -> None:
    """Run a case in processes of its own; each rank leaves its result in the folder of the case."""
    here = folder / case.name
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    fork = multiprocessing.get_context("fork")
    ranks = ranks_of(case)
    with tempfile.TemporaryDirectory() as store:
        arguments = [(case, here, rank, old and old / case.name, f"{store}/store") for rank in ranks]
        processes = [fork.Process(target=run_rank, args=each) for each in arguments]
        for process in processes:
            process.start()
        end = time.monotonic() + LIMIT
        for rank, process in zip(ranks, processes, strict=True):
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
            if not (here / f"{rank}.pt").exists():
                torch.save({"error": f"The process ended with {process.exitcode}."}, here / f"{rank}.pt")


def ranks_of(case: Case) -> range:
    """Return the ranks of a case."""
    return range(2 if case.way in TWO_RANKS else 1)

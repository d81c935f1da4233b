"""What the processes of `test_int8_sharded.py` do: small models of 8-bit layers, cut by FSDP2 or whole."""

import copy
import gc
import os
import signal
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from int8_held_ranks import OwnExperts, held, hold_all
from rank_checkpoints import FULL, load_full, load_sharded, save_full, save_sharded, whole_state
from rank_processes import errors_of, joined
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stateless import PRESETS, StatelessOptimizer
from hf_stateless.ranks import ways
from hf_stateless.weights.int8.linear import Int8Linear
from hf_stateless.weights.int8.sharded import shard_of
from hf_stateless.weights.int8.weight import Int8Weight


# Rows that no number of ranks divides, fewer rows than ranks, one row, groups of one and of several in a row.
SHAPES = {
    "uneven": (37, 64, 32),
    "twin": (37, 64, 32),
    "short": (3, 48, 16),
    "row": (1, 40, None),
    "even": (64, 32, 16),
}
BATCH, STEPS, SAVED_AT = 16, 4, 2
FLOAT_MOMENTUM = {"momentum": 0.5, "momentum_dtype": "float32"}
# What is trained how: name, dtype that weights and gradients count as, options of the optimizer, of fully_shard.
CASES = {
    "swan": ("swan", torch.float32, {}, {}),
    "sinkgd": ("sinkgd", torch.float32, {}, {}),
    "sinkgd_polar": ("sinkgd_polar", torch.float32, {}, {}),
    "in bfloat16": ("swan", torch.bfloat16, {}, {}),
    "to nearest": ("swan", torch.float32, {"stochastic_rounding": False}, {}),
    "with momentum": ("swan", torch.float32, FLOAT_MOMENTUM, {}),
    "with feedback": ("swan", torch.float32, {**FLOAT_MOMENTUM, "rounding_feedback": True}, {}),
    "layer-wise": ("sinkgd_polar", torch.float32, {"release": "matrices"}, {}),
    "kept gathered": ("swan", torch.float32, {}, {"reshard_after_forward": False}),
    "offloaded": ("swan", torch.float32, {}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
}


class Parallel(nn.Module):
    """Layers side by side, whose gradients do not depend on the weights: sums of small whole numbers, so exact."""

    def __init__(self, dtype=torch.float32, make=None):
        super().__init__()
        torch.manual_seed(0)
        plain = {
            name: nn.Linear(columns, rows, bias=False, dtype=dtype) for name, (rows, columns, _) in SHAPES.items()
        }
        make = make or (lambda name, layer: Int8Linear.from_float(layer, SHAPES[name][2]))
        self.layers = nn.ModuleDict({name: make(name, layer) for name, layer in plain.items()})

    def forward(self, batch):
        return sum((layer(batch[name][0]) * batch[name][1]).sum() for name, layer in self.layers.items())


def batch(step, rank=0, ranks=1, dtype=torch.float32):
    """Return this rank's part of the samples of one step: whole numbers from -2 to 2."""
    made = {}
    for i, (name, (rows, columns, _)) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(100 * step + i)
        both = [torch.randint(-2, 3, (BATCH, size), generator=generator).to(dtype) for size in (columns, rows)]
        made[name] = [t[rank * BATCH // ranks :][: BATCH // ranks] for t in both]
    return made


def optimizer_of(model, name, release=None, **options):
    params = [p for p in model.parameters() if p.requires_grad]
    group = {"params": params, "algorithm": "multinorm", "weight_decay": 0.1, **PRESETS[name].group(), **options}
    return StatelessOptimizer([group], lr=0.1, release=release)


def steps(model, optimizer, first=0, last=STEPS, rank=0, ranks=1, averaged_over=1):
    """Take steps; on one process with the gradient that FSDP2 averages over so many."""
    dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
    optimizer.train()
    for step in range(first, last):
        (model(batch(step, rank, ranks, dtype)) / averaged_over).backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded(model, mesh=None, **options):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in list(model.layers.values())[:-1]:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def alone(case, world):
    name, dtype, options, _ = CASES[case]
    model = Parallel(dtype)
    steps(model, optimizer_of(model, name, **options), averaged_over=world)
    return copy.deepcopy(model.state_dict())


def worker(world, shared, rank, folder):
    """Do everything that needs several processes, and save what came of it."""
    with joined(rank, folder, world) as save:
        results = {}
        for case, (name, dtype, options, of_shard) in CASES.items():
            model = sharded(Parallel(dtype), **of_shard)
            steps(model, optimizer_of(model, name, **options), rank=rank, ranks=world)
            results[case] = whole_state(model)
        results |= checkpoints(Path(shared), rank, world)
        results["memory"] = memory()
        results["traffic"] = traffic(rank, world)
        results["refusals"] = refusals()
        results["held"] = held(shared, rank, world, Sent)
        if world == 4:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            model = sharded(Parallel(), mesh)
            steps(model, optimizer_of(model, "swan"), rank=rank, ranks=world)
            results["hybrid"] = whole_state(model)
        save(results)


def checkpoints(shared, rank, world):
    """Train to the middle, save FULL and SHARDED, and go on from the checkpoints of every number of ranks so far."""
    model = sharded(Parallel())
    optimizer = optimizer_of(model, "swan")
    steps(model, optimizer, last=SAVED_AT, rank=rank, ranks=world)
    parts = save_sharded(model, optimizer, shared / f"sharded{world}")
    assert {type(t) for t in parts.values()} == {DTensor}
    save_full(model, optimizer, shared / f"full{world}.pt")
    results = {}
    for before in (2, 4)[: 1 + (world == 4)]:
        model = sharded(Parallel())
        for layer in model.layers.values():
            shard_of(layer.weight).codes.zero_()
        optimizer = optimizer_of(model, "swan")
        load_sharded(model, optimizer, shared / f"sharded{before}")
        steps(model, optimizer, first=SAVED_AT, rank=rank, ranks=world)
        results[f"SHARDED of {before}"] = whole_state(model)
        model = sharded(Parallel().to("meta"))
        optimizer = load_full(model, lambda model: optimizer_of(model, "swan"), shared / f"full{before}.pt")
        steps(model, optimizer, first=SAVED_AT, rank=rank, ranks=world)
        results[f"FULL of {before}"] = whole_state(model)
    return results


def memory():
    """Return the bytes that a rank keeps of the weights, and how many of the whole ones are still there."""
    model = Parallel()
    whole = [weakref.ref(layer.weight) for layer in model.layers.values()]
    model = sharded(model)
    gc.collect()
    parts = [layer.weight_scale.to_local() for layer in model.layers.values()]
    parts += [shard_of(layer.weight).codes for layer in model.layers.values()]
    kept = sum(part.untyped_storage().nbytes() for part in parts)
    return {"kept": kept, "alive": sum(ref() is not None for ref in whole)}


class Sent(TorchDispatchMode):
    """Counts the bytes that FSDP2 gives to its collectives."""

    def __init__(self):
        super().__init__()
        self.bytes = {"gathered": 0, "reduced": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        kind = {"_allgather_base_": "gathered", "_reduce_scatter_base_": "reduced"}.get(name)
        if kind:
            self.bytes[kind] += args[1].nbytes
        return func(*args, **(kwargs or {}))


def traffic(rank, world):
    """Return the bytes that one step gives to the collectives of FSDP2, in 8 bits and in bf16."""
    counts = {}
    for kind, make in {"int8": None, "bf16": lambda name, layer: layer}.items():
        model = sharded(Parallel(torch.bfloat16, make))
        with Sent() as sent:
            model(batch(0, rank, world, torch.bfloat16)).backward()
        counts[kind] = sent.bytes
    return counts


def refusals():
    """Return the errors of what cannot work."""
    half = MixedPrecisionPolicy(param_dtype=torch.float16)
    stack = nn.Module()
    stack.experts = Int8Weight(torch.zeros(4, 6, 8, dtype=torch.int8), torch.ones(4, 6, 1, dtype=torch.bfloat16))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    halves = hold_all(OwnExperts(3, 8, 16, torch.float32))
    given = torch.ones(1, 3, 16, dtype=torch.float16), torch.ones(1, 3, 8, dtype=torch.float16)
    model = sharded(Parallel())
    spoilt = {n: torch.ones_like(t) if t.dtype == torch.int8 else t for n, t in Parallel().state_dict().items()}
    acts = {
        "columns": lambda: sharded(Parallel(), shard_placement_fn=lambda p: Shard(1)),
        "stack": lambda: fully_shard(stack, mesh=mesh, shard_placement_fn=lambda p: Shard(1)),
        "float16 stack": lambda: fully_shard(halves, mesh=mesh, mp_policy=half)(*given),
        "float16": lambda: sharded(Parallel(), mp_policy=half)(batch(0)),
        "not gathered": lambda: model.layers["even"](torch.ones(1, 32)),
        "read as floats": lambda: model.layers["even"].weight.float().sum(),
        "written as floats": lambda: shard_of(model.layers["even"].weight).copy_(torch.ones(64, 32)),
        "float copy": lambda: model.layers["even"].to_float(torch.float32),
        "whole state": lambda: model.load_state_dict(Parallel().state_dict()),
        "damaged": lambda: set_model_state_dict(model, spoilt, options=FULL),
    }
    return errors_of(acts)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def killed(world, moment, shared, rank, folder):
    """Save in the middle; the last rank kills itself in the step after that, or as it writes the next checkpoint."""
    with joined(rank, folder, world):
        model = sharded(Parallel())
        optimizer = optimizer_of(model, "swan")
        steps(model, optimizer, last=SAVED_AT, rank=rank, ranks=world)
        save_sharded(model, optimizer, Path(shared) / "killed")
        if rank == world - 1 and moment == "step":
            ways.whole_tensor = die
        steps(model, optimizer, first=SAVED_AT, rank=rank, ranks=world)
        if rank == world - 1:
            write = FileSystemWriter.write_data
            FileSystemWriter.write_data = lambda *given: die(write(*given))
        save_sharded(model, optimizer, Path(shared) / "half written")


def resumed(world, shared, rank, folder):
    with joined(rank, folder, world) as save:
        model = sharded(Parallel())
        optimizer = optimizer_of(model, "swan")
        load_sharded(model, optimizer, Path(shared) / "killed")
        steps(model, optimizer, first=SAVED_AT, rank=rank, ranks=world)
        save(whole_state(model))

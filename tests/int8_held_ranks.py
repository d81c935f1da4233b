"""What the processes of `test_int8_sharded.py` do with stacks of experts and tables in 8 bits, cut by FSDP2 or whole."""

import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_stateless import PRESETS, StatelessOptimizer
from hf_stateless.weights.int8.convert import int8_weights
from hf_stateless.weights.int8.holder import hold
from hf_stateless.weights.int8.sharded import shard_of
from hf_stateless.weights.int8.tables import finish_tables


# (experts, rows, columns): experts that no number of ranks divides, fewer than ranks, one alone.
STACKS = {"uneven": (5, 12, 16), "short": (3, 8, 24), "one": (1, 16, 8)}
TOKENS, FEATURES, GROUP = 37, 16, 8
BATCH, STEPS, SAVED_AT = 16, 4, 2
FULL = StateDictOptions(full_state_dict=True)
MOMENTUM = {"momentum": 0.5, "momentum_dtype": "float32"}
# What is trained how: name, dtype that weights and gradients count as, rule of the tables, options, tied or not.
CASES = {
    "swan, factored": ("swan", torch.float32, "factored", {}, True),
    "sinkgd, rows": ("sinkgd", torch.float32, "row_moment", {}, False),
    "bfloat16, columns": ("swan", torch.bfloat16, "column_moment", {}, True),
    "momentum, stateless": ("swan", torch.float32, "multinorm", MOMENTUM, False),
}
RELEASED = {"layer-wise": ("sinkgd", torch.float32, "factored", {"release": "all"}, True)}


class OwnExperts(nn.Module):
    """Two stacks that lie in both ways, with a bias, in the module's own code."""

    def __init__(self, experts, rows, columns, dtype):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, rows, columns).to(dtype))
        self.down = nn.Parameter(torch.randn(experts, columns, rows).to(dtype))
        self.bias = nn.Parameter(torch.zeros(experts, rows, dtype=dtype))

    def forward(self, x, y):
        up = torch.einsum("bec,erc->ber", x, self.up) + self.bias
        return (up * y).sum() + (torch.einsum("bec,ecr->ber", x, self.down) * y).sum()


class Held(nn.Module):
    """Stacks, an embedding and a head side by side, whose gradients are small whole numbers, so exact."""

    def __init__(self, dtype=torch.float32, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.stacks = nn.ModuleDict({name: OwnExperts(*sizes, dtype) for name, sizes in STACKS.items()})
        self.embedding = nn.Embedding(TOKENS, FEATURES, dtype=dtype)
        self.head = nn.Linear(FEATURES, TOKENS, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embedding.weight
        for stack in self.stacks.values():
            for name in ("up", "down"):
                hold(stack, name, GROUP)
        finish_tables({"embedding": self.embedding, "head": self.head}, GROUP)

    def forward(self, batch):
        loss = sum(stack(*batch[name]) for name, stack in self.stacks.items())
        tokens, of_rows, x, y = batch["tables"]
        return loss + (self.embedding(tokens) * of_rows).sum() + (self.head(x) * y).sum()


def batch(step, rank=0, ranks=1, dtype=torch.float32):
    """Return this rank's part of the samples of one step; the last expert of each stack gets nothing now and then."""
    generator = torch.Generator().manual_seed(step)

    def whole(*sizes, low=-2, high=3):
        return torch.randint(low, high, (BATCH, *sizes), generator=generator)

    made = {name: [whole(e, columns), whole(e, rows)] for name, (e, rows, columns) in STACKS.items()}
    for x, y in made.values():
        x[:, -1] *= step % 2
    tokens = whole(3, low=0, high=TOKENS)
    made["tables"] = [tokens, whole(3, FEATURES), whole(FEATURES), whole(TOKENS)]
    part = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    return {n: [t[part] if t is tokens else t[part].to(dtype) for t in tensors] for n, tensors in made.items()}


def optimizer_of(model, name, table, options):
    options, tables = dict(options), {id(model.embedding.weight), id(model.head.weight)}
    release = options.pop("release", None)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    of_matrices = {"algorithm": "multinorm", "weight_decay": 0.1, **PRESETS[name].group(), **options}
    of_tables = {**of_matrices} if table == "multinorm" else {"algorithm": table, "weight_decay": 0.1}
    groups = [
        {"params": [p for n, p in trained if n.endswith(".up")], **of_matrices},
        {"params": [p for n, p in trained if n.endswith(".down")], **of_matrices, "layout": "in_out"},
        {"params": [p for _, p in trained if id(p) in tables], **of_tables},
        {"params": [p for n, p in trained if n.endswith(".bias")], "algorithm": "adamw"},
    ]
    return StatelessOptimizer(groups, lr=0.1, release=release)


def steps(model, optimizer, first=0, last=STEPS, rank=0, ranks=1, averaged_over=1):
    dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
    optimizer.train()
    for step in range(first, last):
        (model(batch(step, rank, ranks, dtype)) / averaged_over).backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded(model, mesh=None):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for stack in list(model.stacks.values())[:-1]:
        fully_shard(stack, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def alone(case, world, before=None):
    """Return what one process ends with: gradients are those of an average over ranks, at first of another number."""
    name, dtype, table, options, tied = {**CASES, **RELEASED}[case]
    model = Held(dtype, tied)
    optimizer = optimizer_of(model, name, table, options)
    steps(model, optimizer, last=SAVED_AT, averaged_over=before or world)
    steps(model, optimizer, first=SAVED_AT, averaged_over=world)
    return copy.deepcopy(model.state_dict())


def whole_state(model):
    return {name: t.clone() for name, t in get_model_state_dict(model, options=FULL).items()}


def held(shared, rank, world):
    """Return what stacks and tables have become, by case."""
    results = {}
    for case, (name, dtype, table, options, tied) in {**CASES, **RELEASED}.items():
        model = sharded(Held(dtype, tied))
        steps(model, optimizer_of(model, name, table, options), rank=rank, ranks=world)
        results[case] = whole_state(model)
    for case, (name, dtype, table, options, tied) in CASES.items():
        model = Held(dtype, tied)
        optimizer = optimizer_of(model, name, table, {**options, "split_whitening": True})
        steps(DistributedDataParallel(model), optimizer, rank=rank, ranks=world)
        results[f"DDP {case}"] = copy.deepcopy(model.state_dict())
    return results | checkpoints(Path(shared), rank, world)


def checkpoints(shared, rank, world):
    """Train to the middle, save FULL and SHARDED, and go on from the checkpoints of every number of ranks so far."""
    name, _, table, options, _ = CASES["swan, factored"]
    model = sharded(Held())
    optimizer = optimizer_of(model, name, table, options)
    steps(model, optimizer, last=SAVED_AT, rank=rank, ranks=world)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=shared / f"held{world}")
    full = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(full, shared / f"held{world}.pt")
    dist.barrier()
    results = {}
    for before in (2, 4)[: 1 + (world == 4)]:
        model = sharded(Held())
        for p in model.parameters():
            if shard_of(p) is not None:
                shard_of(p).codes.zero_()
        optimizer = optimizer_of(model, name, table, options)
        of_model, of_optimizer = get_state_dict(model, optimizer)
        state = {"model": of_model, "optimizer": of_optimizer}
        dcp.load(state, checkpoint_id=shared / f"held{before}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        steps(model, optimizer, first=SAVED_AT, rank=rank, ranks=world)
        results[f"SHARDED of {before}"] = whole_state(model)
        for kind, start in {"FULL": Held().to("meta"), "FULL on the device": Held()}.items():
            model = sharded(start)
            options_ = StateDictOptions(full_state_dict=True, broadcast_from_rank0=kind == "FULL")
            empty = kind == "FULL" and rank > 0
            of_model, of_optimizer = ({}, {}) if empty else torch.load(shared / f"held{before}.pt")
            set_model_state_dict(model, of_model, options=options_)
            optimizer = optimizer_of(model, name, table, options)
            set_optimizer_state_dict(model, optimizer, of_optimizer, options=options_)
            steps(model, optimizer, first=SAVED_AT, rank=rank, ranks=world)
            results[f"{kind} of {before}"] = whole_state(model)
    return results

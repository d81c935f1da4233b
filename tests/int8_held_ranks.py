"""What the processes of `test_int8_sharded.py` do with stacks of experts and tables in 8 bits, cut or whole."""

import copy
import math
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rank_checkpoints import load_full, load_sharded, save_full, save_sharded, whole_state
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_stateless import PRESETS, StatelessOptimizer
from hf_stateless.weights.int8.codes import stored_length
from hf_stateless.weights.int8.holder import hold
from hf_stateless.weights.int8.sharded import shard_of
from hf_stateless.weights.int8.tables import finish_tables


# (experts, rows, columns): experts that no number of ranks divides, fewer than ranks, one alone.
STACKS = {"uneven": (5, 12, 16), "short": (3, 8, 24), "one": (1, 16, 8)}
TOKENS, FEATURES, GROUP = 37, 16, 8
BATCH, STEPS, SAVED_AT = 16, 4, 2
MOMENTUM = {"momentum": 0.5, "momentum_dtype": "float32"}
# What is trained how: name, dtype that weights and gradients count as, rule of the tables, options, tied or not.
CASES = {
    "swan, factored": ("swan", torch.float32, "factored", {}, True),
    "sinkgd, rows": ("sinkgd", torch.float32, "row_moment", {}, False),
    "bfloat16, columns": ("swan", torch.bfloat16, "column_moment", {}, True),
    "not finite": ("sinkgd", torch.float32, "factored", {}, True),
    "momentum, stateless": ("swan", torch.float32, "multinorm", MOMENTUM, False),
}
REPLICATED = ["swan, factored", "bfloat16, columns"]
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


def hold_all(stack):
    """Store both stacks of a module in 8 bits."""
    for name in ("up", "down"):
        hold(stack, name, GROUP)
    return stack


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
            hold_all(stack)
        finish_tables({"embedding": self.embedding, "head": self.head}, GROUP)

    def forward(self, batch):
        loss = sum(stack(*batch[name]) for name, stack in self.stacks.items())
        tokens, of_rows, x, y = batch["tables"]
        return loss + (self.embedding(tokens) * of_rows).sum() + (self.head(x) * y).sum()


def batch(step, rank=0, ranks=1, dtype=torch.float32, spoilt=False):
    """Return this rank's part of the samples of one step; the last expert of each stack gets nothing now and then.

    Where they are spoilt, the gradient of one expert is once not finite.
    """
    generator = torch.Generator().manual_seed(step)

    def whole(*sizes, low=-2, high=3):
        return torch.randint(low, high, (BATCH, *sizes), generator=generator)

    made = {name: [whole(e, columns), whole(e, rows)] for name, (e, rows, columns) in STACKS.items()}
    for x, _ in made.values():
        x[:, -1] *= step % 2
    tokens = whole(3, low=0, high=TOKENS)
    if spoilt and step == 1:
        made["uneven"][0] = made["uneven"][0].float()
        made["uneven"][0][:, 0] = math.inf
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


def steps(model, optimizer, first=0, last=STEPS, rank=0, ranks=1, averaged_over=1, spoilt=False):
    dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
    optimizer.train()
    for step in range(first, last):
        (model(batch(step, rank, ranks, dtype, spoilt)) / averaged_over).backward()
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
    spoilt = case == "not finite"
    steps(model, optimizer, last=SAVED_AT, averaged_over=before or world, spoilt=spoilt)
    steps(model, optimizer, first=SAVED_AT, averaged_over=world)
    return copy.deepcopy(model.state_dict())


def part_bytes(world):
    """Count the bytes of a rank's part of the codes and scales: parts are as long as the longest."""
    stacks = sum(-(-experts // world) * weight_bytes(rows, columns) for experts, rows, columns in STACKS.values())
    return stacks + table_bytes(world)


def weight_bytes(rows, columns):
    """Count the bytes of two matrices that lie in both ways, with a bfloat16 scale for each group of a row."""
    groups = rows * (columns // stored_length(columns, GROUP)) + columns * (rows // stored_length(rows, GROUP))
    return 2 * rows * columns + 2 * groups


def table_bytes(world):
    return -(-TOKENS // world) * (FEATURES + FEATURES // GROUP * 2)


def gathered_bytes(world):
    """Count what a rank gives to the all-gathers of a step: twice, but for what the root holds; biases in float32."""
    of_stacks = {
        name: -(-experts // world) * (weight_bytes(rows, columns) + 4 * rows)
        for name, (experts, rows, columns) in STACKS.items()
    }
    kept = of_stacks.pop(list(STACKS)[-1]) + table_bytes(world)
    return 2 * sum(of_stacks.values()) + kept


def held(shared, rank, world, sent):
    """Return what stacks and tables have become, by case.

    Args:
        shared: a folder of all ranks.
        rank: of this process.
        world: how many there are.
        sent: a context that counts the bytes of collectives.
    """
    model = sharded(Held())
    shards = {id(p): shard_of(p) for p in model.parameters() if shard_of(p) is not None}
    scales = [p.to_local() for n, p in model.named_parameters() if "scales-of" in n]
    parts = [*scales, *(shard.codes for shard in shards.values())]
    results = {"kept": sum(part.untyped_storage().nbytes() for part in parts)}
    with sent() as counted:
        model(batch(0, rank, world)).backward()
    results["gathered"] = counted.bytes["gathered"]
    for case, (name, dtype, table, options, tied) in {**CASES, **RELEASED}.items():
        model = sharded(Held(dtype, tied))
        optimizer = optimizer_of(model, name, table, options)
        steps(model, optimizer, rank=rank, ranks=world, spoilt=case == "not finite")
        results[case] = whole_state(model)
    for case in REPLICATED:
        name, dtype, table, options, tied = CASES[case]
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
    save_sharded(model, optimizer, shared / f"held{world}")
    save_full(model, optimizer, shared / f"held{world}.pt")
    results = {}
    for before in (2, 4)[: 1 + (world == 4)]:
        model = sharded(Held())
        for p in model.parameters():
            if shard_of(p) is not None:
                shard_of(p).codes.zero_()
        optimizer = optimizer_of(model, name, table, options)
        load_sharded(model, optimizer, shared / f"held{before}")
        steps(model, optimizer, first=SAVED_AT, rank=rank, ranks=world)
        results[f"SHARDED of {before}"] = whole_state(model)
        # Without memory and sent by the first rank, or read by all of them.
        for kind, sent in {"FULL": True, "FULL on the device": False}.items():
            if before != world and not sent:
                continue
            model = sharded(Held().to("meta") if sent else Held())
            made = partial(optimizer_of, name=name, table=table, options=options)
            optimizer = load_full(model, made, shared / f"held{before}.pt", sent=sent)
            steps(model, optimizer, first=SAVED_AT, rank=rank, ranks=world)
            results[f"{kind} of {before}"] = whole_state(model)
    return results

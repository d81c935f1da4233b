"""Steps of tables with a second moment for each row, each column, or both; cut over ranks for `test_fsdp2.py`."""

import math

import torch
from conftest import dense
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from hf_stateless import StatelessOptimizer


# Whether the rule keeps averages of rows and of columns.
KEPT = {"row_moment": (True, False), "column_moment": (False, True), "factored": (True, True)}
# Rows for all of four ranks, for three, for one; one column; fewer columns than ranks.
SHAPES = ((31, 6), (9, 14), (1, 5), (7, 1), (12, 3))
# How a table is cut, and how many dimensions are.
CUTS = {
    "rows": ((Shard(0),), 1),
    "columns": ((Shard(1),), 1),
    "replicas": ((Replicate(), Shard(0)), 1),
    "both": ((Shard(0), Shard(1)), 2),
    "nothing": ((Replicate(),), 0),
}


def optimizer_of(rule, weight, lr=0.1, **options):
    return StatelessOptimizer([{"params": [weight], "algorithm": rule, **options}], lr=lr)


def gradients(shape, steps, dtype=torch.float32, scale=1.0, seed=0):
    """Gradients of which each step lacks other rows; those of rows and columns differ in size."""
    sizes = 10 ** torch.linspace(-2, 2, shape[0]).double().unsqueeze(1) * torch.linspace(1, 3, shape[1]).double()
    for step in range(steps):
        grad = dense(*shape, dtype=torch.float64, seed=seed + step) * sizes * scale
        lacks = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed + step)) < 0.5
        yield torch.where(lacks.unsqueeze(1), 0.0, grad).to(dtype)


def take_steps(optimizer, grads):
    [weight] = optimizer.param_groups[0]["params"]
    for grad in grads:
        weight.grad = grad
        optimizer.step()
    return weight.detach().clone()


def step_tables(rule, place):
    """Step tables of all shapes, without noise; return weights and states, whole."""
    weights = [nn.Parameter(place(dense(*shape, seed=i))) for i, shape in enumerate(SHAPES)]
    group = {"params": weights, "algorithm": rule, "weight_decay": 0.1, "stochastic_rounding": False}
    optimizer = StatelessOptimizer([group], lr=0.1)
    for grads in zip(*(gradients(shape, 4) for shape in SHAPES), strict=True):
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = place(grad)
        optimizer.step()
    kept = [optimizer.state[weight][name] for weight in weights for name in sorted(optimizer.state[weight])]
    return [_whole(tensor).detach() for tensor in (*weights, *kept)]


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _spoiled(rule, place):
    """Whether a NaN in the last row, which one rank has alone, leaves the weights and their averages alone on all."""
    weight, grad = nn.Parameter(place(torch.ones(9, 6))), torch.ones(9, 6)
    optimizer, grad[8, 5] = optimizer_of(rule, weight), math.nan
    weight.grad = place(grad)
    optimizer.step()
    untouched = all(not _whole(tensor).any() for tensor in optimizer.state[weight].values())
    return untouched and torch.equal(_whole(weight), torch.ones(9, 6))


def _messages(rule, place):
    """How often a step of one table calls each collective."""
    weight = nn.Parameter(place(torch.ones(9, 6)))
    optimizer = optimizer_of(rule, weight)
    weight.grad = place(torch.ones(9, 6))
    with CommDebugMode() as mode:
        optimizer.step()
    return {str(name).removeprefix("c10d."): count for name, count in mode.get_comm_counts().items()}


def on_this_rank():
    """What one of four ranks gets for each rule and cut."""
    meshes = {1: init_device_mesh("cpu", (4,)), 2: init_device_mesh("cpu", (2, 2))}
    results = {}
    for cut, (placements, _) in CUTS.items():

        def place(whole, placements=placements):
            return distribute_tensor(whole, meshes[len(placements)], placements)

        for rule in KEPT:
            results[cut, rule] = step_tables(rule, place), _spoiled(rule, place), _messages(rule, place)
    return results

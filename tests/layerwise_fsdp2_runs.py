"""What each rank does with updates in backward under FSDP2; `test_layerwise_distributed.py` starts it."""

import torch
from distributed_models import (
    MATRICES,
    STEPS,
    WORLD,
    Blocks,
    Tower,
    built,
    refusal,
    sharded,
    step_once,
    tokens,
    weights_of,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from hf_stateless import StatelessOptimizer, create_optimizer


# Each case: the model, the name, the options, and whether the optimizer is made before the model is sharded, as
# accelerate does.
SHARDED = {
    **{name: (Tower, name, {}, False) for name in ("swan", "sinkgd", "multinorm")},
    "all released": (Tower, "sinkgd", {"release": "all"}, False),
    "swapped": (Tower, "sinkgd", {}, True),
    "swapped, all released": (Tower, "sinkgd", {"release": "all"}, True),
    "blocks": (Blocks, "sinkgd", {"target_modules": MATRICES}, True),
    "blocks, swan": (Blocks, "swan", {"target_modules": MATRICES}, False),
    "blocks, all released": (
        Blocks,
        "sinkgd",
        {"release": "all", "embeddings": "sinkhorn_momentum", "target_modules": MATRICES},
        False,
    ),
}


def run_sharded(rank, case):
    """Return the weights and how many gradients were left, layer-wise, and the weights of the plain optimizer."""
    kind, name, options, swapped = SHARDED[case]
    plain_options = {key: value for key, value in options.items() if key != "release"}
    plain, _ = train_sharded(rank, kind, name, plain_options, swapped)
    return *train_sharded(rank, kind, f"{name}_layerwise", options, swapped), plain


def train_sharded(rank, kind, name, options, swapped):
    model = built(kind)
    model.spare.requires_grad_(False)
    if not swapped:
        sharded(model)
    optimizer = create_optimizer(model, name, lr=0.01, lr_scale=0.2, weight_decay=0.1, **options)
    if swapped:
        sharded(model)
        now = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [now[parameter] for parameter in group["param_names"]]
    for step in range(STEPS):
        optimizer.train()
        step_with_hold(model, optimizer, rank, step)
    left = sum(p.grad is not None for g in optimizer.param_groups for p in g["params"])
    return weights_of(model), left


def step_with_hold(model, optimizer, rank, step):
    """Two micro-batches, of which the first is not reduced."""
    model.set_requires_gradient_sync(False)
    with optimizer.hold():
        model(tokens(rank, 2 * step)).backward()
    model.set_requires_gradient_sync(True)
    model(tokens(rank, 2 * step + 1)).backward()
    assert not isinstance(optimizer.released_norm(), DTensor)
    optimizer.step()
    optimizer.zero_grad()


def run_counted(rank, name, release, in_part):
    """Collectives and the most matrices whose gradients wait for their block, in one step after the first."""
    model = built(Blocks)
    model.spare.requires_grad_(False)
    sharded(model)
    waiting = []
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.shape != (31, 16)]
    for p in matrices:
        p.register_post_accumulate_grad_hook(lambda _: waiting.append(sum(q.grad is not None for q in matrices)))
    optimizer = create_optimizer(model, f"{name}_layerwise", lr=0.01, release=release, target_modules=MATRICES)
    step_once(model, optimizer, tokens(rank))
    waiting.clear()
    with CommDebugMode() as mode:
        model(tokens(rank), in_part).backward()
        assert optimizer.released_norm() > 0
        optimizer.step()
    counts = {str(operation).removeprefix("c10d."): count for operation, count in mode.get_comm_counts().items()}
    return {"counts": counts, "waiting": max(waiting), "left": sum(p.grad is not None for p in matrices)}


def run_used_in_part(rank):
    """Steps that use a block in part, between steps that use all of it."""
    trained = []
    for name in ("sinkgd_layerwise", "sinkgd"):
        model = built(Blocks)
        model.spare.requires_grad_(False)
        optimizer = create_optimizer(sharded(model), name, lr=0.01, weight_decay=0.1)
        for step in range(STEPS):
            step_once(model, optimizer, tokens(rank, step), step == 1)
        trained.append(weights_of(model))
    return trained


def run_broken_backward(rank):
    """A backward pass that fails in the middle of a block, then one that does not, and the plain optimizer's step."""
    mesh = init_device_mesh("cpu", (WORLD,))
    start = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    results = []
    for layerwise in (None, "matrices"):
        later, first = (nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in start)
        group = {"params": [later, first], "param_names": ["layers.0.a", "layers.0.b"], "algorithm": "multinorm"}
        optimizer = StatelessOptimizer([group], lr=0.1, release=layerwise)
        optimizer.train()
        if layerwise:
            broken = later * 1
            broken.register_hook(fail)
            error = refusal(lambda broken=broken, first=first: (broken.pow(2).sum() + first.pow(2).sum()).backward())
            assert first.grad is not None  # it waits for the other one
            optimizer.zero_grad()
            optimizer.step()
        unchanged = torch.equal(first.full_tensor(), start[1])
        (later.pow(3).sum() + first.pow(3).sum()).backward()
        optimizer.step()
        results.append([p.full_tensor().detach() for p in (later, first)])
    return {"weights": results, "error": error, "unchanged": unchanged}


def fail(grad):
    raise RuntimeError("backward failed")


def run_sharded_norm(rank, kind):
    """The norm of released shards, layer-wise, and of all shards after a plain backward."""
    norms = []
    for name in ("sinkgd_layerwise", "sinkgd"):
        model = built(kind)
        model.spare.requires_grad_(False)
        optimizer = create_optimizer(sharded(model), name, lr=0.01)
        model(tokens(rank)).backward()
        if name == "sinkgd":
            matrices = [p.grad for g in optimizer.param_groups if g["role"] == "matrix" for p in g["params"]]
            norms.append(torch.nn.utils.get_total_norm(matrices).full_tensor())
        else:
            norms.append(optimizer.released_norm())
    return norms


def run_sharded_clipped(rank):
    """Weights after clipping by torch, and by the whole norm, of sharded gradients, layer-wise and plain."""
    trained = []
    for name in ("sinkgd_layerwise", "sinkgd"):
        model = built(Tower)
        model.spare.requires_grad_(False)
        optimizer = create_optimizer(sharded(model), name, lr=0.01, adamw_eps=1e-2)
        for step in range(STEPS):
            model(tokens(rank, step)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            optimizer.step()
            optimizer.zero_grad()
        trained.append(weights_of(model))
    return trained


# Rules whose state of another shape is refused, with a tensor that they keep.
OF_ANOTHER_SHAPE = {
    "exp_avg": {"algorithm": "adamw"},
    "exp_avg_sq": {"algorithm": "adamw"},
    "momentum_buffer": {"algorithm": "sinkhorn_momentum"},
    "momentum_buffer, multinorm": {"algorithm": "multinorm", "momentum": 0.9, "momentum_dtype": "float32"},
}


def run_other_shapes(rank):
    """What is said of states with more rows, fewer columns and one element, at loading, in a step and in backward."""
    mesh, messages = init_device_mesh("cpu", (WORLD,)), {}
    shapes = {"more rows": (24, 8), "fewer columns": (12, 7), "one element": (1,)}
    for key, group in OF_ANOTHER_SHAPE.items():
        for kind, shape in shapes.items():
            other = distribute_tensor(torch.zeros(shape), mesh, [Shard(0)])
            for when in ("loading", "step", "backward"):
                weight = nn.Parameter(distribute_tensor(torch.ones(12, 8), mesh, [Shard(0)]))
                groups = [{"params": [weight], "param_names": ["layers.0.w"], **group}]
                optimizer = StatelessOptimizer(groups, lr=0.1, release="all" if when == "backward" else None)
                optimizer.train()
                weight.pow(2).sum().backward()
                optimizer.step()
                before, name = weight.full_tensor().clone(), key.split(",")[0]
                saved = optimizer.state_dict()
                saved["state"] = {0: {**saved["state"][0], name: other}}
                if when != "loading":
                    optimizer.state[weight][name] = other
                act = {"loading": lambda o=optimizer, s=saved: o.load_state_dict(s), "step": optimizer.step}
                act["backward"] = lambda w=weight: w.pow(2).sum().backward()
                message = refusal(act[when])
                messages[f"{key}, {kind}, {when}"] = (message, torch.equal(weight.full_tensor(), before))
    return messages


# Name, release, whether one block is used in part.
COUNTED = [("sinkgd", "matrices", False), ("sinkgd", "matrices", True), ("sinkgd", "all", False)]
COUNTED += [("swan", "matrices", False)]

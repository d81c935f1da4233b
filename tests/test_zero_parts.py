"""Flat parts as ZeRO-1 and -2 leave them, made here without DeepSpeed: what a rank updates equals one process."""

from functools import partial

import pytest
import torch
from conftest import TINY_MODELS
from rank_processes import joined, on_ranks

from hf_stateless import create_optimizer
from hf_stateless.optimizer.partitioned import PartitionedOptimizer, refuse_rules
from hf_stateless.ranks.flat import FlatCut, flat_cut
from hf_stateless.trainer.factory import optimizer_arguments


CASES = {
    "sinkgd": ("llama", "sinkgd", {}),
    "swan": ("llama", "swan", {"lr_scale": 0.2}),
    "another chain": ("gpt2", "multinorm", {"norms": "col_l2+row_l2"}),
    "experts": ("qwen3_moe", "sinkgd", {}),
    "momentum": ("llama", "swan", {"lr_scale": 0.2, "momentum": 0.9, "momentum_dtype": "float32"}),
    "rounded momentum of experts": ("qwen3_moe", "sinkgd", {"momentum": 0.9, "momentum_dtype": "bfloat16"}),
}
STEPS = 3


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def model_of(case):
    torch.manual_seed(0)
    return TINY_MODELS[CASES[case][0]]()


def flatten(group, world, rank, order):
    """Put a group into a buffer as DeepSpeed does, and return this rank's part of its float32 copy."""
    params = [group["params"][i] for i in order]
    flat = torch.cat([p.detach().reshape(-1) for p in params])
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % (2 * world)))
    start = 0
    for p in params:
        p.data, start = flat[start : start + p.numel()].view(p.shape), start + p.numel()
    return flat, torch.nn.Parameter(flat.view(world, -1)[rank].clone())


def train_parts(case, world, rank, *, reverse=False):
    model, (_, name, options) = model_of(case), CASES[case]
    optimizer = PartitionedOptimizer(**optimizer_arguments(model, name, options, lr=1e-2, weight_decay=0.1))
    whole, flats = [list(group["params"]) for group in optimizer.param_groups], []
    for group in optimizer.param_groups:
        order = range(len(group["params"]))
        flat, part = flatten(group, world, rank, list(order)[::-1] if reverse else order)
        group["params"] = [part]
        flats.append(flat)
    every = list(optimizer.param_groups)
    for step in range(STEPS):
        grads = dict(zip(model.parameters(), gradients(model, step), strict=True))
        for params, flat, group in zip(whole, flats, every, strict=True):
            averaged = torch.zeros_like(flat)
            for p in params:
                averaged[p.storage_offset() : p.storage_offset() + p.numel()] = grads[p].reshape(-1)
            group["params"][0].grad = averaged.view(world, -1)[rank].clone()
            optimizer.param_groups = [group]  # DeepSpeed shows one group after the other
            optimizer.step()
            parts = [torch.empty_like(group["params"][0]) for _ in range(world)]
            if world > 1:
                torch.distributed.all_gather(parts, group["params"][0].detach())
            flat.copy_(torch.cat(parts) if world > 1 else group["params"][0].detach())
        optimizer.param_groups = every
    return [p.detach().clone() for p in model.parameters()], [float(s["step"]) for s in optimizer.state.values()]


def worker(rank, folder, world):
    with joined(rank, folder, world) as save:
        results = {(case, False): train_parts(case, world, rank) for case in CASES}
        results["sinkgd", True] = train_parts("sinkgd", world, rank, reverse=True)
        save(results)


@pytest.fixture(scope="module", params=[2, 3])
def results(request):
    return on_ranks(partial(worker, world=request.param), request.param)


def spoiled(grads):
    """Put NaN into the last entry of each gradient."""
    for grad in grads:
        grad.view(-1)[-1] = float("nan")


def expected(case, bad=None):
    model, (_, name, options) = model_of(case), CASES[case]
    optimizer = create_optimizer(model, name, lr=1e-2, weight_decay=0.1, **options)
    for step in range(STEPS):
        grads = gradients(model, step)
        if step == bad:
            spoiled(grads)
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(("case", "reverse"), [*((case, False) for case in CASES), ("sinkgd", True)])
def test_ranks_with_flat_parts_equal_one_process(case, reverse, results):
    one = expected(case)
    for weights, steps in (result[case, reverse] for result in results):
        assert max(float((a - b).abs().max()) for a, b in zip(weights, one, strict=True)) < 1e-6
        assert set(steps) == {STEPS}


def test_on_one_rank_the_part_is_the_whole_group():
    weights, _ = train_parts("sinkgd", 1, 0)
    assert max(float((a - b).abs().max()) for a, b in zip(weights, expected("sinkgd"), strict=True)) < 1e-6


@pytest.mark.parametrize(
    ("rank", "mine"), [(0, {0: (0, 4)}), (1, {0: (4, 7), 1: (7, 8)}), (2, {1: (8, 12)}), (3, {1: (12, 13)})]
)
def test_a_rank_knows_what_it_holds(rank, mine):
    cut = FlatCut(rank, 4, 4, ((0, 7), (7, 13)))
    assert {i: cut.held(i) for i in cut.mine()} == mine
    assert [cut.holders(i) for i in range(2)] == [[0, 1], [1, 2, 3]]


@pytest.mark.parametrize("wrong", ["values", "length", "another buffer", "shape"])
def test_a_part_that_is_not_that_of_the_model_is_not_taken(wrong):
    flat = torch.arange(12.0)
    params = [flat[:6].view(2, 3), flat[6:].view(3, 2)]
    part = {"length": flat[:8], "shape": flat.view(3, 4), "values": flat + 1}.get(wrong, flat)
    if wrong == "another buffer":
        params[1] = params[1].clone()
    assert flat_cut(part.clone(), params) is None
    assert flat_cut(flat.clone(), [flat[:6].view(2, 3), flat[6:].view(3, 2)]) is not None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"momentum": 0.9}, "type momentum_dtype=bfloat16"),
        ({"min_signal": 0.1}, "min_signal=0.1"),
        ({"embeddings": "row_moment"}, "algorithm=row_moment"),
        ({"embeddings": "adamw_8bit"}, "algorithm=adamw_8bit"),
    ],
)
def test_what_needs_more_than_a_gradient_is_refused(make_model, options, told):
    with pytest.raises(ValueError, match=f"DeepSpeed.*{told}.* FSDP2"):
        refuse_rules(create_optimizer(make_model("llama"), "sinkgd", lr=1e-3, **options).param_groups)

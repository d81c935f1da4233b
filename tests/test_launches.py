"""How many operations a whole optimizer step issues: a bounded number for each matrix, few for each norm vector."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_stateless import StatelessOptimizer
from hf_stateless.optimizer.adamw import adamw_state, adamw_update_
from hf_stateless.ranks.placement import _finite_and_zero, _finite_and_zero_of_all
from hf_stateless.weights.noise import rounding_key
from hf_stateless.weights.rounding import round_vectors, stochastic_round_


def optimizer_of(layers, matrices, vectors, dtype, device="cpu"):
    weights = [torch.nn.Parameter(torch.randn(32, 48, device=device).to(dtype)) for _ in range(layers * matrices)]
    norms = [torch.nn.Parameter(torch.ones(48 + i % 2, device=device, dtype=dtype)) for i in range(layers * vectors)]
    for p in weights + norms:
        p.grad = torch.randn_like(p)
    groups = [{"params": weights, "algorithm": "multinorm"}, {"params": norms, "algorithm": "adamw"}]
    return StatelessOptimizer([group for group in groups if group["params"]], lr=1e-3)


def operations(optimizer):
    """The operations of torch that a step calls and that work on elements: no views, no allocations."""
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        optimizer.step()
    idle = ("empty", "view", "as_strided", "select", "slice", "detach", "reshape", "expand", "split", "unbind", "mT")
    idle += ("transpose", "unsqueeze", "squeeze", "item", "_local_scalar_dense", "narrow", "lift_fresh", "alias")
    names = [(event.key, event.count) for event in measured.key_averages() if event.key.startswith("aten::")]
    return sum(count for name, count in names if not name.removeprefix("aten::").startswith(idle))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_matrix_costs_a_bounded_number_of_operations_whatever_the_depth(dtype):
    two, four, eight = (operations(optimizer_of(layers, 2, 0, dtype)) for layers in (2, 4, 8))
    per_matrix = (four - two) / 4
    assert per_matrix == (eight - four) / 8
    assert per_matrix <= 200  # operations that call another one count twice


def test_vectors_cost_few_operations_each_since_one_kernel_updates_all():
    """What is left on CPU: its test for NaN, its key, its counter, and copies that a GPU does in one launch."""
    two, four, eight = (operations(optimizer_of(layers, 0, 2, torch.float32)) for layers in (2, 4, 8))
    assert eight - four == 2 * (four - two)
    assert (four - two) / 4 <= 30
    two, four, eight = (operations(optimizer_of(layers, 0, 2, torch.bfloat16)) for layers in (2, 4, 8))
    assert eight - four == 2 * (four - two)
    assert (four - two) / 4 <= 45


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_on_a_gpu_do_not_grow_with_the_number_of_vectors(dtype):
    def launches(optimizer):
        optimizer.step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as measured:
            optimizer.step()
            torch.cuda.synchronize()
        return sum(event.count for event in measured.key_averages() if event.device_time_total > 0)

    few, many = (launches(optimizer_of(layers, 0, 2, dtype, "cuda")) for layers in (4, 32))
    assert many <= few + 56  # at most one for each vector that is added: its step counter
    few, many = (launches(optimizer_of(layers, 4, 0, dtype, "cuda")) for layers in (4, 32))
    assert many <= few + 112 * 20


@pytest.mark.parametrize("sizes", [[5], [1, 1], [48, 49, 1, 300]])
def test_vectors_side_by_side_are_rounded_as_each_alone(sizes):
    keys = [rounding_key(3, index, torch.full((1,), 7.0)) for index in range(len(sizes))]
    values = torch.randn(sum(sizes))
    alone = [torch.empty(size, dtype=torch.bfloat16) for size in sizes]
    for target, part, key in zip(alone, values.clone().split(sizes), keys, strict=True):
        stochastic_round_(target, part.clone(), key)
    assert torch.equal(round_vectors(values.clone(), sizes, keys), torch.cat(alone))


def test_vectors_side_by_side_are_updated_as_each_alone():
    torch.manual_seed(0)
    hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    start = [torch.randn(size).bfloat16() for size in (48, 1, 129, 48)]
    together, alone = [p.clone() for p in start], [p.clone() for p in start]
    states, single_states = [adamw_state(p) for p in start], [adamw_state(p) for p in start]
    for step in range(3):
        grads = [torch.randn_like(p) for p in start]
        keys = [rounding_key(0, index, torch.full((1,), float(step))) for index in range(len(start))]
        adamw_update_(together, grads, states, keys, **hyper)
        for p, grad, state, key in zip(alone, grads, single_states, keys, strict=True):
            adamw_update_([p], [grad], [state], [key], **hyper)
    for p, other, before in zip(together, alone, start, strict=True):
        assert torch.equal(p, other)
        assert not torch.equal(p, before)
    for state, other in zip(states, single_states, strict=True):
        assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_flags_of_many_gradients_are_those_of_each(dtype):
    smallest = torch.finfo(dtype).smallest_normal / 4
    kinds = ([1.0, -2.0], [0.0, -0.0], [0.0, math.nan], [math.inf, 1.0], [-math.inf, math.nan], [smallest, 0.0])
    grads = [torch.tensor(kind, dtype=dtype) for kind in kinds]
    together = _finite_and_zero_of_all(grads)
    assert together.tolist() == [_finite_and_zero(grad).tolist() for grad in grads]
    assert together.unbind(1)[0].tolist() == [True, True, False, False, False, True]

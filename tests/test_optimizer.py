"""`StatelessOptimizer`: its steps against float64 references, and what changes nothing."""

import logging
import math

import pytest
import reference
import torch
from conftest import dense, relative_error
from optimizer_groups import (
    assert_equal,
    each_algorithm,
    each_dtype,
    each_precision,
    each_preset,
    group,
    parameter,
    preset_group,
    take_steps,
)
from updates import multinorm_update_

from hf_stateless import PRESETS, StatelessOptimizer


REFERENCES = {
    # A single column has nothing to centre: see `row_standardize`.
    "swan": lambda g: reference.swan(g, center=g.shape[-1] > 1),
    "sinkgd": reference.multi_normalize,
    "sinkgd_polar": lambda g: reference.frobenius(
        reference.polar_express(reference.multi_normalize(g, iterations=1), 1)
    ),
    "multinorm": lambda g: reference.frobenius(reference.polar_express(reference.row_l2(g))),
}
# Weights of four to forty rows, so that the loops of the references stay cheap.
SHAPES = ((12, 20), (40, 9), (16, 16), (1, 8), (8, 1))


# ---- What a step computes


@each_preset
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ten_steps_equal_the_float64_reference(name, shape):
    weight, lr, lr_scale, weight_decay = parameter(*shape), 0.01, 0.3, 0.1
    optimizer = StatelessOptimizer([preset_group(name, weight, lr_scale=lr_scale, weight_decay=weight_decay)], lr=lr)
    expected = reference.f64(weight)
    for step in range(10):
        weight.grad = dense(*shape, seed=step + 1)
        expected = (1 - lr * weight_decay) * expected - lr * lr_scale * REFERENCES[name](weight.grad)
        optimizer.step()
    # Rounding of the weights, and an error of the updates: float32 gives SWAN's polynomial to 1e-4, but only to 3e-3
    # for square matrices, of which some singular values are near zero and are amplified 6000 times.
    error = 1e-6 if name == "sinkgd" else 3e-3 if shape[0] == shape[1] else 1e-4
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=10 * lr * lr_scale * error)


@each_preset
@pytest.mark.parametrize(
    ("layout", "shape", "to_matrix"),
    [
        ("in_out", (12, 20), lambda t: t.mT),
        ("conv", (8, 3, 2, 2), lambda t: t.flatten(1)),
        ("out_in", (3, 8, 12), None),
        ("in_out", (3, 8, 12), lambda t: t.mT),
    ],
    ids=("Conv1D", "convolution", "experts", "transposed experts"),
)
def test_a_layout_is_a_view_of_separate_matrices(name, layout, shape, to_matrix):
    weight = parameter(*shape)
    as_matrices = to_matrix or (lambda t: t)
    parts = as_matrices(weight.detach().clone())
    parts = [torch.nn.Parameter(part.clone()) for part in (parts if parts.ndim == 3 else [parts])]
    optimizer = StatelessOptimizer([preset_group(name, weight, layout=layout, weight_decay=0.1)], lr=0.1)
    loop = StatelessOptimizer([preset_group(name, *parts, weight_decay=0.1)], lr=0.1)
    for step in range(3):
        weight.grad = dense(*shape, seed=step + 1)
        grads = as_matrices(weight.grad)
        for part, grad in zip(parts, grads if grads.ndim == 3 else [grads], strict=True):
            part.grad = grad.contiguous()
        optimizer.step()
        loop.step()
    actual = as_matrices(weight.detach()).reshape(len(parts), *parts[0].shape)
    # Sums run in another order, and SWAN's polynomial amplifies their rounding 6000 times: 1e-4 of three updates.
    atol = 1e-6 if name == "sinkgd" else 3 * 0.1 * 0.2 * 1e-3
    torch.testing.assert_close(actual, torch.stack([p.detach() for p in parts]), rtol=1e-5, atol=atol)


@each_preset
def test_a_batch_of_matrices_equals_a_loop(name):
    preset = PRESETS[name]
    options = {"lr": 0.1, "lr_scale": 1.0, "weight_decay": 0.1, "layout": "out_in", **preset.group()}
    grads = [dense(6, 9, seed=1), torch.zeros(6, 9), torch.full((6, 9), math.nan), dense(6, 9, seed=2)]
    batched = [dense(6, 9, seed=i) for i in range(4)]
    looped = [w.clone() for w in batched]
    flags = multinorm_update_(batched, grads, None, **options)
    assert flags == [multinorm_update_([w], [g], None, **options)[0] for w, g in zip(looped, grads, strict=True)]
    assert flags == [True, True, False, True]
    torch.testing.assert_close(batched, looped, rtol=1e-5, atol=1e-6)


@each_algorithm
@each_dtype
def test_the_step_of_every_dtype_follows_float64(algorithm, dtype):
    narrow, wide = parameter(16, 32, dtype=dtype), parameter(16, 32, dtype=dtype).double()
    wide = torch.nn.Parameter(wide.detach())
    start = wide.detach().clone()
    for weight in (narrow, wide):
        optimizer = StatelessOptimizer([group(weight, algorithm=algorithm, stochastic_rounding=False)], lr=0.25)
        weight.grad = dense(16, 32, dtype=dtype, seed=1).to(weight.dtype)
        optimizer.step()
    # The first step of AdamW is a sign, so all rules move every entry by about lr: a rounded weight is the limit.
    error = (narrow.detach() - wide.detach()).abs().max().item()
    assert error <= 2 * torch.finfo(dtype).eps * start.abs().max().item() + 1e-6
    assert (wide.detach() - start).abs().mean() > 0.01


@each_algorithm
def test_a_float64_weight_keeps_its_precision(algorithm):
    weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.float64) + 1e-12)
    weight.grad = dense(8, 8, dtype=torch.float64)
    StatelessOptimizer([group(weight, algorithm=algorithm)], lr=1e-13).step()
    assert 0 < (weight.detach() - 1 - 1e-12).abs().max() < 1e-12


@each_algorithm
@each_precision
@pytest.mark.parametrize("strided", ["weight", "gradient", "both", "sliced weight"])
def test_strides_do_not_change_the_step(algorithm, dtype, strided):
    def transposed(t):
        return t.mT.contiguous().mT

    def sliced(t):
        return torch.stack((t, t), -1).flatten(1)[:, ::2]

    results = []
    for lay_out in (None, sliced if strided == "sliced weight" else transposed):
        weight = dense(24, 16, dtype=dtype)
        grads = [dense(24, 16, dtype=dtype, seed=step + 1) for step in range(3)]
        if lay_out and strided != "gradient":
            weight = lay_out(weight)
        if lay_out and strided in ("gradient", "both"):
            grads = [lay_out(grad) for grad in grads]
        weight = torch.nn.Parameter(weight)
        optimizer = StatelessOptimizer([group(weight, algorithm=algorithm)], lr=0.01)
        for grad in grads:
            weight.grad = grad
            optimizer.step()
        results.append(weight.detach().contiguous())
    # Sums in another order; in bfloat16 that may send one value in a thousand to the other neighbour.
    close = torch.isclose(results[1], results[0], rtol=1e-5, atol=1e-6).float().mean().item()
    assert close == 1.0 if dtype == torch.float32 else close > 0.99


@each_algorithm
def test_a_step_leaves_the_gradient_as_it_is(algorithm):
    weight = parameter(8, 12)
    weight.grad = dense(8, 12, seed=1)
    before = weight.grad.clone()
    StatelessOptimizer([group(weight, algorithm=algorithm, weight_decay=0.1)], lr=0.1).step()
    assert_equal(weight.grad, before)


@each_algorithm
@each_precision
def test_two_runs_are_equal_to_the_bit(algorithm, dtype):
    runs = []
    for _ in range(2):
        optimizer = StatelessOptimizer([group(parameter(24, 40, dtype=dtype), algorithm=algorithm)], lr=0.01)
        runs.append(take_steps(optimizer, range(3)))
    assert_equal(runs[0], runs[1])


@each_preset
@each_precision
def test_a_quadratic_is_descended(name, dtype):
    weight, goal = torch.nn.Parameter(torch.zeros(12, 16, dtype=dtype)), dense(12, 16)
    goal = goal - goal.mean(-1, keepdim=True)  # SWAN's centred updates never move a row's mean
    optimizer = StatelessOptimizer([preset_group(name, weight, lr_scale=1.0)], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=100)
    for _ in range(100):
        optimizer.zero_grad()
        (weight.float() - goal).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert relative_error(weight.detach(), goal) < 0.1


# ---- What changes nothing


@each_algorithm
@each_precision
@pytest.mark.parametrize("cause", ["zero gradient", "lr = 0", "no backward yet", "no gradient for this one"])
def test_nothing_changes_without_a_signal(algorithm, dtype, cause):
    weight, other = parameter(8, 12, dtype=dtype), parameter(8, 12, dtype=dtype)
    # AdamW and the momentum rule are decoupled from the gradient, so they decay on a zero gradient too.
    decay = 0.1 if algorithm == "multinorm" or cause != "zero gradient" else 0.0
    options = {"algorithm": algorithm, "weight_decay": decay}
    optimizer = StatelessOptimizer([group(weight, other, **options)], lr=0.0 if cause == "lr = 0" else 0.1)
    if cause == "zero gradient":
        weight.grad = torch.zeros_like(weight)
    elif cause == "lr = 0":
        weight.grad = dense(8, 12, dtype=dtype, seed=1)
    elif cause == "no gradient for this one":
        other.grad = dense(8, 12, dtype=dtype, seed=1)
    before = weight.detach().clone()
    for _ in range(3):
        optimizer.step()
    assert_equal(weight.detach(), before)


@each_algorithm
@each_precision
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_gradient_that_is_not_finite_costs_its_parameter_that_step_only(algorithm, dtype, bad, caplog):
    runs = {}
    for spoiled in (True, False):
        weights = [parameter(8, 12, dtype=dtype, seed=i) for i in range(2)]
        before = [w.detach().clone() for w in weights]
        named = group(*weights, algorithm=algorithm, weight_decay=0.1, param_names=["fine.weight", "spoiled.weight"])
        optimizer = StatelessOptimizer([named], lr=0.1)
        if spoiled:
            weights[0].grad, weights[1].grad = (dense(8, 12, dtype=dtype, seed=i + 5) for i in range(2))
            weights[1].grad[3, 4] = bad
            with caplog.at_level(logging.WARNING):
                optimizer.step()
            assert_equal(weights[1].detach(), before[1])
            assert (weights[0].detach() != before[0]).any()
        runs[spoiled] = take_steps(optimizer, range(2))[1]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "spoiled.weight" in warnings[0]
    assert_equal(runs[True], runs[False])


@each_algorithm
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
def test_an_empty_parameter_is_no_obstacle(algorithm, shape):
    for options in ({}, {"momentum": 0.9}) if algorithm == "multinorm" else ({},):
        empty, weight = torch.nn.Parameter(torch.zeros(shape)), parameter(8, 12)
        optimizer = StatelessOptimizer([group(empty, weight, algorithm=algorithm, **options)], lr=0.1)
        empty.grad, weight.grad = torch.zeros(shape), dense(8, 12, seed=1)
        optimizer.step()
        assert (weight.detach() != dense(8, 12)).any()
        optimizer.load_state_dict(optimizer.state_dict())


# ---- Stochastic rounding


def ones_after(steps, size, *, first=0, **options):
    """All-one bfloat16 weights after steps of `size` towards zero, with the number of the parameter as the index."""
    weights = [torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(first + 1)]
    optimizer = StatelessOptimizer([group(*weights, lr_scale=1.0, **options)], lr=size)
    for _ in range(steps):
        weights[first].grad = torch.ones(64, 64, dtype=torch.bfloat16)
        optimizer.step()
    return weights[first].detach().float()


def test_small_steps_arrive_on_average():
    spacing, steps, share = 2.0**-8, 200, 1 / 64
    moved = [1 - ones_after(steps, spacing * share, seed=seed).mean().item() for seed in range(4)]
    deviation = spacing * math.sqrt(steps * share * (1 - share) / (len(moved) * 64 * 64))
    assert abs(sum(moved) / len(moved) - steps * spacing * share) < 4 * deviation
    assert_equal(ones_after(5, spacing * share, stochastic_rounding=False), torch.ones(64, 64))


@pytest.mark.parametrize("changed", [{"seed": 1}, {"first": 1}], ids=("seed", "parameter"))
def test_noise_differs_between(changed):
    base = {"steps": 1, "size": 2.0**-9}
    assert_equal(ones_after(**base), ones_after(**base))
    differing = (ones_after(**base) != ones_after(**base, **changed)).float().mean().item()
    assert abs(differing - 0.5) < 0.05  # half of the entries are rounded down in each


def test_noise_differs_between_steps():
    after_one, after_two = ones_after(1, 2.0**-9), ones_after(2, 2.0**-9)
    # An entry moves in each of the two steps with probability 1/2; equal noise would move it twice or never.
    moved_once = (after_two == 1 - 2.0**-8).float().mean().item()
    assert abs(moved_once - 0.5) < 0.05
    assert ((after_one < 1) <= (after_two < 1)).all()

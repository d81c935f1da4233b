"""`momentum`: the recursion, what its storage costs and keeps, and what leaves weight and average as they are."""

import copy
import io
import logging
import math

import pytest
import reference
import torch
from conftest import TINY_MODELS, dense, gradients, relative_error, tiny_inputs
from hypothesis import given
from hypothesis import strategies as st

import hf_stateless
from hf_stateless import PRESETS, StatelessOptimizer, create_optimizer
from hf_stateless.optimizer.momentum import momentum_bytes, momentum_direction_, momentum_state
from hf_stateless.optimizer.options import MOMENTUM_DTYPES, embeddings
from hf_stateless.weights.noise import rounding_key


MU, LR = 0.9, 0.1
# How far the direction may be from that of a float64 average, after any number of steps.
TOLERANCES = {"float32": 1e-6, "bfloat16": 1e-2, "int8": 3e-2}
NORMALISE = {
    "sinkgd": lambda d: reference.multi_normalize(d),
    "swan": lambda d: reference.swan(d),
    "multinorm": lambda d: reference.frobenius(reference.polar_express(reference.row_l2(d))),
    "sinkgd_polar": PRESETS["sinkgd_polar"].chain.normalize,  # in float64, as the directions are
}
each_dtype = pytest.mark.parametrize("dtype", MOMENTUM_DTYPES)
each_name = pytest.mark.parametrize("name", PRESETS)


def build(name="sinkgd", shape=(6, 9), **options):
    """One matrix and its optimizer."""
    weight = torch.nn.Parameter(dense(*shape, seed=7))
    chain = PRESETS[name].group()
    group = {"params": [weight], "algorithm": "multinorm", "lr_scale": 0.2, "weight_decay": 0.1, "momentum": MU}
    group |= {**chain, **options}
    return weight, StatelessOptimizer([group], lr=LR)


def step(weight, optimizer, grad):
    weight.grad = grad.clone()
    optimizer.step()
    assert torch.equal(weight.grad, grad) or not grad.isfinite().all()


def average(state):
    """The stored average in float64."""
    buffer = state["momentum_buffer"].double()
    if "momentum_scale" not in state:
        return buffer
    scale = state["momentum_scale"].double()
    return (buffer.view(*scale.shape, -1) * scale.unsqueeze(-1)).view(buffer.shape)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


# ---- The recursion


@each_name
def test_steps_are_those_of_the_float64_recursion(name):
    weight, optimizer = build(name, momentum_dtype="float32")
    expected, mean = reference.f64(weight), torch.zeros(6, 9, dtype=torch.float64)
    for i in range(5):
        grad = dense(6, 9, seed=i)
        mean = MU * mean + (1 - MU) * grad.double()
        direction = (1 - MU) * grad.double() + MU * mean
        expected = (1 - LR * 0.1) * expected - LR * 0.2 * NORMALISE[name](direction)
        step(weight, optimizer, grad)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(average(optimizer.state[weight]), mean, rtol=1e-6, atol=1e-6)


@each_dtype
@given(grad=gradients(dtypes=(torch.float32, torch.bfloat16)), momentum=st.floats(0.1, 0.99))
def test_the_first_direction_is_the_gradient_at_any_shape_and_scale(dtype, grad, momentum):
    state = momentum_state(grad, dtype)
    direction = momentum_direction_(grad, grad, state, rounding_key(0, 0, torch.ones(1)), momentum)
    assert (direction.shape, direction.dtype) == (grad.shape, grad.dtype)
    wide = (1 - momentum) * (1 + momentum) * grad.double()
    assert relative_error(direction, wide) < (1e-5 if grad.dtype == torch.float32 else 5e-3)
    assert relative_error(average(state), (1 - momentum) * grad.double()) < TOLERANCES[dtype]


@each_dtype
def test_a_transposed_gradient_and_large_matrices_give_the_same_average(dtype, monkeypatch):
    grad = dense(40, 24)
    states = [momentum_state(torch.empty(24, 40), dtype) for _ in range(2)]
    directions = [
        momentum_direction_(g, g, s, None, MU) for g, s in zip((grad.T, grad.T.contiguous()), states, strict=True)
    ]
    assert torch.equal(*directions)
    monkeypatch.setattr("hf_stateless.optimizer.momentum._BLOCK", 7 * 40)
    in_parts = momentum_state(torch.empty(24, 40), dtype)
    assert torch.equal(momentum_direction_(grad.T, grad.T, in_parts, None, MU), directions[0])
    for other in (states[1], in_parts):
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


# ---- Storage


@pytest.mark.parametrize("graded", [False, True])
@each_dtype
def test_over_200_steps_the_direction_stays_that_of_an_exact_average(dtype, graded):
    shape = (48, 256)
    signal = dense(*shape, seed=1) * (torch.logspace(-2, 0, 256) if graded else 1)
    exact, stored = momentum_state(torch.empty(shape), "float32"), momentum_state(torch.empty(shape), dtype)
    generator = torch.Generator().manual_seed(0)
    for i in range(200):
        grad = signal + 2 * signal.abs() * torch.randn(shape, generator=generator)
        key = rounding_key(0, 0, torch.full((1,), float(i)))
        expected = momentum_direction_(grad, grad, exact, None, MU)
        direction = momentum_direction_(grad, grad, stored, key, MU)
        assert cosine(direction, expected) > 1 - TOLERANCES[dtype] ** 2
        assert relative_error(direction, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("rounded", ["stochastically", "to nearest"])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_gradients_below_half_a_code_reach_the_average_by_stochastic_rounding(dtype, rounded):
    """One entry in 128 is large, and the others are too small for a code, or for a change of a bf16 number."""
    small = 1e-3
    grad = torch.full((64, 128), small)
    grad[:, 0] = 1.0
    state = momentum_state(grad, dtype)
    mean = torch.zeros(64, 127, dtype=torch.float64)
    mu, steps = (MU, 400) if dtype == "int8" else (0.999, 4000)
    for i in range(steps):
        key = rounding_key(0, 0, torch.full((1,), float(i))) if rounded == "stochastically" else None
        momentum_direction_(grad, grad, state, key, mu)
        mean += average(state)[:, 1:] / steps
    expected = small * (1 - mu * (1 - mu**steps) / ((1 - mu) * steps))
    delivered = mean.mean().item() / expected
    # To nearest, int8 loses all of it; bf16 stops where a step of 0.1 % of the rest is below half its spacing.
    assert (abs(delivered - 1) < 0.02) == (rounded == "stochastically")


@pytest.mark.parametrize(("shape", "limit"), [((64, 256), 1.016), ((4, 8, 128), 1.016), ((64, 37), 1.06)])
def test_int8_takes_a_byte_per_weight_and_a_little(shape, limit):
    state = momentum_state(torch.empty(shape), "int8")
    counted = sum(t.nbytes for t in state.values())
    assert counted == momentum_bytes(shape, "int8")
    assert 1 < counted / math.prod(shape) <= limit


@each_dtype
def test_only_matrices_hold_it_and_the_sum_is_what_is_predicted(dtype):
    model = TINY_MODELS["llama"]()
    optimizer = create_optimizer(model, "sinkgd", lr=1e-3, momentum=MU, momentum_dtype=dtype)
    model(**tiny_inputs("llama")).loss.backward()
    optimizer.step()
    held = {id(p) for p, state in optimizer.state.items() if "momentum_buffer" in state}
    assert held == {id(p) for group in optimizer.param_groups if group["role"] == "matrix" for p in group["params"]}
    matrices = [p for group in optimizer.param_groups if group["role"] == "matrix" for p in group["params"]]
    kept = sum(t.nbytes for p in matrices for t in optimizer.state[p].values())
    assert kept == sum(4 + momentum_bytes(p.shape, dtype) for p in matrices)


# ---- What leaves weight and average as they are


@each_dtype
@each_name
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0], ids=str)
def test_neither_moves_by_a_gradient_that_is_zero_or_not_finite(bad, name, dtype, caplog):
    weight, optimizer = build(name, momentum_dtype=dtype)
    step(weight, optimizer, dense(6, 9))
    before, state = weight.detach().clone(), copy.deepcopy(optimizer.state[weight])
    grad = dense(6, 9, seed=1) if bad else torch.zeros(6, 9)
    grad[0, 0] = bad
    with caplog.at_level(logging.WARNING):
        step(weight, optimizer, grad)
    assert torch.equal(weight, before)
    assert all(torch.equal(value, optimizer.state[weight][key]) for key, value in state.items())
    assert len(caplog.records) == bool(bad)
    step(weight, optimizer, dense(6, 9, seed=2))
    assert not torch.equal(weight, before)


@each_dtype
def test_before_any_gradient_nothing_happens_but_the_state_is_there(dtype):
    """As torch's checkpoint code makes it: by a step at learning rate 0 with gradients of zero."""
    weight, optimizer = build(momentum_dtype=dtype)
    before = weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    step(weight, optimizer, torch.zeros(6, 9))
    assert torch.equal(weight, before)
    assert optimizer.state[weight]["step"] == 0
    assert not average(optimizer.state[weight]).any()


def test_at_learning_rate_0_the_average_takes_gradients_in():
    weight, optimizer = build()
    before = weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    step(weight, optimizer, dense(6, 9))
    assert torch.equal(weight, before)
    assert average(optimizer.state[weight]).any()


def test_a_step_that_min_signal_holds_back_is_not_taken_into_the_average():
    weight, optimizer = build(min_signal=0.1)
    for i in range(16):
        step(weight, optimizer, dense(6, 9, seed=i))
    before = average(optimizer.state[weight])
    step(weight, optimizer, dense(6, 9, seed=16, scale=1e-3))
    assert optimizer.held_steps == 1
    assert torch.equal(average(optimizer.state[weight]), before)
    step(weight, optimizer, dense(6, 9, seed=17))
    assert not torch.equal(average(optimizer.state[weight]), before)


# ---- Models


def trained(model, name, steps=4, **options):
    optimizer = create_optimizer(model, name, lr=1e-2, weight_decay=0.1, momentum=MU, **options)
    torch.manual_seed(0)  # of dropout
    for _ in range(steps):
        model(**tiny_inputs("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def assert_same_bits(model, other):
    for (name, value), again in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, again), name


@each_name
@pytest.mark.parametrize("key", ["llama", "gpt2", "qwen3_moe"])
def test_layerwise_steps_are_those_of_the_plain_optimizer_to_the_bit(key, name, make_model):
    models = [make_model(key).to(torch.bfloat16) for _ in range(2)]
    plain = trained(models[0], name)
    layerwise = trained(models[1], f"{name}_layerwise", release="all")
    assert_same_bits(*models)
    states, others = plain.state_dict()["state"], layerwise.state_dict()["state"]
    assert states.keys() == others.keys()
    assert all(torch.equal(value, others[i][key]) for i in states for key, value in states[i].items())


@pytest.mark.parametrize("embeddings", embeddings())
def test_it_goes_with_every_treatment_of_embeddings_and_with_a_width_rule(embeddings, make_model):
    if embeddings == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    options = {"embeddings": embeddings, "width_rule": "spectral", "adamw_lr": 1e-3}
    optimizer = trained(make_model("llama"), "sinkgd", **options)
    for group in optimizer.param_groups:
        ours = group["role"] == "matrix"
        tables = group["algorithm"] == "sinkhorn_momentum"
        assert {"momentum_buffer" in optimizer.state[p] for p in group["params"]} == {ours or tables}
        assert {"momentum_scale" in optimizer.state[p] for p in group["params"]} == {ours}


def test_weights_in_8_bits_have_an_average_in_8_bits(make_model):
    models = [make_model("llama").to(torch.bfloat16) for _ in range(2)]
    for model in models:
        hf_stateless.quantize(model, hf_stateless.Int8TrainingConfig(16))
    optimizer = trained(models[0], "sinkgd")
    trained(models[1], "sinkgd_layerwise")
    assert_same_bits(*models)
    matrices = [p for group in optimizer.param_groups if group["role"] == "matrix" for p in group["params"]]
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.codes.shape for p in matrices)


def test_lora_factors_have_it_one_by_one_and_not_as_a_product(make_model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    optimizer = trained(model, "swan")
    assert all("momentum_buffer" in state for state in optimizer.state.values())
    with pytest.raises(ValueError, match="leave out momentum, or lora=product"):
        create_optimizer(model, "swan", lr=1e-3, momentum=MU, lora="product")


# ---- Checkpoints


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_dtype
@each_name
def test_a_checkpoint_goes_on_to_the_bit_and_keeps_dtypes(name, dtype, caplog):
    weight, straight = build(name, momentum_dtype=dtype)
    for i in range(3):
        step(weight, straight, dense(6, 9, seed=i))
    again, resumed = build(name, momentum_dtype=dtype)
    again.data.copy_(weight.data)
    resumed.load_state_dict(through_file(straight.state_dict()))
    assert caplog.records == []
    assert resumed.state[again]["momentum_buffer"].dtype == getattr(torch, dtype)
    for i in range(3, 6):
        step(weight, straight, dense(6, 9, seed=i))
        step(again, resumed, dense(6, 9, seed=i))
    assert torch.equal(weight, again)


@pytest.mark.parametrize("before", [{"momentum": 0.0}, *({"momentum_dtype": dtype} for dtype in MOMENTUM_DTYPES)])
@pytest.mark.parametrize("after", [{"momentum": 0.0}, *({"momentum_dtype": dtype} for dtype in MOMENTUM_DTYPES)])
def test_a_resumed_run_may_change_how_it_is_stored_or_leave_it_out(before, after, caplog):
    weight, optimizer = build(**before)
    for i in range(3):
        step(weight, optimizer, dense(6, 9, seed=i))
    again, resumed = build(**after)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert bool(caplog.records) == (before != after)
    kept = "momentum" not in before and "momentum" not in after
    assert ("momentum_buffer" in resumed.state[again]) == kept
    if kept:
        assert resumed.state[again]["momentum_buffer"].dtype == getattr(torch, after["momentum_dtype"])
        assert relative_error(average(resumed.state[again]), average(optimizer.state[weight])) < 2e-2
    step(again, resumed, dense(6, 9, seed=3))
    assert ("momentum_buffer" in resumed.state[again]) == ("momentum" not in after)

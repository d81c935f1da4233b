"""`rounding_feedback`: what rounding leaves out of 8-bit weights goes into the momentum, bounded, and comes back."""

import copy
import io
import math

import pytest
import torch
from conftest import TINY_MODELS, dense, relative_error, tiny_inputs

import hf_stateless
from hf_stateless import PRESETS, StatelessOptimizer, create_optimizer
from hf_stateless.optimizer.momentum import feed_back_, momentum_direction_, momentum_state
from hf_stateless.optimizer.options import MOMENTUM_DTYPES
from hf_stateless.update.feedback import LIMIT, Feedback
from hf_stateless.weights.int8.codes import quantize_matrix
from hf_stateless.weights.int8.weight import Int8Weight


MU, LR = 0.9, 1e-3
SHAPES = [(6, 9), (16, 256), (3, 4, 32)]


def build(name="sinkgd", shape=(6, 9), decay=0.1, **options):
    """One 8-bit matrix, or a stack of them, and its optimizer."""
    values = dense(*shape, seed=7, scale=0.02)
    codes, scale = quantize_matrix(values.reshape(-1, shape[-1]), 128)
    weight = Int8Weight(codes.view(shape), scale.view(*shape[:-1], -1), torch.float32)
    group = {"params": [weight], "algorithm": "multinorm", "lr_scale": 1.0, "weight_decay": decay, "momentum": MU}
    group |= {"momentum_dtype": "float32", "rounding_feedback": True, **PRESETS[name].group(), **options}
    return weight, StatelessOptimizer([group], lr=LR)


def step(weight, optimizer, grad):
    weight.grad = grad.clone()
    optimizer.step()


def bytes_of(weight, optimizer):
    return [weight.codes.clone(), weight.scale.clone(), *(t.clone() for t in optimizer.state[weight].values())]


def same(these, those):
    return all(torch.equal(*pair) for pair in zip(these, those, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_the_average_gains_what_the_formula_says(name, shape):
    weight, optimizer = build(name, shape)
    chain, grads = PRESETS[name].chain, [dense(*shape, seed=i) for i in range(3)]
    for i, grad in enumerate(grads):
        mean = torch.zeros(shape) if not i else optimizer.state[weight]["momentum_buffer"].clone()
        before = weight.dequantize(torch.float32).double()
        step(weight, optimizer, grad)
        mean = MU * mean.double() + (1 - MU) * grad.double()
        direction = (1 - MU) * grad.double() + MU * mean
        update = chain.normalize(direction)
        lost = (1 - LR * 0.1) * before - LR * update - weight.dequantize(torch.float32).double()
        lacked = lost / LR * direction.norm(dim=-1, keepdim=True) / update.norm(dim=-1, keepdim=True)
        most = LIMIT * direction.norm(dim=-1, keepdim=True)
        lacked *= (most / lacked.norm(dim=-1, keepdim=True)).clamp_max(1)
        mean += (1 - MU) / MU**2 * lacked
        assert relative_error(optimizer.state[weight]["momentum_buffer"], mean) < 1e-3


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.95])
def test_the_directions_to_come_have_all_of_what_was_lost(momentum):
    """Where the update is linear in the direction: a scale that stays."""
    error, none = dense(4, 8) * 1e-5, torch.zeros(4, 8)
    state, direction, fed = momentum_state(none, "float32"), dense(4, 8, seed=1), []
    feedback = Feedback(
        direction, lambda rows, lacked: feed_back_(state, None, momentum, rows, lacked) or fed.append(1)
    )
    feedback.lost(lambda rows: 3 * direction[rows], 0.01)(slice(0, 4), error.clone())
    back = sum(momentum_direction_(none, none, state, None, momentum) for _ in range(600))
    assert fed
    assert relative_error(0.01 * 3 * back, error) < 1e-4


@pytest.mark.parametrize("step_size", [0.0, 1e-38, 1e-9, torch.tensor(0.0), torch.tensor(1e-30)], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_what_is_fed_back_is_bounded_at_any_rate_and_size(step_size, size):
    direction, told = dense(4, 8) * size, []
    direction[0] = 0
    feedback = Feedback(direction, lambda rows, lacked: told.append(lacked))
    error = dense(4, 8, seed=1, scale=1e-4)
    error[1] = 0
    feedback.lost(lambda rows: torch.sign(direction[rows]), step_size)(slice(0, 4), error)
    assert torch.isfinite(told[0]).all()
    assert not told[0][:2].any()
    assert (told[0].norm(dim=1) <= 1.001 * LIMIT * direction.norm(dim=1)).all()


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)], ids=["0", "tensor"])
@pytest.mark.parametrize("dtype", MOMENTUM_DTYPES)
def test_at_learning_rate_0_the_weight_keeps_every_byte_and_the_average_goes_on(dtype, rate):
    ways = []
    for feedback in (True, False):
        weight, optimizer = build(momentum_dtype=dtype, rounding_feedback=feedback)
        optimizer.param_groups[0]["lr"] = rate
        before = weight.codes.clone()
        step(weight, optimizer, dense(6, 9))
        assert torch.equal(weight.codes, before)
        ways.append(bytes_of(weight, optimizer))
    assert same(*ways)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0], ids=str)
@pytest.mark.parametrize("dtype", MOMENTUM_DTYPES)
def test_a_gradient_that_is_zero_or_not_finite_leaves_every_byte(dtype, bad):
    weight, optimizer = build(momentum_dtype=dtype)
    step(weight, optimizer, dense(6, 9))
    before = bytes_of(weight, optimizer)
    grad = dense(6, 9, seed=1) if bad else torch.zeros(6, 9)
    grad[0, 0] = bad
    step(weight, optimizer, grad)
    assert same(before, bytes_of(weight, optimizer))


@pytest.mark.parametrize("dtype", MOMENTUM_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_checkpoint_goes_on_to_the_bit_and_a_rate_may_be_a_tensor(shape, dtype):
    weight, straight = build(shape=shape, momentum_dtype=dtype)
    for i in range(3):
        step(weight, straight, dense(*shape, seed=i))
    again, resumed = build(shape=shape, momentum_dtype=dtype)
    again.codes, again.scale = weight.codes.clone(), weight.scale.clone()
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.param_groups[0]["lr"] = torch.tensor(LR, dtype=torch.float64)
    for i in range(3, 6):
        step(weight, straight, dense(*shape, seed=i))
        step(again, resumed, dense(*shape, seed=i))
    assert same(bytes_of(weight, straight), bytes_of(again, resumed))


def test_without_the_option_nothing_is_different_and_groups_do_not_hold_it():
    model = hf_stateless.quantize(TINY_MODELS["llama"]().bfloat16())
    optimizer = create_optimizer(model, "sinkgd", lr=1e-3, momentum=MU)
    assert not any("rounding_feedback" in group for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["sinkgd", "swan"])
@pytest.mark.parametrize("key", ["llama", "gpt2", "qwen3_moe"])
def test_layerwise_steps_are_those_of_the_plain_optimizer_to_the_bit(key, name, make_model):
    models = [hf_stateless.quantize(make_model(key).bfloat16()) for _ in range(2)]
    plain = copy.deepcopy(models[0])
    for model, its_name in ((models[0], name), (models[1], f"{name}_layerwise"), (plain, "")):
        options = {"rounding_feedback": True} if its_name else {}
        optimizer = create_optimizer(model, its_name or name, lr=1e-2, weight_decay=0.1, momentum=MU, **options)
        torch.manual_seed(0)
        for _ in range(3):
            model(**tiny_inputs("llama")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    first, second, without = ([*model.state_dict().values()] for model in (*models, plain))
    assert same(first, second)
    assert not same(first, without)


@pytest.mark.parametrize(
    ("quantized", "options", "told"),
    [
        (True, {}, "needs an average to feed: type momentum=0.9 as well"),
        (True, {"momentum": MU, "stochastic_rounding": False}, "leave out stochastic_rounding=false"),
        (False, {"momentum": MU}, "quantization_config=hf_stateless.Int8TrainingConfig()"),
    ],
)
def test_where_it_cannot_work_one_line_says_what_to_type(quantized, options, told):
    model = TINY_MODELS["llama"]().bfloat16()
    model = hf_stateless.quantize(model) if quantized else model
    with pytest.raises(ValueError, match=r"rounding_feedback=true needs .*or leave out rounding_feedback") as error:
        create_optimizer(model, "sinkgd", lr=1e-3, rounding_feedback=True, **options)
    assert told in str(error.value)
    assert "\n" not in str(error.value)

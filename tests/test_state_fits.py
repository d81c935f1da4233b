"""A state that does not fit its parameter is refused by name, before anything is loaded or written."""

import copy

import pytest
import torch
from conftest import dense
from hypothesis import given
from hypothesis import strategies as st

from hf_stateless import StatelessOptimizer, create_optimizer


RULES = {
    "adamw": {"algorithm": "adamw"},
    "adamw_8bit": {"algorithm": "adamw_8bit"},
    "sinkhorn_momentum": {"algorithm": "sinkhorn_momentum"},
    **{rule: {"algorithm": rule} for rule in ("row_moment", "column_moment", "factored")},
    "momentum int8": {"algorithm": "multinorm", "momentum": 0.9},
    "momentum float32": {"algorithm": "multinorm", "momentum": 0.9, "momentum_dtype": "float32"},
    "multinorm": {"algorithm": "multinorm"},
}
MOMENTS = {
    (rule, key)
    for rule, keys in {
        "adamw": ("exp_avg", "exp_avg_sq"),
        "adamw_8bit": ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"),
        "sinkhorn_momentum": ("momentum_buffer",),
        "row_moment": ("row_moment", "row_weight"),
        "momentum int8": ("momentum_buffer", "momentum_scale"),
        "momentum float32": ("momentum_buffer",),
    }.items()
    for key in keys
}
each_moment = pytest.mark.parametrize(("rule", "key"), sorted(MOMENTS))


def optimizer_of(rule, rows=12, columns=8, dtype=torch.float32):
    if rule == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(dense(rows, columns).to(dtype))
    group = {"params": [weight], "param_names": ["model.embed_tokens.weight"], **RULES[rule]}
    return weight, StatelessOptimizer([group], lr=1e-2)


def step(weight, optimizer):
    weight.grad = torch.ones_like(weight)
    optimizer.step()


def trained(rule, **sizes):
    weight, optimizer = optimizer_of(rule, **sizes)
    step(weight, optimizer)
    return weight, optimizer


SHAPES = {
    "one element": lambda t: t.flatten()[:1].clone(),
    "more rows": lambda t: torch.cat([t, t]),
    "fewer rows": lambda t: t[:-1].clone(),
    "transposed": lambda t: t.T.contiguous(),
}


@each_moment
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("when", ["loading", "a step"])
def test_a_moment_of_another_shape_is_refused_with_name_and_shapes(rule, key, kind, when):
    weight, optimizer = trained(rule)
    other = SHAPES[kind](optimizer.state[weight][key])
    before = weight.detach().clone()
    message = rf"state of model\.embed_tokens\.weight has {key} of shape \({other.shape[0]},.*expected \(12,"
    if when == "loading":
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0][key] = other
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        assert optimizer.state[weight][key].shape != other.shape
        step(weight, optimizer)  # what it had is still whole
        assert weight.isfinite().all()
    else:
        optimizer.state[weight][key] = other
        with pytest.raises(ValueError, match=message):
            step(weight, optimizer)
        assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("multinorm", "column_moment")])
@pytest.mark.parametrize("rows", [1, 11, 13, 400])
def test_a_parameter_that_was_resized_after_a_step_is_refused_by_name(rule, rows):
    weight, optimizer = trained(rule)
    weight.data = dense(rows, 8)
    with pytest.raises(ValueError, match=r"embed_tokens.*resize_token_embeddings"):
        step(weight, optimizer)
    assert torch.equal(weight.detach(), dense(rows, 8))


def test_a_matrix_without_moments_may_change_its_shape():
    weight, optimizer = trained("multinorm")
    weight.data = dense(20, 8)
    step(weight, optimizer)
    assert not torch.equal(weight.detach(), dense(20, 8))


@pytest.mark.parametrize("release", ["matrices", "all"])
def test_updates_in_backward_are_refused_too(release):
    weight, _ = optimizer_of("momentum float32")
    optimizer = StatelessOptimizer([{"params": [weight], **RULES["momentum float32"]}], lr=1e-2, release=release)
    optimizer.train()
    weight.sum().backward()
    optimizer.step()
    optimizer.state[weight]["momentum_buffer"] = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"parameter 0 has momentum_buffer of shape \(3, 8\), expected \(12, 8\)"):
        weight.sum().backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("rule", "key"), sorted(m for m in MOMENTS if m[1] not in ("exp_avg", "exp_avg_sq") or m[0] == "adamw")
)
def test_values_that_are_not_finite_are_refused_at_loading(rule, key, bad):
    weight, optimizer = trained(rule)
    saved = copy.deepcopy(optimizer.state_dict())
    if not saved["state"][0][key].is_floating_point():
        pytest.skip("codes are whole numbers")
    saved["state"][0][key].view(-1)[-1] = bad
    with pytest.raises(ValueError, match=rf"saved {key} of model\.embed_tokens\.weight is not finite"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[weight][key].isfinite().all()


@pytest.mark.parametrize(
    ("rule", "key"),
    [("adamw", "exp_avg_sq"), ("adamw", "step"), *(("factored", f"{of}_moment") for of in ("row", "column", "table"))],
)
@given(value=st.floats(-1e30, -1e-30))
def test_negative_second_moments_and_steps_are_refused_at_loading(rule, key, value):
    _, optimizer = trained(rule)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key].view(-1)[0] = value
    with pytest.raises(ValueError, match=rf"saved {key} of model\.embed_tokens\.weight is negative"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_counters_and_steps_do_not_follow_the_default_dtype(rule, default):
    """300 steps: bfloat16 counts to 256 only, and rounding noise would then repeat."""

    def run():
        weight, optimizer = optimizer_of(rule, 16, 8, torch.bfloat16)
        for _ in range(300):
            step(weight, optimizer)
        return weight.detach(), optimizer.state[weight]["step"]

    expected, count = run()
    torch.set_default_dtype(default)
    try:
        weight, other = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert (count, other) == (300, 300)
    assert other.dtype == torch.float32
    assert torch.equal(weight, expected)


def test_the_c_kernel_does_not_follow_the_default_dtype():
    def run():
        weight = torch.nn.Parameter(dense(256, 300))
        optimizer = StatelessOptimizer([{"params": [weight], "algorithm": "multinorm"}], lr=1e-2)
        weight.grad = dense(256, 300, seed=1)
        optimizer.step()
        return weight.detach()

    expected = run()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(run(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("spoil", ["one number for all", "in another order", "every second"])
@pytest.mark.parametrize("embeddings", ["adamw", "sinkhorn_momentum", "row_moment"])
def test_a_state_with_other_strides_is_loaded_by_its_values(make_model, embeddings, spoil):
    def trained(state=None):
        torch.manual_seed(0)
        model = make_model("llama")
        optimizer = create_optimizer(model, "sinkgd", lr=1e-2, embeddings=embeddings)
        for _ in range(2):
            if state is not None:
                optimizer.load_state_dict(state(optimizer.state_dict()))
            model(input_ids=torch.arange(3, 11)[None], labels=torch.arange(3, 11)[None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    def spoiled(saved):
        def other(value):
            if spoil == "in another order" and value.ndim == 2:
                return value.t().contiguous().t()
            if spoil == "every second":
                return torch.stack([value, value], -1).flatten(-2)[..., ::2] if value.ndim else value
            return torch.full((), float(value.float().mean())).to(value.dtype).expand(value.shape)

        return {**saved, "state": {i: {k: other(v) for k, v in s.items()} for i, s in saved["state"].items()}}

    def contiguous(saved):
        saved = spoiled(saved)
        return {**saved, "state": {i: {k: v.contiguous() for k, v in s.items()} for i, s in saved["state"].items()}}

    assert all(torch.equal(a, b) for a, b in zip(trained(spoiled), trained(contiguous), strict=True))


@pytest.mark.parametrize("name", ["sinkgd", "swan", "swan_layerwise"])
@pytest.mark.parametrize(("old", "new"), [("bfloat16", "float32"), ("float32", "float64"), ("float32", "bfloat16")])
def test_a_run_is_resumed_in_another_dtype(make_model, name, old, new):
    model = make_model("llama").to(getattr(torch, old))
    states = []
    for dtype in (old, new):
        model.to(getattr(torch, dtype))
        optimizer = create_optimizer(model, name, lr=1e-2, momentum=0.9)
        if states:
            optimizer.load_state_dict(states[0])
        before = [p.detach().clone() for p in model.parameters()]
        model(input_ids=torch.arange(3, 11)[None], labels=torch.arange(3, 11)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append(optimizer.state_dict())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert sum(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) > 10


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64])
@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_a_state_of_no_float_dtype_is_refused_by_name(make_model, key, dtype):
    model = make_model("llama")
    optimizer = create_optimizer(model, "sinkgd", lr=1e-2)
    model(input_ids=torch.arange(3, 11)[None], labels=torch.arange(3, 11)[None]).loss.backward()
    optimizer.step()
    saved = optimizer.state_dict()
    index = next(i for i, state in saved["state"].items() if key in state)
    saved["state"][index][key] = saved["state"][index][key].to(dtype)
    with pytest.raises(ValueError, match=rf"saved {key} of \S+ is {dtype}, expected torch\.float32: the checkpoint"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("key", ["lr", "initial_lr"])
@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0, "0.1", True])
def test_a_saved_learning_rate_that_is_none_is_refused(make_model, key, rate):
    optimizer = create_optimizer(make_model("llama"), "sinkgd", lr=1e-2)
    saved = optimizer.state_dict()
    saved["param_groups"][0][key] = rate
    with pytest.raises(ValueError, match=r"saved learning rate is .*no finite number of at least 0: the checkpoint"):
        optimizer.load_state_dict(saved)

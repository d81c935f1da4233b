"""Tables with a second moment for each row, each column, or both, against the plain formula in float64."""

import copy
import math

import pytest
import torch
from conftest import DTYPES, dense
from hypothesis import given
from hypothesis import strategies as st
from table_moments_runs import KEPT, gradients, optimizer_of, take_steps
from torch import nn

from hf_stateless import create_optimizer
from hf_stateless.optimizer import table_moments
from hf_stateless.optimizer.rules import RULES
from hf_stateless.update import reads


each_rule = pytest.mark.parametrize("rule", KEPT)


def reference(weight, grads, rule, lr=0.1, decay=0.0, beta2=0.99, eps=1e-8):
    """AdamW's averages after bias correction, of what each row or the table has had, counted; weights in float64."""
    rows, columns = KEPT[rule]
    weight = weight.detach().double().clone()
    biased, count = torch.zeros(len(weight), 1).double(), torch.zeros(len(weight), 1).double()
    of_columns, of_table, seen = torch.zeros(1, weight.shape[1]).double(), 0.0, 0
    for grad in grads:
        squares = grad.double().square()
        present = (squares > 0).any(1, keepdim=True)
        if not present.any():
            continue
        count += present
        biased = torch.where(present, beta2 * biased + (1 - beta2) * squares.mean(1, keepdim=True), biased)
        seen += 1
        mean = squares[present.squeeze(1)].mean(0, keepdim=True)
        of_columns = beta2 * of_columns + (1 - beta2) * mean
        of_table = beta2 * of_table + (1 - beta2) * mean.mean()
        row_root = (biased / (1 - beta2**count)).sqrt()
        if rows:
            profile = (of_columns / of_table).sqrt() if columns else 1.0
            step = grad.double() / (row_root + eps) / profile
        else:
            step = grad.double() / ((of_columns / (1 - beta2**seen)).sqrt() + eps)
        weight = torch.where(present, (1 - lr * decay) * weight - lr * step.nan_to_num(0.0), weight)
    return weight


@each_rule
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 20),
    steps=st.integers(1, 12),
    decay=st.sampled_from([0.0, 0.1]),
    exponent=st.integers(-6, 6),
    wide=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_steps_are_those_of_the_formula(rule, rows, columns, steps, decay, exponent, wide, seed):
    dtype = torch.float64 if wide else torch.float32
    start = dense(rows, columns, dtype=dtype, seed=seed)
    grads = list(gradients((rows, columns), steps, dtype, 10.0**exponent, seed))
    weight = nn.Parameter(start.clone())
    got = take_steps(optimizer_of(rule, weight, weight_decay=decay), grads)
    tolerance = 1e-10 if wide else 2e-5
    torch.testing.assert_close(
        got.double(), reference(start, grads, rule, decay=decay), rtol=tolerance, atol=tolerance
    )


@each_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_every_dtype_and_order_follows_the_formula(rule, dtype, turned):
    shape = (24, 40) if turned else (40, 24)
    start = dense(*shape, dtype=dtype)
    grads = list(gradients((40, 24), 8, dtype))
    start = start.T if turned else start
    weight = nn.Parameter(start.clone())
    got = take_steps(optimizer_of(rule, weight, lr=0.01), grads)
    eps = max(torch.finfo(dtype).eps, 1e-6)
    expected = reference(start, grads, rule, lr=0.01)
    torch.testing.assert_close(got.double(), expected, rtol=8 * eps, atol=8 * eps)
    assert weight.is_contiguous() != turned


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_gradient_are_left_alone(rule, dtype):
    weight = nn.Parameter(dense(6, 4, dtype=dtype))
    optimizer = optimizer_of(rule, weight, weight_decay=0.5)
    take_steps(optimizer, [dense(6, 4, dtype=dtype)])
    before, state = weight.detach().clone(), copy.deepcopy(optimizer.state[weight])
    grad = dense(6, 4, dtype=dtype, seed=1)
    grad[1::2] = 0
    take_steps(optimizer, [grad] * 50)
    assert torch.equal(weight[1::2], before[1::2])
    assert (weight[::2] != before[::2]).all(1).all()
    for name in ("row_moment", "row_weight") if KEPT[rule][0] else ():
        assert torch.equal(optimizer.state[weight][name][1::2], state[name][1::2])
    held = {name: t.clone() for name, t in optimizer.state[weight].items() if name != "step"}
    before = weight.detach().clone()
    take_steps(optimizer, [torch.zeros_like(weight)] * 3)
    assert torch.equal(weight, before)
    assert all(torch.equal(optimizer.state[weight][name], tensor) for name, tensor in held.items())


@each_rule
def test_a_first_gradient_moves_by_the_rate_however_rare_the_row(rule):
    """Bias correction by a row's own gradients: its first one counts whole after a thousand steps of others."""
    weight = nn.Parameter(torch.zeros(2, 8))
    optimizer, often = optimizer_of(rule, weight), torch.tensor([[1e-3] * 8, [0.0] * 8])
    take_steps(optimizer, [often] * 300)
    take_steps(optimizer, [torch.tensor([[1e-3] * 8, [1e-3] * 8])])
    torch.testing.assert_close(weight[1].detach(), torch.full((8,), -0.1), rtol=1e-3, atol=0)


@each_rule
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("waits", [True, False])
def test_bad_gradients_leave_table_and_averages_alone(rule, value, waits, monkeypatch, caplog):
    """Also where the host must not wait for the device to know."""
    if not waits:
        monkeypatch.setattr(reads, "_READ_AT_ONCE", ())
    weight = nn.Parameter(dense(5, 3, dtype=torch.bfloat16))
    optimizer = optimizer_of(rule, weight, weight_decay=0.1)
    take_steps(optimizer, [dense(5, 3, dtype=torch.bfloat16)])
    before, state = weight.detach().clone(), copy.deepcopy(optimizer.state[weight])
    grad = dense(5, 3, dtype=torch.bfloat16)
    grad[2, 1] = value
    take_steps(optimizer, [grad])
    assert torch.equal(weight, before)
    assert all(torch.equal(optimizer.state[weight][name], tensor) for name, tensor in state.items())
    assert "parameter 0 has NaN" in caplog.text
    take_steps(optimizer, [dense(5, 3, dtype=torch.bfloat16)])
    assert weight.isfinite().all()
    assert optimizer.state[weight]["step"] == 2


@each_rule
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_extreme_sizes_and_columns_without_gradient_stay_finite(rule, scale, eps):
    weight = nn.Parameter(torch.ones(8, 5))
    grads = [dense(8, 5, seed=i) * scale for i in range(4)]
    for grad in grads:
        grad[:, 2] = 0
        grad[3] *= 1e-6
    take_steps(optimizer_of(rule, weight, eps=eps), grads)
    assert weight.isfinite().all()
    assert torch.equal(weight[:, 2], torch.ones(8))


@each_rule
def test_bf16_weights_follow_a_float32_run_below_their_spacing(rule):
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.ones(64, 128, dtype=dtype))
        grads = [(torch.ones(64, 128) + 0.3 * dense(64, 128, seed=step)).to(dtype) for step in range(40)]
        moved[dtype] = 1 - take_steps(optimizer_of(rule, weight, lr=3e-5), grads).float().mean().item()
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.1)


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_work_in_blocks_changes_no_bit_of_weights(rule, dtype, monkeypatch):
    results = []
    for block in (1 << 18, 100):
        monkeypatch.setattr(table_moments, "_BLOCK_ON_CPU", block)
        weight = nn.Parameter(dense(50, 24, dtype=dtype))
        results.append(take_steps(optimizer_of(rule, weight), gradients((50, 24), 3, dtype)).float())
    torch.testing.assert_close(results[1], results[0], rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


@each_rule
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), ()])
def test_what_is_no_table_is_refused_in_one_line(rule, shape):
    weight = nn.Parameter(torch.ones(shape))
    with pytest.raises(ValueError, match=r"tables of two dimensions, got the shape .*algorithm='adamw'"):
        take_steps(optimizer_of(rule, weight), [torch.ones(shape)])


@each_rule
@pytest.mark.parametrize("shape", [(1, 1), (300, 7), (7, 300)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_is_a_number_or_two_for_a_row_and_one_for_a_column(rule, shape, dtype):
    weight = nn.Parameter(dense(*shape, dtype=dtype))
    optimizer = optimizer_of(rule, weight)
    take_steps(optimizer, [torch.ones_like(weight)])
    kept = optimizer.state[weight].values()
    predicted = RULES[rule].state_bytes(shape, dtype, optimizer.param_groups[0])
    assert sum(tensor.nbytes for tensor in kept) == predicted <= 4 + 8 * (2 * shape[0] + shape[1] + 2)


def test_heads_may_have_another_rule_than_embeddings(make_model):
    for embeddings, heads, expected in (
        ("row_moment", "column_moment", ("row_moment", "column_moment", "adamw")),
        ("adamw", "factored", ("adamw", "factored", "adamw")),
        ("stateless", "row_moment", ("multinorm", "row_moment", "multinorm")),
        ("factored", "stateless", ("factored", "multinorm", "adamw")),
    ):
        groups = create_optimizer(make_model("llama"), "sinkgd", lr=1e-3, embeddings=embeddings, heads=heads)
        found = {group["role"]: group["algorithm"] for group in groups.param_groups}
        assert tuple(found[role] for role in ("embedding", "head", "rest")) == expected
    tied = create_optimizer(make_model("llama_tied"), "sinkgd", lr=1e-3, embeddings="row_moment", heads="adamw")
    assert {group["role"]: group["algorithm"] for group in tied.param_groups}["embedding"] == "row_moment"


def test_options_reach_the_groups(make_model):
    options = {"embeddings": "factored", "table_beta2": 0.9, "adamw_eps": 1e-6, "adamw_lr": 1e-2}
    groups = create_optimizer(make_model("llama"), "sinkgd", lr=1e-3, **options).param_groups
    tables = [group for group in groups if group["algorithm"] == "factored"]
    assert {(group["table_beta2"], group["eps"], group["lr"]) for group in tables} == {(0.9, 1e-6, 1e-2)}


@each_rule
def test_low_rank_factors_of_embeddings_stay_with_adamw(rule, make_model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    groups = create_optimizer(model, "sinkgd", lr=1e-3, embeddings=rule).param_groups
    found = {name: group["algorithm"] for group in groups for name in group["param_names"]}
    factors = {algorithm for name, algorithm in found.items() if "lora_embedding" in name}
    assert factors == {"adamw"}

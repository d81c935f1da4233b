"""`width_rule`: the step of a matrix depends on the shape of the whole weight, and on nothing else."""

import math

import pytest
import torch
from conftest import TINY_MODELS, dense
from hypothesis import given
from hypothesis import strategies as st

from hf_stateless import PRESETS, StatelessOptimizer, create_optimizer, multi_normalize
from hf_stateless.update.width import WIDTH_RULES, width_factor


sizes = st.integers(1, 1 << 15)
RULES = [rule for rule in WIDTH_RULES if rule != "none"]
# A weight as it is stored, and its (out_features, in_features).
STORED = {
    "out_in": ((6, 10), (6, 10)),
    "in_out": ((10, 6), (6, 10)),
    "conv": ((6, 5, 2, 1), (6, 10)),
}


@pytest.mark.parametrize("rule", WIDTH_RULES)
def test_every_rule_leaves_the_square_base_as_it_is(rule):
    assert width_factor(rule, 256, 256) == 1


@given(sizes, sizes)
def test_spectral_gives_a_flat_spectrum_the_norm_sqrt_of_out_over_in(rows, columns):
    norm = width_factor("spectral", rows, columns) * math.sqrt(max(rows, columns))
    assert norm == pytest.approx(math.sqrt(256 * rows / columns))


@given(sizes, sizes)
def test_fan_in_gives_an_update_of_rank_one_the_norm_sqrt_of_out_over_in(rows, columns):
    norm = width_factor("fan_in", rows, columns) * math.sqrt(rows * columns)
    assert norm == pytest.approx(256 * math.sqrt(rows / columns))


@pytest.mark.parametrize("shape", [(64, 64), (16, 96), (96, 16)])
def test_a_whitened_step_has_the_same_reach_at_every_shape(shape):
    """The largest change of a normed output by a normed input: sqrt(n / m) times the spectral norm of the step."""
    update = multi_normalize(dense(*shape, dtype=torch.float64), ("spectral",), 1, whitening="eigh")
    norm = torch.linalg.matrix_norm(update, 2).item() * width_factor("spectral", *shape)
    assert norm * math.sqrt(shape[1] / shape[0]) == pytest.approx(16, rel=1e-6)


def step_of(shape, **options):
    """The change of a weight of zeros by one step."""
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = dense(*shape)
    StatelessOptimizer([{"params": [weight], "algorithm": "multinorm", "lr_scale": 1.0, **options}], lr=1.0).step()
    return weight.detach()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", STORED)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_step_is_scaled_by_the_factor_of_the_matrix_whatever_its_layout(preset, layout, rule):
    stored, (rows, columns) = STORED[layout]
    chain = {"norms": PRESETS[preset].norms, "num_iterations": 1, "layout": layout}
    expected = step_of(stored, **chain) * width_factor(rule, rows, columns)
    torch.testing.assert_close(step_of(stored, width_rule=rule, **chain), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_each_expert_is_a_matrix_of_its_own(layout, rule):
    factor = width_factor(rule, *((6, 10) if layout == "out_in" else (10, 6)))
    expected = step_of((3, 6, 10), layout=layout) * factor
    torch.testing.assert_close(step_of((3, 6, 10), layout=layout, width_rule=rule), expected)


@pytest.mark.parametrize("rule", RULES)
def test_decay_is_not_scaled_and_vectors_have_no_width(rule):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    weight.grad = dense(4, 4)
    group = {"params": [weight], "algorithm": "multinorm", "lr_scale": 0.0, "weight_decay": 0.1, "width_rule": rule}
    StatelessOptimizer([group], lr=1.0).step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), 0.9))
    options = {"norms": ("frobenius",), "num_iterations": 1, "layout": "vector", "lr_scale": 1.0}
    torch.testing.assert_close(step_of((7,), width_rule=rule, **options), step_of((7,), **options))


def test_matrices_of_several_shapes_share_a_group_and_a_checkpoint_keeps_its_options():
    shapes = ((6, 10), (10, 6))
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = dense(*weight.shape)
    group = {"params": weights, "algorithm": "multinorm", "lr_scale": 1.0, "width_rule": "fan_in"}
    optimizer = StatelessOptimizer([group], lr=1.0)
    optimizer.step()
    for weight, shape in zip(weights, shapes, strict=True):
        torch.testing.assert_close(weight.detach(), step_of(shape) * 256 / shape[1])
    assert optimizer.state_dict()["param_groups"][0]["lr_scale"] == 1.0


@pytest.mark.parametrize("embeddings", ["adamw", "stateless"])
def test_linear_layers_and_a_stateless_head_have_a_width_and_nothing_else(embeddings):
    options = {"width_rule": "spectral", "embeddings": embeddings}
    groups = create_optimizer(TINY_MODELS["llama"](), "sinkgd", lr=1e-3, **options).param_groups
    rules = {group["role"]: group["width_rule"] for group in groups if group["algorithm"] == "multinorm"}
    stateless = {"embedding": "none", "head": "spectral", "rest": "none"}
    assert rules == {"matrix": "spectral", **(stateless if embeddings == "stateless" else {})}


def test_adapters_keep_their_step():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(TINY_MODELS["llama"](), config)
    groups = create_optimizer(model, "swan", lr=1e-3, width_rule="spectral").param_groups
    assert {(group["role"], group["width_rule"]) for group in groups} == {("adapter", "none")}

"""`scale=operator`: the largest singular value of an update is that of a white matrix, everywhere a chain works."""

import math

import pytest
import torch
from conftest import DTYPES, dense, gradients, relative_error
from hypothesis import given
from hypothesis import strategies as st
from lora_pairs import SINKHORN, changes, example
from optimizer_groups import group

from hf_stateless import PRESETS, StatelessOptimizer, create_optimizer, multi_normalize
from hf_stateless.norms import sinkhorn
from hf_stateless.norms.chain import Chain
from hf_stateless.norms.projections import NORMS
from hf_stateless.norms.scale import scale_to_operator
from hf_stateless.optimizer.lora_product import product_steps
from hf_stateless.optimizer.rules import complete_group, told_options
from hf_stateless.weights.int8.codes import quantize_matrix
from hf_stateless.weights.int8.weight import Int8Weight


CHAINS = {
    "sinkgd": Chain(),
    "rows": Chain(("row_l2",), 1),
    "signs": Chain(("sign",), 1),
    "standardized": Chain(("row_standardize", "col_l2"), 2),
    "polar": Chain(("row_l2", "col_l2", "spectral"), 1, "polar_express", 1),
    "polar, then rows": Chain(("spectral", "row_l2"), 1, "polar_express", 2),
}
each_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
SHAPES = ((40, 40), (96, 24), (24, 96), (3, 200), (200, 3))


def by_operator(chain):
    return Chain(**{**vars(chain), "scale": "operator"})


def operator_norm(x):
    return torch.linalg.matrix_norm(x.double(), 2)


def spiked(m, n, direction, size=3.0):
    """Noise and one direction of the input features that all rows share."""
    return dense(m, n) + size * dense(m, 1, seed=1).sign() * direction


def kinds(m, n):
    """Matrices of the shapes of spectrum that gradients have, some with a direction that hides from plain starts."""
    i = torch.arange(n, dtype=torch.float32)
    directions = {
        "mean": torch.ones(n),
        "alternating": (-1.0) ** i,
        "halves": torch.where(i < n // 2, 1.0, -1.0),
        "slope": (i - i.mean()) / n,
        "wave": torch.sin(2 * math.pi * i / n),
        "first": (i == 0).float(),
        "last": (i == n - 1).float(),
    }
    return {
        "noise": dense(m, n),
        "rank 1": dense(m, 1) @ dense(1, n, seed=1),
        "rank 4": dense(m, 4) @ dense(4, n, seed=1),
        "decaying": (dense(m, m) / torch.arange(1, m + 1).sqrt()) @ dense(m, n, seed=1),
        "smooth": 1 / (1 + (torch.arange(m)[:, None] - i).abs()),
        "constant": torch.ones(m, n),
        **{f"noise and {name}": spiked(m, n, direction) for name, direction in directions.items()},
    }


@given(gradients(dtypes=(torch.float32, torch.float64)), st.sampled_from(list(CHAINS.values())))
def test_the_update_is_that_of_the_chain_made_smaller_and_no_smaller_than_a_white_one(grad, chain):
    plain, scaled = chain.normalize(grad), by_operator(chain).normalize(grad)
    factors = operator_norm(scaled) / operator_norm(plain).clamp_min(1e-30)
    assert relative_error(scaled, plain * factors[..., None, None].to(plain)) <= 1e-5 or not plain.any()
    assert (factors <= 1 + 1e-6).all()
    white = math.sqrt(max(grad.shape[-2:]))
    assert (operator_norm(scaled) >= (1 - 1e-5) * torch.minimum(operator_norm(plain), torch.tensor(white))).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_chain
def test_the_estimate_is_near_the_largest_singular_value_and_never_above_it(chain, shape):
    white = math.sqrt(max(shape))
    for name, grad in kinds(*shape).items():
        plain, scaled = chain.normalize(grad), by_operator(chain).normalize(grad)
        got = operator_norm(scaled)
        assert got >= (1 - 1e-5) * min(white, operator_norm(plain)), name
        assert got <= white / 0.6, name


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (4, 1, 9)], ids=str)
@each_chain
def test_one_row_or_column_stays_as_it_is(chain, shape):
    grad = dense(*shape)
    torch.testing.assert_close(by_operator(chain).normalize(grad), chain.normalize(grad))


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)], ids=str)
def test_a_white_matrix_stays_as_it_is(shape):
    white = multi_normalize(dense(*shape, dtype=torch.float64), ("spectral",), 1, whitening="eigh")
    torch.testing.assert_close(scale_to_operator(white), white)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_chain
def test_every_dtype_is_computed_in_at_least_float32(chain, dtype):
    grad = dense(3, 24, 17).to(dtype)
    wide = by_operator(chain).normalize(grad.double())
    assert relative_error(by_operator(chain).normalize(grad), wide) <= 1e-4
    assert multi_normalize(grad, **vars(by_operator(chain))).dtype == dtype


@pytest.mark.parametrize("power", [-99, 99])
@each_chain
def test_the_scale_of_the_gradient_does_not_matter(chain, power):
    grad, chain = dense(12, 20), by_operator(chain)
    torch.testing.assert_close(chain.normalize(grad * 2.0**power), chain.normalize(grad), rtol=1e-5, atol=1e-6)


@each_chain
def test_matrices_of_a_stack_are_scaled_alone(chain):
    grads = [dense(9, 14), torch.zeros(9, 14), dense(9, 1) @ dense(1, 14), dense(9, 14, seed=3) * 1e-20]
    grads.append(torch.full((9, 14), torch.nan))
    chain = by_operator(chain)
    *stack, spoiled = chain.normalize(torch.stack(grads))
    for one, grad in zip(stack, grads[:-1], strict=True):
        torch.testing.assert_close(one, chain.normalize(grad), rtol=1e-4, atol=1e-5)
    assert not stack[1].any()
    assert not spoiled.isfinite().any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@each_chain
def test_what_is_not_finite_does_not_become_finite(chain, value):
    grad = dense(6, 10)
    grad[2, 3] = value
    assert not by_operator(chain).normalize(grad).isfinite().all()


def test_a_zero_row_does_not_make_the_others_larger():
    grad = dense(64, 4)
    grad[4:] = 0
    assert multi_normalize(grad, scale="operator").norm() <= multi_normalize(grad).norm()


@pytest.mark.parametrize("name", ["operators", "", None, "RMS"])
def test_another_scale_is_refused(name):
    with pytest.raises(ValueError, match="Valid: rms, operator"):
        multi_normalize(dense(2, 3), scale=name)


def test_a_chain_that_scales_by_operator_needs_the_whole_matrix():
    for name, norm in NORMS.items():
        assert Chain((name,), 1).needs == norm.needs
        assert Chain((name,), 1, scale="operator").needs == {"rows", "columns"}


@pytest.mark.parametrize("pairs", [2, 3, 5])
@pytest.mark.parametrize("scale", ["rms", "operator"])
@pytest.mark.parametrize("last", ["spectral", "sign", "row_l2", "row_standardize"])
def test_sinkhorn_written_out_at_the_start_of_a_chain_is_the_alternation(pairs, scale, last):
    grad, norms = dense(18, 30), ("row_l2", "col_l2") * pairs + (last,)
    options = {"whitening": "polar_express", "ns_steps": 1}
    x = grad
    for name in norms:
        x = NORMS[name](x, **(options if name == "spectral" else {}))
    expected = scale_to_operator(x) if scale == "operator" else x
    assert relative_error(multi_normalize(grad, norms, 1, scale=scale, **options), expected) <= 1e-5


# ---- By the optimizer


def step_of(grad, dtype=torch.float32, **options):
    """What a step of size one takes from a weight of zeros."""
    weight = torch.nn.Parameter(torch.zeros(grad.shape, dtype=dtype))
    weight.grad = grad.to(dtype)
    StatelessOptimizer([group(weight, lr_scale=1.0, **options)], lr=1.0).step()
    return -weight.detach()


@pytest.mark.parametrize("layout", ["out_in", "in_out", "conv", "in_outs", "out_in*3", "out_in/2"])
@each_chain
def test_every_layout_steps_by_the_scaled_chain(chain, layout):
    grad = dense(12, 5, 4) if layout in ("conv", "in_outs") else dense(12, 20)
    matrix = {"in_out": grad.mT, "in_outs": grad.flatten(1).mT, "conv": grad.flatten(1)}.get(layout, grad)
    step = step_of(grad, layout=layout, **vars(by_operator(chain)))
    back = {"in_out": step.mT, "in_outs": step.flatten(1).mT, "conv": step.flatten(1)}.get(layout, step)
    if layout == "out_in*3":
        matrix, back = matrix.view(3, 4, 20), back.view(3, 4, 20)
    elif layout == "out_in/2":
        matrix, back = (x.view(12, 10, 2).movedim(-1, 0) for x in (matrix, back))
    torch.testing.assert_close(back, by_operator(chain).normalize(matrix), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 20), (3, 12, 20), (300, 260)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sinkgd_steps_by_the_scaled_chain_from_its_vectors(shape, dtype):
    grad = dense(*shape)
    step = step_of(grad, dtype, scale="operator", stochastic_rounding=False)
    expected = multi_normalize(grad.to(dtype), scale="operator", dtype=torch.float64)
    assert relative_error(step, expected) <= (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("block", [20, 64, 150])
def test_a_large_matrix_is_scaled_in_blocks(block, monkeypatch):
    grad = dense(31, 20)
    expected = step_of(grad, scale="operator")
    monkeypatch.setattr(sinkhorn, "_BLOCK", block)
    assert len(sinkhorn.row_blocks(grad)) > 4
    torch.testing.assert_close(step_of(grad, scale="operator"), expected, rtol=1e-5, atol=1e-6)


@each_chain
def test_weights_in_8_bits_step_as_float_ones(chain):
    options = {**vars(by_operator(chain)), "stochastic_rounding": False, "lr_scale": 1.0}
    stored = Int8Weight(*quantize_matrix(dense(12, 20, seed=1), None))
    weight = torch.nn.Parameter(stored.dequantize(torch.float32).clone())
    for p in (weight, stored):
        p.grad = dense(12, 20).to(p.dtype)
        StatelessOptimizer([group(p, **options)], lr=0.5).step()
    assert relative_error(stored.dequantize(torch.float32), weight.detach()) <= 0.02


@pytest.mark.parametrize("options", [{"scale": "operator"}, {"scale": "operator", "embeddings": "stateless"}], ids=str)
@pytest.mark.parametrize("name", ["sinkgd", "swan", "sinkgd_polar"])
def test_layerwise_is_the_same_update(name, options, make_model):
    weights = []
    for suffix in ("", "_layerwise"):
        torch.manual_seed(0)
        model = make_model("llama")
        optimizer = create_optimizer(model, name + suffix, lr=1e-2, **options)
        ids = torch.arange(16).view(1, 16)
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (64, 8)], ids=str)
def test_a_step_of_a_lora_pair_changes_the_product_by_an_operator_norm(shape):
    A, B, grad_a, grad_b = example(*shape)
    steps = {
        scale: product_steps(A, B, grad_a, grad_b, size=0.1, scaling=2.0, scale=scale, **SINKHORN)
        for scale in ("rms", "operator")
    }
    _, by_b = changes(A, B, *steps["operator"], 2.0)
    assert 0.1 * (1 - 1e-5) <= operator_norm(by_b) <= 0.1 / 0.7
    assert operator_norm(by_b) < operator_norm(changes(A, B, *steps["rms"], 2.0)[1])


# ---- In groups and checkpoints


@pytest.mark.parametrize("given", [{}, {"scale": "rms"}, {"lora": "product"}], ids=str)
@pytest.mark.parametrize("name", ["sinkgd", "swan", "multinorm_layerwise"])
def test_groups_do_not_hold_the_default(name, given, make_model):
    optimizer = create_optimizer(make_model("llama"), name, lr=1e-3, **given)
    assert not any("scale" in group for group in optimizer.param_groups)
    assert not any("scale" in told_options(group) for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["swan", "sinkgd", "sinkgd_polar"])
def test_groups_of_matrices_hold_and_tell_what_is_no_default(name, make_model):
    optimizer = create_optimizer(make_model("llama"), name, lr=1e-3, scale="operator")
    scales = {group["role"]: told_options(group).get("scale") for group in optimizer.param_groups}
    assert scales == {"matrix": "operator", "embedding": None, "head": None, "rest": None}


@pytest.mark.parametrize("algorithm", ["adamw", "row_moment"])
def test_groups_without_a_chain_take_no_scale(algorithm):
    with pytest.raises(ValueError, match="no option 'scale'"):
        complete_group({"params": [], "algorithm": algorithm, "scale": "operator"}, lr=0.1)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"scale": "operator"}, ("scale='rms'", "scale='operator'")),
        ({"scale": "operator"}, {}, ("scale='operator'", "scale='rms'")),
        ({"scale": "operator"}, {"scale": "operator"}, ()),
        ({}, {"scale": "rms"}, ()),
    ],
    ids=str,
)
def test_another_scale_at_resume_is_applied_with_one_warning(before, after, told, make_model, caplog):
    saved = create_optimizer(make_model("llama"), "sinkgd", lr=1e-3, **before)
    resumed = create_optimizer(make_model("llama"), "sinkgd", lr=1e-3, **after)
    expected = [group.get("scale") for group in resumed.param_groups]
    resumed.load_state_dict(saved.state_dict())
    assert [group.get("scale") for group in resumed.param_groups] == expected
    lines = [record.getMessage() for record in caplog.records if "was written with" in record.getMessage()]
    assert len(lines) == bool(told)
    assert all(part in lines[0] for part in told)


# ---- Presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_all_that_its_groups_hold(name, make_model):
    made = create_optimizer(make_model("llama"), name, lr=1e-3).param_groups[0]
    preset = PRESETS[name]
    assert preset.chain == Chain.of({**preset.group(), "whitening": preset.whitening})
    whitening = {"ns_steps": None, "ns_beta": None, "ns_dtype": None}
    defaults = Chain.of({**made, **whitening, "ns_steps": preset.ns_steps})
    assert defaults == preset.chain
    x = dense(20, 12)
    torch.testing.assert_close(Chain.of(made).normalize(x), preset.chain.normalize(x))

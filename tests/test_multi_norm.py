"""Chains of projections against the alternating scheme written out in float64, and the presets as instances of it."""

import pytest
import reference
import torch
from conftest import DTYPES, dense, gradients, relative_error
from hypothesis import given
from hypothesis import strategies as st

from hf_stateless.norms.chain import multi_normalize
from hf_stateless.norms.presets import PRESETS
from hf_stateless.norms.projections import NORMS
from hf_stateless.norms.sinkhorn import sr_sinkhorn


def whitened(x):
    return reference.frobenius(reference.polar_express(x))


REFERENCES = {
    "row_l2": reference.row_l2,
    "col_l2": reference.col_l2,
    "row_standardize": reference.row_standardize,
    "spectral": whitened,
    "sign": reference.sign,
    "frobenius": reference.frobenius,
}
CHEAP_CHAINS = [
    ("row_l2",),
    ("col_l2",),
    ("sign",),
    ("frobenius",),
    ("row_l2", "col_l2"),
    ("col_l2", "row_l2"),
    ("row_standardize", "col_l2"),
    ("row_l2", "col_l2", "row_l2"),
    ("frobenius", "row_l2", "col_l2"),
]
SHAPES = [(1, 9), (9, 1), (24, 24), (17, 40), (40, 17)]
each_chain = pytest.mark.parametrize("norms", [*CHEAP_CHAINS, ("row_l2", "spectral")], ids="+".join)


def expected_of(grad, norms, num_iterations):
    return reference.multi_normalize(grad, [REFERENCES[name] for name in norms], num_iterations)


@pytest.mark.parametrize("num_iterations", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norms", CHEAP_CHAINS, ids="+".join)
def test_a_chain_is_the_alternation_of_its_projections(norms, shape, num_iterations):
    grad = dense(*shape) if "row_standardize" not in norms else dense(shape[0], max(shape[1], 8))
    result = multi_normalize(grad, norms, num_iterations)
    assert relative_error(result, expected_of(grad, norms, num_iterations)) <= 1e-6


@pytest.mark.parametrize(
    "norms", [("spectral",), ("row_l2", "spectral"), ("row_l2", "spectral", "col_l2")], ids="+".join
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_chain_with_whitening_runs_polar_express(norms, shape):
    grad = dense(*shape)
    assert relative_error(multi_normalize(grad, norms, 1), expected_of(grad, norms, 1)) <= 1e-4


def test_defaults_are_sr_sinkhorn_with_five_iterations():
    grad = dense(17, 40)
    assert torch.equal(multi_normalize(grad), sr_sinkhorn(grad, 5))
    assert relative_error(multi_normalize(grad), reference.multi_normalize(grad)) <= 1e-6


def test_the_sinkgd_preset_is_sr_sinkhorn():
    preset = PRESETS["sinkgd"]
    grad = dense(17, 40)
    result = multi_normalize(grad, preset.norms, preset.num_iterations)
    assert relative_error(result, reference.multi_normalize(grad)) <= 1e-6


@pytest.mark.parametrize("shape", SHAPES[2:])
def test_the_swan_preset_is_swan(shape):
    preset = PRESETS["swan"]
    grad = dense(*shape)
    assert relative_error(multi_normalize(grad, preset.norms, preset.num_iterations), reference.swan(grad)) <= 1e-4


@pytest.mark.parametrize("shape", SHAPES[2:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_swan_on_half_gradients_is_rounded_only_at_the_end(dtype, shape):
    """Whitening amplifies small singular values 990 times, so a half-precision rounding before it would dominate."""
    preset = PRESETS["swan"]
    grad = dense(*shape, dtype=dtype)
    result = multi_normalize(grad, preset.norms, preset.num_iterations)
    assert result.dtype == dtype
    assert relative_error(result, reference.swan(grad)) <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("norms", CHEAP_CHAINS, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_any_chain_on_half_gradients_is_rounded_only_at_the_end(norms, dtype):
    grad = dense(17, 40, dtype=dtype)
    half_ulp = torch.finfo(dtype).eps / 2
    expected = expected_of(grad, norms, 3)
    torch.testing.assert_close(multi_normalize(grad, norms, 3).double(), expected, rtol=half_ulp * 1.01, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[2:])
def test_without_centring_swan_is_row_norms_then_whitening(shape):
    grad = dense(*shape)
    assert relative_error(multi_normalize(grad, ("row_l2", "spectral"), 1), reference.swan(grad, center=False)) <= 1e-4


@pytest.mark.parametrize(("steps", "beta"), [(6, 0.5), (3, 0.8)])
def test_steps_and_beta_reach_the_whitening(steps, beta):
    grad = dense(17, 40)
    options = {"whitening": "newton_schulz", "ns_steps": steps, "ns_beta": beta}
    result = multi_normalize(grad, ("row_standardize", "spectral"), 1, **options)
    assert relative_error(result, reference.swan_of_the_paper(grad, steps, beta)) <= 1e-4


def test_the_name_of_a_whitening_reaches_the_whitening():
    grad = dense(17, 40)
    polar = reference.frobenius(reference.polar(grad))
    assert relative_error(multi_normalize(grad, ("spectral",), 1, whitening="eigh"), polar) <= 1e-4
    nsds = reference.frobenius(reference.nsds(grad))
    assert relative_error(multi_normalize(grad, ("spectral",), 1, whitening="nsds"), nsds) <= 1e-5


@each_chain
@given(grad=gradients(), num_iterations=st.integers(1, 3))
def test_shape_dtype_finiteness_and_unit_size_over_shape_dtype_and_scale(norms, grad, num_iterations):
    before = grad.clone()
    result = multi_normalize(grad, norms, num_iterations)
    assert torch.equal(grad, before)
    assert (result.dtype, result.shape) == (grad.dtype, grad.shape)
    assert result.isfinite().all()
    if "row_standardize" not in norms:  # centring may leave nothing of a row of two or three entries
        rms = result.double().square().mean(dim=(-2, -1)).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=max(1e-5, torch.finfo(grad.dtype).eps), atol=0)


@each_chain
@given(grad=gradients(dtypes=(torch.float32, torch.bfloat16)), exponent=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_changes_no_bit(norms, grad, exponent):
    assert torch.equal(multi_normalize(grad * 2.0**exponent, norms, 2), multi_normalize(grad, norms, 2))


@each_chain
@pytest.mark.parametrize("shape", [(4, 5, 9), (2, 3, 9, 5)])
def test_a_batch_equals_a_loop(norms, shape):
    grad = dense(*shape)
    loop = torch.stack([multi_normalize(g, norms, 2) for g in grad.reshape(-1, *shape[-2:])]).view(shape)
    assert relative_error(multi_normalize(grad, norms, 2), loop) <= (1e-4 if "spectral" in norms else 1e-6)


@pytest.mark.parametrize("num_iterations", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_transposed_chain_on_the_transposed_gradient_is_the_transposed_update(shape, num_iterations):
    grad = dense(*shape)
    mirrored = multi_normalize(grad.mT, ("col_l2", "row_l2"), num_iterations).mT
    assert relative_error(mirrored, multi_normalize(grad, ("row_l2", "col_l2"), num_iterations)) <= 1e-6


@each_chain
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gives_zero(norms, dtype):
    zero = torch.zeros(4, 6, dtype=dtype)
    assert torch.equal(multi_normalize(zero, norms, 2), zero)


@each_chain
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_entry_shows_in_the_output(norms, value):
    grad = dense(4, 6)
    grad[2, 3] = value
    assert not multi_normalize(grad, norms, 2).isfinite().all()


@pytest.mark.parametrize("norms", [("row_l1",), ("row_l2", "spectrum"), ()])
def test_unknown_norms_are_refused_with_the_valid_names(norms):
    with pytest.raises(ValueError, match=".*".join(NORMS)):
        multi_normalize(dense(3, 4), norms)


def test_a_string_is_not_taken_for_a_chain_of_letters():
    with pytest.raises(ValueError, match="row_l2"):
        multi_normalize(dense(3, 4), "row_l2")


@pytest.mark.parametrize("num_iterations", [0, -1])
def test_fewer_than_one_iteration_is_refused(num_iterations):
    with pytest.raises(ValueError, match=f"num_iterations.*{num_iterations}"):
        multi_normalize(dense(3, 4), num_iterations=num_iterations)


def test_a_vector_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"\(7,\)"):
        multi_normalize(torch.ones(7))

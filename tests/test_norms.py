"""Norm projections against float64 references, and the properties each of them claims."""

import functools

import pytest
import reference
import torch
from conftest import DTYPES, dense, gradients, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_stateless.norms.projections import NORMS, col_l2, frobenius, row_l2, row_standardize, sign, spectral


# Projections in the strict sense: applying them twice changes nothing.
EXACT = {
    "row_l2": row_l2,
    "col_l2": col_l2,
    "row_standardize": row_standardize,
    "sign": sign,
    "frobenius": frobenius,
    "spectral_eigh": functools.partial(spectral, whitening="eigh"),
}
POLYNOMIALS = {f"spectral_{name}": functools.partial(spectral, whitening=name) for name in ("nsds", "polar_express")}
PROJECTIONS = {**EXACT, "spectral": spectral, **POLYNOMIALS}
REFERENCES = {
    "row_l2": reference.row_l2,
    "col_l2": reference.col_l2,
    "row_standardize": reference.row_standardize,
    "sign": reference.sign,
    "frobenius": reference.frobenius,
}

each_projection = pytest.mark.parametrize("project", PROJECTIONS.values(), ids=PROJECTIONS)
each_exact = pytest.mark.parametrize("project", EXACT.values(), ids=EXACT)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rounding(dtype):
    """Relative error of one rounding to the output dtype, or 1e-6 where the computation itself is the limit."""
    return max(1e-6, torch.finfo(dtype).eps / 2)


def orthogonal(size, seed):
    matrix = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(matrix)[0]


def permutation(size, seed):
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def test_the_table_of_norms_is_complete():
    assert set(NORMS) == {"row_l2", "col_l2", "row_standardize", "spectral", "sign", "frobenius"}


@pytest.mark.parametrize("name", REFERENCES)
@given(grad=gradients(min_columns=4))
def test_matches_the_float64_reference(name, grad):
    for matrix in grad.reshape(-1, *grad.shape[-2:]):
        result = NORMS[name](matrix)
        assert relative_error(result, REFERENCES[name](matrix)) <= rounding(grad.dtype)


@each_projection
@given(grad=gradients(min_columns=4))
def test_entries_have_root_mean_square_one(project, grad):
    rms = project(grad).double().square().mean(dim=(-2, -1)).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=max(1e-5, torch.finfo(grad.dtype).eps), atol=0)


@each_exact
@given(grad=gradients(min_columns=4))
def test_a_second_application_changes_nothing(project, grad):
    once = project(grad)
    tolerance = max(1e-4, 2 * torch.finfo(grad.dtype).eps)
    torch.testing.assert_close(project(once), once, rtol=tolerance, atol=tolerance)


@each_projection
@given(grad=gradients(dtypes=(torch.float32, torch.bfloat16, torch.float64)), exponent=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_changes_no_bit(project, grad, exponent):
    assert torch.equal(project(grad * 2.0**exponent), project(grad))


@each_projection
@pytest.mark.parametrize("exponent", [-4, 3])
def test_scaling_by_a_power_of_two_changes_no_bit_in_float16(project, exponent):
    grad = dense(6, 9, dtype=torch.float16)
    assert torch.equal(project(grad * 2.0**exponent), project(grad))


@each_projection
@pytest.mark.parametrize("scale", [1e-30, 3e-19, 1e-8, 0.7, 1e8, 1e30])
def test_scaling_by_any_positive_number_changes_nothing(project, scale):
    grad = dense(12, 31)
    assert relative_error(project(grad * scale), project(grad)) <= 1e-5


@each_projection
@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 4), (3, 5, 2)])
def test_zero_gives_zero(project, dtype, shape):
    assert torch.equal(project(torch.zeros(shape, dtype=dtype)), torch.zeros(shape, dtype=dtype))


@each_projection
@given(grad=gradients())
def test_dtype_shape_and_finiteness_are_kept(project, grad):
    result = project(grad)
    assert (result.dtype, result.shape) == (grad.dtype, grad.shape)
    assert result.isfinite().all()


@each_projection
@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (6, 9), (1, 400)])
def test_the_largest_and_smallest_numbers_of_a_dtype_stay_finite(project, dtype, shape):
    limits = torch.finfo(dtype)
    signs = dense(*shape, dtype=dtype).sign()
    values = torch.tensor([limits.max, limits.tiny, limits.smallest_normal * limits.eps, 1.0], dtype=dtype)
    mixed = signs * values[torch.arange(signs.numel()) % 4].view(shape)
    single = torch.zeros_like(mixed)
    for size in values:
        single[..., 0] = size
        assert project(signs * size).isfinite().all()
        assert project(single).isfinite().all()
    assert project(mixed).isfinite().all()


@each_projection
@each_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_shows_in_the_output_of_its_own_matrix_only(project, dtype, value):
    grad = dense(3, 4, 6, dtype=dtype)
    expected = project(grad)
    grad[1, 2, 3] = value
    result = project(grad)
    assert not result[1].isfinite().all()
    torch.testing.assert_close(result[::2], expected[::2], rtol=1e-5, atol=1e-6)


@each_projection
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded", "requires_grad"])
def test_input_is_left_alone_in_every_memory_layout(project, layout):
    base = dense(8, 12)
    grad = {
        "contiguous": base,
        "transposed": dense(12, 8).mT,
        "strided": dense(8, 24)[:, ::2],
        "expanded": dense(8, 1).expand(8, 12),
        "requires_grad": base.clone().requires_grad_(),
    }[layout]
    before, version = grad.detach().clone(), grad._version
    result = project(grad)
    assert torch.equal(grad, before)
    assert grad._version == version
    assert result.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr()
    torch.testing.assert_close(result.detach(), project(before), rtol=1e-4, atol=1e-5)


@each_projection
@given(grad=gradients(dtypes=(torch.float32, torch.bfloat16)), batch=st.integers(2, 4))
def test_a_batch_equals_a_loop(project, grad, batch):
    stack = torch.stack([grad * 2.0**i for i in range(batch)]).roll(1, dims=-1)
    loop = torch.stack([project(matrix) for matrix in stack.reshape(-1, *stack.shape[-2:])]).view_as(stack)
    # The polynomials of whitenings amplify small singular values, and rounding with them, by up to 6340.
    amplified = 6340 * torch.finfo(torch.float32).eps if project is PROJECTIONS["spectral"] else 1e-5
    tolerance = max(amplified, torch.finfo(grad.dtype).eps)
    torch.testing.assert_close(project(stack), loop, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", sorted(set(PROJECTIONS) - {"row_standardize"}))
def test_zero_rows_stay_zero_and_do_not_touch_the_rest(name):
    grad = dense(9, 14)
    grad[[0, 4]] = 0
    result = PROJECTIONS[name](grad)
    rounding_only = 1e-7 if name == "spectral_eigh" else 0  # eigenvectors are exact to rounding only
    torch.testing.assert_close(result[[0, 4]], torch.zeros(2, 14), rtol=0, atol=rounding_only)
    rest = [1, 2, 3, 5, 6, 7, 8]
    expected = PROJECTIONS[name](grad[rest])
    assert relative_error(frobenius(result[rest]), frobenius(expected)) <= 1e-5


@pytest.mark.parametrize("name", sorted(set(PROJECTIONS) - {"row_standardize"}))
def test_zero_columns_stay_zero_and_do_not_touch_the_rest(name):
    grad = dense(9, 14)
    grad[:, [0, 4]] = 0
    result = PROJECTIONS[name](grad)
    rounding_only = 1e-7 if name == "spectral_eigh" else 0
    torch.testing.assert_close(result[:, [0, 4]], torch.zeros(9, 2), rtol=0, atol=rounding_only)
    rest = [1, 2, 3, *range(5, 14)]
    expected = PROJECTIONS[name](grad[:, rest])
    assert relative_error(frobenius(result[:, rest]), frobenius(expected)) <= 1e-5


def test_row_and_column_norms_are_exact():
    grad = dense(11, 23)
    torch.testing.assert_close(row_l2(grad).norm(dim=1), torch.full((11,), 23**0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(col_l2(grad).norm(dim=0), torch.full((23,), 11**0.5), rtol=1e-6, atol=0)


@given(grad=gradients(dtypes=(torch.float32, torch.float64)), exponents=st.lists(st.integers(-20, 20), min_size=33))
def test_row_norms_ignore_positive_row_scalings_and_column_norms_positive_column_scalings(grad, exponents):
    rows = torch.tensor([2.0**e for e in exponents[: grad.shape[-2]] + [0] * 33][: grad.shape[-2]], dtype=grad.dtype)
    cols = torch.tensor([2.0**e for e in exponents[: grad.shape[-1]] + [0] * 33][: grad.shape[-1]], dtype=grad.dtype)
    assert torch.equal(row_l2(grad * rows.unsqueeze(-1)), row_l2(grad))
    assert torch.equal(col_l2(grad * cols), col_l2(grad))


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (6, 6), (5, 17), (17, 5)])
@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("row_l2", permutation, orthogonal),
        ("col_l2", orthogonal, permutation),
        ("row_standardize", permutation, permutation),
        ("frobenius", orthogonal, orthogonal),
        ("spectral", orthogonal, orthogonal),
        ("spectral_eigh", orthogonal, orthogonal),
        ("spectral_polar_express", orthogonal, orthogonal),
        ("sign", permutation, permutation),
    ],
)
def test_equivariance(name, left, right, shape):
    """P(A G B) = A P(G) B for the groups each norm is invariant under; float64, so that rounding stays out of it."""
    m, n = shape
    a = left(m, 1) if left is orthogonal else torch.eye(m, dtype=torch.float64)[left(m, 1)]
    b = right(n, 2) if right is orthogonal else torch.eye(n, dtype=torch.float64)[right(n, 2)]
    grad = dense(m, n, dtype=torch.float64)
    project = PROJECTIONS[name]
    torch.testing.assert_close(project(a @ grad @ b), a @ project(grad) @ b, rtol=1e-6, atol=1e-6)


@each_projection
def test_a_change_of_sign_of_the_gradient_changes_the_sign_of_the_update(project):
    grad = dense(7, 12)
    assert torch.equal(project(-grad), -project(grad))


def test_sign_ignores_the_magnitude_of_entries():
    grad = dense(7, 12)
    magnitudes = dense(7, 12, seed=1).abs()
    flips = dense(7, 1, seed=2).sign() * dense(1, 12, seed=3).sign()
    assert torch.equal(sign(grad * magnitudes * flips), sign(grad) * flips)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (6, 6), (5, 17), (17, 5), (2, 5, 17)])
@pytest.mark.parametrize(
    ("name", "mirror"),
    [
        ("row_l2", "col_l2"),
        ("col_l2", "row_l2"),
        ("frobenius", "frobenius"),
        ("sign", "sign"),
        ("spectral", "spectral"),
        ("spectral_eigh", "spectral_eigh"),
        ("spectral_polar_express", "spectral_polar_express"),
    ],
)
def test_transposition_pairs(name, mirror, shape):
    grad = dense(*shape, dtype=torch.float64)
    torch.testing.assert_close(PROJECTIONS[name](grad.mT).mT, PROJECTIONS[mirror](grad), rtol=1e-6, atol=1e-6)


def test_nsds_is_transposed_with_the_gradient_unless_it_is_square():
    """Its diagonals are those of the Gram matrix on the smaller side, and a square matrix has two smaller sides."""
    project = PROJECTIONS["spectral_nsds"]
    wide, square = dense(5, 17, dtype=torch.float64), dense(6, 6, dtype=torch.float64)
    torch.testing.assert_close(project(wide.mT).mT, project(wide), rtol=1e-6, atol=1e-6)
    assert relative_error(project(square.mT).mT, project(square)) >= 1e-4


def test_standardised_rows_have_mean_zero_and_ignore_a_shift():
    grad = dense(6, 40)
    result = row_standardize(grad)
    torch.testing.assert_close(result.mean(dim=1), torch.zeros(6), rtol=0, atol=1e-6)
    torch.testing.assert_close(result.std(dim=1, correction=0), torch.ones(6), rtol=1e-6, atol=0)
    torch.testing.assert_close(row_standardize(grad + 3.0), result, rtol=1e-5, atol=1e-5)


def test_a_row_whose_mean_is_a_thousand_times_its_spread_is_standardised_to_float32_accuracy():
    grad = 1000 + dense(6, 40)
    assert relative_error(row_standardize(grad), reference.row_standardize(grad)) <= 1000 * torch.finfo(grad.dtype).eps


@each_dtype
@pytest.mark.parametrize("n", [2, 3, 7, 10, 49, 1000])
@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e-7, 123.4])
def test_a_constant_row_standardises_to_zero_and_not_to_amplified_rounding(dtype, n, value):
    result = row_standardize(torch.full((2, n), value, dtype=dtype))
    assert torch.equal(result, torch.zeros(2, n, dtype=dtype))


def test_one_column_has_nothing_to_centre_and_is_normalised_instead_of_lost():
    grad = dense(7, 1)
    assert torch.equal(row_standardize(grad), row_l2(grad))


def test_unknown_whitening_is_refused_with_the_valid_names():
    with pytest.raises(ValueError, match=r"'cholesky'.*polar_express.*newton_schulz.*nsds.*eigh"):
        spectral(dense(3, 4), whitening="cholesky")


@pytest.mark.parametrize("shape", [(40, 60), (300, 60), (2, 60, 300)])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_what_has_no_contents_is_projected_too(name, shape):
    """As where a step's memory or messages are counted: nothing may depend on the numbers."""
    with FakeTensorMode():
        assert PROJECTIONS[name](torch.empty(shape)).shape == shape

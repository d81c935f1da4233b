"""SR-Sinkhorn in diagonal form against naive alternation in float64."""

import pytest
import reference
import torch
from conftest import dense, gradients, relative_error
from hypothesis import given
from hypothesis import strategies as st
from updates import multinorm_update_

from hf_stateless.norms import sinkhorn
from hf_stateless.norms.sinkhorn import row_blocks, scalings_by_blocks, sinkhorn_scalings, sr_sinkhorn
from hf_stateless.weights.noise import RoundingKey, TensorCache


def log_normal(size, sigma, seed):
    return torch.exp(sigma * torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def uneven(sigma):
    return dense(48, 129, dtype=torch.float64) * log_normal(48, sigma, 1)[:, None] * log_normal(129, sigma, 2)


def with_zeros(keep):
    return dense(48, 200, dtype=torch.float64) * keep


def tiny_rows(ratio):
    grad = dense(24, 65, dtype=torch.float64)
    grad[::3] *= ratio
    return grad


def tiny_columns(ratio):
    return tiny_rows(ratio).mT.contiguous()


SPARSE = torch.rand(48, 200, generator=torch.Generator().manual_seed(3)) < 0.02
ORDINARY = {
    "wide": dense(48, 129, dtype=torch.float64),
    "tall": dense(129, 48, dtype=torch.float64),
    "square": dense(64, 64, dtype=torch.float64),
    "odd sizes": dense(7, 33, dtype=torch.float64),
    "one row": dense(1, 33, dtype=torch.float64),
    "one column": dense(33, 1, dtype=torch.float64),
    "one entry": dense(1, 1, dtype=torch.float64),
    "rank one": dense(48, 1, dtype=torch.float64) * dense(1, 65, dtype=torch.float64, seed=1),
    "log-normal scales": uneven(1.0),
    "98 % zeros": with_zeros(SPARSE),
    "40 active columns": with_zeros(torch.arange(200) % 5 == 0),
    "zero rows": with_zeros((torch.arange(48) % 3 != 0)[:, None]),
}
# These need more exponent range than float16 has.
WIDE_RANGE = {
    "wild log-normal scales": uneven(6.0),
    "rows of 1e-15": tiny_rows(1e-15),
    "rows of 1e-25": tiny_rows(1e-25),
    "columns of 1e-15": tiny_columns(1e-15),
    "columns of 1e-15 at 1e-8": tiny_columns(1e-15) * 1e-8,
    "uneven columns at 1e-30": uneven(1.5) / uneven(1.5).abs().max() * 1e-30,
    "uneven columns at 1e38": uneven(1.5) / uneven(1.5).abs().max() * 1e38,
    **{f"scale {scale}": ORDINARY["wide"] * scale for scale in (1e-30, 1e-21, 1e-18, 1e-16, 1e-8, 1e16, 1e30)},
}
CASES = [(name, dtype) for name in ORDINARY for dtype in (torch.float32, torch.bfloat16, torch.float16)]
CASES += [(name, dtype) for name in WIDE_RANGE for dtype in (torch.float32, torch.bfloat16)]


def product(row, column, grad):
    """diag(r) G diag(c) in float64, so that no rounding of an output hides the error of r and c."""
    return row.double().unsqueeze(-1) * grad.double() * column.double().unsqueeze(-2)


def matrix(name, dtype):
    return {**ORDINARY, **WIDE_RANGE}[name].to(dtype)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_scalings_match_naive_alternation_to_1e_6(name, dtype):
    grad = matrix(name, dtype)
    row, column = sinkhorn_scalings(grad)
    assert row.dtype == column.dtype == torch.float32
    assert relative_error(product(row, column, grad), reference.multi_normalize(grad)) <= 1e-6


@pytest.mark.parametrize("name", [*ORDINARY, *WIDE_RANGE])
def test_a_float32_update_matches_naive_alternation_to_1e_6(name):
    grad = matrix(name, torch.float32)
    assert relative_error(sr_sinkhorn(grad), reference.multi_normalize(grad)) <= 1e-6


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("name", ORDINARY)
def test_every_number_of_iterations_matches(name, num_iterations):
    grad = matrix(name, torch.float32)
    expected = reference.multi_normalize(grad, iterations=num_iterations)
    assert relative_error(product(*sinkhorn_scalings(grad, num_iterations), grad), expected) <= 1e-6


@pytest.mark.parametrize("scale", [1e-10, 1.0])
@pytest.mark.parametrize(
    ("shape", "num_iterations"),
    [((1, 3000), 5), ((3000, 1), 5), ((1, 60), 40), ((60, 1), 40), ((4, 200), 60), ((200, 4), 60)],
)
def test_long_and_thin_matrices_match_after_many_iterations(shape, num_iterations, scale):
    """Factors that are not brought back to size m and n in each step drift by (m / n)^L, out of float32."""
    grad = dense(*shape, scale=scale)
    expected = reference.multi_normalize(grad, iterations=num_iterations)
    assert relative_error(product(*sinkhorn_scalings(grad, num_iterations), grad), expected) <= 1e-6


@given(grad=gradients(dtypes=(torch.float32, torch.bfloat16, torch.float16)))
def test_scalings_match_over_shape_dtype_and_scale(grad):
    row, column = sinkhorn_scalings(grad)
    assert row.shape == grad.shape[:-1]
    assert column.shape == (*grad.shape[:-2], grad.shape[-1])
    result = product(row, column, grad).reshape(-1, *grad.shape[-2:])
    for one, one_grad in zip(result, grad.reshape(-1, *grad.shape[-2:]), strict=True):
        assert relative_error(one, reference.multi_normalize(one_grad)) <= 1e-6


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    decades=st.sampled_from([1, 4, 8]),
    kept=st.sampled_from([1.0, 0.6, 0.3]),
    seed=st.integers(0, 2**20),
)
def test_entries_spread_over_many_decades_with_zeros_among_them_match(shape, decades, kept, seed):
    generator = torch.Generator().manual_seed(seed)
    exponents = decades * (2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 1)
    mask = torch.rand(shape, generator=generator) < kept
    mask[0, 0] = True
    grad = (dense(*shape, dtype=torch.float64, seed=seed).sign() * 10**exponents * mask).float()
    result = product(*sinkhorn_scalings(grad), grad)
    assert relative_error(result, reference.multi_normalize(grad)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ORDINARY)
def test_a_half_precision_update_is_rounded_once_and_not_in_every_iteration(name, dtype):
    grad = matrix(name, dtype)
    expected = reference.multi_normalize(grad)
    half_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(sr_sinkhorn(grad).double(), expected, rtol=half_ulp * (1 + 1e-2), atol=1e-7)


@given(grad=gradients())
def test_entries_have_root_mean_square_one(grad):
    rms = sr_sinkhorn(grad).double().square().mean(dim=(-2, -1)).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=max(1e-5, torch.finfo(grad.dtype).eps), atol=0)


@pytest.mark.parametrize("name", ["wide", "tall", "square", "odd sizes", "log-normal scales"])
def test_the_fixed_point_has_equal_row_norms_and_equal_column_norms(name):
    grad = matrix(name, torch.float32)
    m, n = grad.shape
    x = sr_sinkhorn(grad, num_iterations=60)
    torch.testing.assert_close(x.norm(dim=1), torch.full((m,), n**0.5), rtol=1e-5, atol=0)
    torch.testing.assert_close(x.norm(dim=0), torch.full((n,), m**0.5), rtol=1e-5, atol=0)
    torch.testing.assert_close(sr_sinkhorn(x), x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_iterations", [1, 2, 5])
def test_the_last_step_is_the_columns(num_iterations):
    grad = matrix("log-normal scales", torch.float32)
    x = sr_sinkhorn(grad, num_iterations)
    torch.testing.assert_close(x.norm(dim=0), torch.full((129,), 48**0.5), rtol=1e-6, atol=0)


def test_each_iteration_brings_the_row_norms_closer_to_equal():
    grad = matrix("log-normal scales", torch.float64)
    errors = [(sr_sinkhorn(grad, steps).norm(dim=1) / 129**0.5 - 1).abs().max().item() for steps in (1, 2, 3, 5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 1e-2 * errors[0]


@given(grad=gradients(dtypes=(torch.float32, torch.float64)), seed=st.integers(0, 99))
def test_rows_and_columns_may_be_permuted(grad, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=generator) for size in grad.shape[-2:])
    permuted = sr_sinkhorn(grad[..., rows, :][..., columns])
    torch.testing.assert_close(permuted, sr_sinkhorn(grad)[..., rows, :][..., columns], rtol=1e-5, atol=1e-6)


def test_positive_diagonal_scalings_cancel_at_the_limit_and_not_before():
    grad = matrix("square", torch.float32)
    scaled = (log_normal(64, 1.5, 5)[:, None] * grad.double() * log_normal(64, 1.5, 6)).float()
    assert relative_error(sr_sinkhorn(scaled, 100), sr_sinkhorn(grad, 100)) <= 1e-5
    assert relative_error(sr_sinkhorn(scaled, 1), sr_sinkhorn(grad, 1)) >= 1e-2


@given(grad=gradients(dtypes=(torch.float32, torch.bfloat16, torch.float64)), exponent=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_changes_no_bit(grad, exponent):
    assert torch.equal(sr_sinkhorn(grad * 2.0**exponent), sr_sinkhorn(grad))


@given(grad=gradients(dtypes=(torch.float32, torch.bfloat16)), batch=st.integers(2, 4))
def test_a_batch_equals_a_loop(grad, batch):
    stack = torch.stack([grad * 2.0**i for i in range(batch)]).roll(1, dims=-1)
    loop = torch.stack([sr_sinkhorn(one) for one in stack.reshape(-1, *stack.shape[-2:])]).view_as(stack)
    tolerance = max(1e-6, torch.finfo(grad.dtype).eps)
    torch.testing.assert_close(sr_sinkhorn(stack), loop, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded", "requires_grad"])
def test_the_gradient_is_not_squared_in_place(layout):
    """`.float()` of a float32 tensor is the tensor itself, so an in-place square would hit the gradient."""
    grad = {
        "contiguous": dense(8, 12),
        "transposed": dense(12, 8).mT,
        "strided": dense(8, 24)[:, ::2],
        "expanded": dense(8, 1).expand(8, 12),
        "requires_grad": dense(8, 12).requires_grad_(),
    }[layout]
    before, version = grad.detach().clone(), grad._version
    row, column = sinkhorn_scalings(grad)
    result = sr_sinkhorn(grad)
    assert torch.equal(grad, before)
    assert grad._version == version
    expected = reference.multi_normalize(before)
    assert relative_error(product(row.detach(), column.detach(), before), expected) <= 1e-6
    assert relative_error(result.detach(), expected) <= 1e-6


def test_zero_rows_and_columns_stay_zero_and_do_not_touch_the_rest():
    grad = dense(9, 14)
    grad[[0, 4]] = 0
    grad[:, [1, 13]] = 0
    rows, columns = [1, 2, 3, 5, 6, 7, 8], [0, *range(2, 13)]
    x = sr_sinkhorn(grad)
    assert torch.count_nonzero(x[[0, 4]]) == torch.count_nonzero(x[:, [1, 13]]) == 0
    inner = grad[rows][:, columns]
    assert relative_error(x[rows][:, columns] / x.norm(), sr_sinkhorn(inner) / sr_sinkhorn(inner).norm()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 4), (3, 5, 2)])
def test_zero_gives_zero(shape, dtype):
    zero = torch.zeros(shape, dtype=dtype)
    assert torch.equal(sr_sinkhorn(zero), zero)
    assert all(vector.isfinite().all() for vector in sinkhorn_scalings(zero))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (6, 9), (1, 400)])
def test_the_largest_and_smallest_numbers_of_a_dtype_stay_finite(dtype, shape):
    limits = torch.finfo(dtype)
    signs = dense(*shape, dtype=dtype).sign()
    values = torch.tensor([limits.max, limits.tiny, limits.smallest_normal * limits.eps, 1.0], dtype=dtype)
    mixed = signs * values[torch.arange(signs.numel()) % 4].view(shape)
    single = torch.zeros_like(mixed)
    for size in values:
        single[..., 0] = size
        assert sr_sinkhorn(signs * size).isfinite().all()
        assert sr_sinkhorn(single).isfinite().all()
    assert sr_sinkhorn(mixed).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_shows_in_the_output_of_its_own_matrix_only(value, dtype):
    grad = dense(3, 4, 6, dtype=dtype)
    expected = sr_sinkhorn(grad)
    grad[1, 2, 3] = value
    result = sr_sinkhorn(grad)
    assert not result[1].isfinite().all()
    assert torch.equal(result[::2], expected[::2])


@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (40, 1), (7, 7)])
def test_eleven_half_steps_give_the_sinkhorn_momentum_of_the_reference(shape):
    """Rows first and last: five and a half iterations, on momentum whose weak rows were masked."""
    grad, momentum = dense(*shape), dense(*shape, seed=1)
    grad[:3], momentum[:3] = 0, 0
    expected, new_momentum = reference.sinkhorn_momentum(grad, momentum, gamma=0.18)
    nesterov = 0.95 * new_momentum + grad.double()
    delta = 0.18 * sr_sinkhorn(nesterov.float(), 5.5)
    assert relative_error(delta, expected) <= 1e-6
    torch.testing.assert_close(
        delta[3:].norm(dim=1), torch.full((shape[0] - 3,), 0.18 * shape[1] ** 0.5), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("shape", [(400, 8), (8, 400), (1024, 2048), (3, 600, 700)])
@pytest.mark.parametrize("zero", ["row", "column", "both", "all"])
def test_zero_rows_and_columns_of_large_matrices_stay_zero_and_nothing_else_does(shape, zero):
    grad = dense(*shape)
    if zero in ("row", "both"):
        grad[..., 2, :] = 0
    if zero in ("column", "both"):
        grad[..., 1] = 0
    if zero == "all":
        grad.zero_()
    result = sr_sinkhorn(grad)
    assert torch.equal(result == 0, grad == 0)
    assert result.isfinite().all()


@given(gradients(), st.integers(1, 5), st.sampled_from([0.5, 1, 5, 5.5]))
def test_scalings_by_blocks_of_rows_are_those_of_the_whole(grad, at_once, num_iterations):
    grad = grad.flatten(0, -2)
    blocks = [slice(first, min(first + at_once, len(grad))) for first in range(0, len(grad), at_once)]
    whole = diagonal(sinkhorn_scalings(grad, num_iterations))
    by_blocks = diagonal(scalings_by_blocks(grad, num_iterations, blocks))
    torch.testing.assert_close(by_blocks * grad.double(), whole * grad.double(), rtol=1e-5, atol=1e-6)


def diagonal(factors):
    row, column = factors
    return row.double()[:, None] * column.double()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_large_matrices_are_updated_by_blocks_as_small_ones_are_whole(weight_dtype, bad, monkeypatch):
    grad = dense(37, 16)
    grad[5] = 0
    spoilt = grad.clone()
    spoilt[30, 2] = bad

    def updated(of):
        weight = dense(37, 16).to(weight_dtype)
        key = [RoundingKey(torch.tensor([7], dtype=torch.int32), TensorCache())]
        step = {"lr": 0.1, "lr_scale": 1.0, "weight_decay": 0.1, "layout": "out_in"}
        finite = multinorm_update_([weight], [of], key, **step, norms=("row_l2", "col_l2"), num_iterations=5)
        return weight, finite

    whole, finite = updated(grad)
    monkeypatch.setattr(sinkhorn, "_BLOCK", 48)
    assert len(row_blocks(grad)) == 13
    by_blocks, also_finite = updated(grad)
    assert finite == also_finite == [True]
    # A bf16 weight may round the other way where the sums differ in their last bit.
    away = (whole.float() - by_blocks.float()).abs() > 1e-5
    assert away.float().mean() <= (0.01 if weight_dtype == torch.bfloat16 else 0)
    assert updated(spoilt)[1] == [False]
    assert torch.equal(updated(spoilt)[0], dense(37, 16).to(weight_dtype))
    assert torch.equal(updated(torch.zeros(37, 16))[0], dense(37, 16).to(weight_dtype))

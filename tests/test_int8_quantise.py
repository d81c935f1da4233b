"""8-bit storage of matrices: error, range, expectation of rounding, and that nothing moves where nothing changed."""

import pytest
import torch
from conftest import dense
from hypothesis import given
from hypothesis import strategies as st

from hf_stateless.weights.int8.codes import dequantize_matrix, group_length, quantize_matrix, requantize_
from hf_stateless.weights.int8.weight import Int8Weight
from hf_stateless.weights.noise import rounding_key
from hf_stateless.weights.rounding import stochastic_round_integers_


def key_of(step=1, seed=0):
    return rounding_key(seed, 0, torch.tensor([float(step)]))


@st.composite
def matrices(draw):
    """Matrices of groups with any mean, some of them zero, scaled from 1e-30 to 1e30."""
    rows, groups, length = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 7, 16, 64]))
    x = dense(rows, groups * length, seed=draw(st.integers(0, 2**20)), dtype=torch.float64)
    x = x + draw(st.sampled_from([0.0, 0.1, 1.0, -30.0, 1000.0]))
    x = x * (torch.rand(rows, 1, dtype=torch.float64) < 0.8)
    return (x * 10.0 ** draw(st.integers(-30, 30))).float(), length


def largest_of_groups(weight, scale):
    return weight.unflatten(1, (scale.shape[1], -1)).abs().amax(-1, keepdim=True)


@given(matrices())
def test_no_weight_is_off_by_more_than_half_of_one_254th_of_the_largest_in_its_group(given):
    weight, length = given
    codes, scale = quantize_matrix(weight, length)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.bfloat16
    error = (dequantize_matrix(codes, scale).double() - weight.double()).unflatten(1, (scale.shape[1], -1)).abs()
    # A bfloat16 scale that was rounded up is at most 2^-7 too large.
    assert (error <= largest_of_groups(weight, scale).double() / 127 * (1 + 2**-7) / 2 * (1 + 1e-6) + 1e-38).all()


@given(matrices(), st.booleans(), st.integers(1, 1000))
def test_rewriting_what_is_stored_keeps_every_byte(given, nearest, step):
    codes, scale = quantize_matrix(*given)
    again = codes.clone(), scale.clone()
    for _ in range(3):
        requantize_(*again, dequantize_matrix(*again), None if nearest else key_of(step))
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1].view(torch.int16), scale.view(torch.int16))


@given(matrices(), st.integers(1, 1000))
def test_after_any_update_too_rewriting_keeps_every_byte(given, step):
    """The scales of a matrix that was trained are as stable as those of one that was just quantised."""
    weight, length = given
    codes, scale = quantize_matrix(weight, length)
    for i in range(3):
        moved = dequantize_matrix(codes, scale) * (1 + 0.3 * torch.randn(weight.shape))
        requantize_(codes, scale, moved, key_of(step + i))
    again = codes.clone(), scale.clone()
    requantize_(*again, dequantize_matrix(*again), key_of(step + 10))
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scale)


def test_groups_that_do_not_change_keep_every_byte_while_others_change():
    weight = dense(8, 64)
    codes, scale = quantize_matrix(weight, 16)
    before = codes.clone(), scale.clone()
    change = torch.zeros(8, 64)
    change[3, 16:32] = 0.2
    requantize_(codes, scale, dequantize_matrix(codes, scale) + change, key_of())
    same = torch.ones(8, 4, dtype=torch.bool)
    same[3, 1] = False
    assert torch.equal(scale[same], before[1][same])
    assert torch.equal(codes.unflatten(1, (4, 16))[same], before[0].unflatten(1, (4, 16))[same])
    assert not torch.equal(codes, before[0])


@pytest.mark.parametrize("offset", [0.0, 0.1, 1.0, -100.0])
def test_a_group_with_a_mean_keeps_its_accuracy(offset):
    weight = 0.02 * torch.randn(256, 256) + offset
    codes, scale = quantize_matrix(weight, 64)
    assert (dequantize_matrix(codes, scale) - weight).norm() / weight.norm() < 0.0085


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1.0, 1e30, 3.4e38])
def test_every_finite_size_is_stored(size):
    weight = torch.tensor([[size, -size / 2, 0.0, size]])
    codes, scale = quantize_matrix(weight, None)
    restored = dequantize_matrix(codes, scale)
    assert torch.isfinite(dequantize_matrix(codes, scale, torch.bfloat16)).all()
    assert (restored - weight).abs().max() <= max(size / 127, 1e-38)
    assert scale.min() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_matrix(torch.tensor([[1.0, bad]]), None)


@pytest.mark.parametrize("growth", [1.0, 1.004, 1.5, 0.7, 30.0])
def test_the_expectation_of_what_is_written_is_the_value_whether_scales_change_or_not(growth):
    start = 0.02 * torch.randn(64, 64)
    codes, scale = quantize_matrix(start, 64)
    exact = dequantize_matrix(codes, scale) * growth + 1e-4 * torch.randn(64, 64)
    total, count = torch.zeros(64, 64, dtype=torch.float64), 400
    for step in range(count):
        written = codes.clone(), scale.clone()
        requantize_(*written, exact.clone(), key_of(step))
        total += dequantize_matrix(*written).double()
    quantum = exact.abs().amax(-1, keepdim=True) / 126  # one group a row; scales are rounded up
    off = (total / count - exact.double()).abs() / quantum
    assert off.max() < 5.5 * 0.5 / count**0.5  # each draw has a standard deviation of at most half a quantum
    assert ((total / count - exact.double()) / quantum).mean().abs() < 5 * 0.5 / (count * 4096) ** 0.5


def test_a_small_update_arrives_with_stochastic_rounding_and_is_lost_with_rounding_to_nearest():
    weight = 0.02 * torch.randn(128, 128)
    stored = {}
    for rounding in ("stochastic", "nearest"):
        codes, scale = quantize_matrix(weight, 128)
        for step in range(50):
            exact = dequantize_matrix(codes, scale) + 2e-5
            requantize_(codes, scale, exact, key_of(step) if rounding == "stochastic" else None)
        stored[rounding] = dequantize_matrix(codes, scale).double().mean() - weight.double().mean()
    assert stored["stochastic"] == pytest.approx(50 * 2e-5, rel=0.1)
    assert abs(stored["nearest"]) < 0.1 * 50 * 2e-5


def test_whole_numbers_stay_and_thirds_are_rounded_up_a_third_of_the_time():
    whole = torch.arange(-127.0, 128.0).repeat(100, 1)
    assert torch.equal(stochastic_round_integers_(whole.clone(), key_of()), whole)
    thirds = stochastic_round_integers_(whole[:, :-1] + 1 / 3, key_of()) - whole[:, :-1]
    assert set(thirds.flatten().tolist()) == {0.0, 1.0}
    assert thirds.mean().item() == pytest.approx(1 / 3, abs=5 * (2 / 9 / thirds.numel()) ** 0.5)


@pytest.mark.parametrize(
    ("in_features", "group_size", "length"),
    [(4096, 64, 64), (11008, 128, 128), (2736, 64, 57), (5461, 128, 127), (131, 128, 131), (8, 128, 8), (9, None, 9)],
)
def test_groups_divide_a_row(in_features, group_size, length):
    assert group_length(in_features, group_size) == length
    assert in_features % length == 0


@pytest.mark.parametrize(("group_size", "expected"), [(64, 1.03125), (128, 1.015625), (None, 1 + 2 / 4096)])
def test_bytes_per_weight(group_size, expected):
    codes, scale = quantize_matrix(torch.ones(4, 4096), group_size)
    assert (codes.nbytes + scale.nbytes) / codes.numel() == expected


@pytest.mark.parametrize("block", [1, 40, 10_000])
def test_the_rows_worked_on_at_once_change_nothing(block, monkeypatch):
    weight, update = dense(11, 32, scale=0.02), dense(11, 32, seed=1)

    def written():
        stored = Int8Weight(*quantize_matrix(weight, 16))
        stored.write_rows_(lambda rows: update[rows].clone(), 1e-3, 0.99, key_of())
        return stored

    expected = written()
    monkeypatch.setattr("hf_stateless.weights.int8.codes._BLOCK", block)
    assert torch.equal(written().codes, expected.codes)
    assert torch.equal(written().scale, expected.scale)
    target = dequantize_matrix(*quantize_matrix(weight, 16)) * 0.99 - 1e-3 * update
    assert (expected.dequantize(torch.float32) - target).abs().max() < target.abs().max() / 126

"""Stochastic rounding: unbiased, exact where bfloat16 is, a function of (seed, parameter, step, element) only."""

import itertools

import pytest
import torch

from hf_stateless.weights.noise import _mix_int, mix, rounding_key, rounding_noise
from hf_stateless.weights.rounding import stochastic_round_


LEVELS = 1 << 16  # noise values, and float32 steps between two bfloat16 neighbours


def key_of(seed=0, index=0, step=1):
    return rounding_key(seed, index, torch.full((1,), float(step)))


def rounded(source, key=None, scratch=None):
    target = torch.empty_like(source, dtype=torch.bfloat16)
    return stochastic_round_(target, source.clone(), key_of() if key is None else key, scratch=scratch)


def from_bits(bits):
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def neighbours(source):
    """The bfloat16 numbers next to float32 values, towards zero and away from it, as float32."""
    lower = (source.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return lower, (lower.view(torch.int32) + LEVELS).view(torch.float32)


def standard_noise(rows, columns, key):
    noise = rounding_noise(rows, columns, key).double()
    return (noise - (LEVELS - 1) / 2) / (LEVELS / 12**0.5)


def correlation(a, b):
    return (a.flatten() * b.flatten()).mean().item()


def test_every_bfloat16_number_is_written_unchanged():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()].unsqueeze(0)
    for step in range(1, 4):
        assert torch.equal(rounded(every.float(), key_of(step=step)).view(torch.int16), every.view(torch.int16))


@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000], ids=hex)
def test_the_ordinary_nan_stays_nan(bits):
    source = torch.stack([from_bits([bits]), torch.ones(1)]).repeat(1, 64)
    assert source[0].isnan().all()
    result = rounded(source)
    assert result[0].isnan().all()
    assert torch.equal(result[1], torch.ones(64, dtype=torch.bfloat16))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-3, 1.0, 1e30])
def test_the_result_is_one_of_the_two_neighbours(scale):
    source = torch.randn(300, 70) * scale
    lower, upper = neighbours(source)
    result = rounded(source).float()
    assert ((result == lower) | (result == upper)).all()


def test_numbers_within_the_range_of_bfloat16_do_not_become_infinite():
    largest = torch.finfo(torch.bfloat16).max
    source = torch.tensor([largest, -largest, float("inf"), -float("inf")]).repeat(500, 1)
    assert torch.equal(rounded(source).float(), source)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("fraction", [1 / 1024, 1 / 3, 0.5, 0.9, 1 - 1 / 1024])
def test_the_probability_of_rounding_away_is_the_distance(sign, fraction):
    low_bits = round(fraction * LEVELS)
    fraction = low_bits / LEVELS
    source = sign * (from_bits([0x3F800000 + low_bits]).expand(1024, 1024))
    away = (rounded(source.contiguous()).float().abs() > 1).double().mean().item()
    assert abs(away - fraction) <= 5 * (fraction * (1 - fraction)) ** 0.5 / 1024


def test_a_thousand_updates_too_small_for_bfloat16_arrive_and_plain_rounding_loses_them():
    start, update, steps = 0.02, 1e-6, 1000
    weight = torch.full((64, 64), start, dtype=torch.bfloat16)
    plain = weight.clone()
    first = weight.double().mean().item()
    for step in range(1, steps + 1):
        stochastic_round_(weight, weight.float() + update, key_of(step=step))
        plain += update
    moved = (weight.double().mean().item() - first) / (steps * update)
    assert moved == pytest.approx(1.0, abs=0.03)
    assert plain.double().mean().item() == first


@pytest.mark.parametrize("shape", [(512, 1024), (2048, 256)])
def test_noise_is_uniform_over_the_whole_matrix(shape):
    noise = rounding_noise(*shape, key_of())
    assert noise.min() >= 0
    assert noise.max() < LEVELS
    for divisor in (LEVELS // 256, 1):  # the upper and the lower eight bits
        counts = torch.bincount(((noise // divisor) % 256).flatten(), minlength=256).double()
        expected = noise.numel() / 256
        chi_squared = ((counts - expected) ** 2 / expected).sum().item()
        assert 255 - 5 * 510**0.5 <= chi_squared <= 255 + 5 * 510**0.5


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(512, 1024), (1024, 512)])
def test_sums_over_rows_and_columns_vary_as_sums_of_independent_noise(shape, dim):
    """A hash made of a row part and a column part could be uniform and still have biased rows or columns."""
    noise = standard_noise(*shape, key_of())
    means = noise.mean(dim=dim) * shape[dim] ** 0.5
    count = means.numel()
    assert abs(means.square().mean().item() - 1) <= 5 * (2 / count) ** 0.5
    assert means.abs().max() <= 5


@pytest.mark.parametrize("seed", range(3))
def test_noise_has_no_low_rank_part(seed):
    """The largest singular value of independent noise is close to sqrt(m) + sqrt(n)."""
    noise = standard_noise(512, 768, key_of(seed=seed))
    assert torch.linalg.svdvals(noise)[0] <= 1.03 * (512**0.5 + 768**0.5)


@pytest.mark.parametrize(("down", "right"), [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 128), (128, 0), (3, 5)])
def test_elements_at_a_distance_are_uncorrelated(down, right):
    noise = standard_noise(1024, 1024, key_of())
    shifted = noise.roll((down, right), dims=(0, 1))
    for power in (1, 2):  # values and their squares
        a, b = noise**power, shifted**power
        spread = (a - a.mean()).square().mean()
        assert abs(correlation(a - a.mean(), b - b.mean()) / spread) <= 5 / 1024


def test_elements_at_the_corners_of_rectangles_are_uncorrelated():
    """Noise that is a product of a row factor and a column factor shows here: x11 x22 = x12 x21."""
    noise = standard_noise(1024, 1024, key_of())
    corners = noise * noise.roll(7, dims=0) * noise.roll(11, dims=1) * noise.roll((7, 11), dims=(0, 1))
    assert abs(corners.mean().item()) <= 5 / 1024


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"index": 1}, {"step": 2}, {"seed": 1, "index": 1}, {"step": 100_000}, {"index": 511}],
    ids=str,
)
def test_seeds_parameters_and_steps_draw_unrelated_noise(other):
    first, second = standard_noise(1024, 1024, key_of()), standard_noise(1024, 1024, key_of(**other))
    assert abs(correlation(first, second)) <= 5 / 1024


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_every_parameter_has_a_key_of_its_own_in_every_step(seed):
    pairs = list(itertools.product(range(30), range(1, 31)))
    assert len({key_of(seed, index, step).value.item() for index, step in pairs}) == len(pairs)


def test_keys_made_on_the_cpu_and_keys_made_in_a_tensor_agree():
    values = torch.cat([torch.arange(-500, 500), torch.tensor([2**31 - 1, -(2**31)])]).to(torch.int32)
    assert mix(values.clone()).tolist() == [_mix_int(value) for value in values.tolist()]


def test_the_same_key_gives_the_same_bits_and_torchs_generator_is_not_used():
    source = torch.randn(40, 50)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = rounded(source)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(rounded(source), first)
    assert not torch.equal(rounded(source, key_of(step=2)), first)


@pytest.mark.parametrize("cuts", [(0, 5, 40), (0, 39, 40), (0, 13, 13, 40)])
def test_row_shards_draw_what_the_whole_matrix_draws(cuts):
    whole = rounding_noise(40, 17, key_of())
    shards = [rounding_noise(end - start, 17, key_of(), row_offset=start) for start, end in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(shards), whole)


@pytest.mark.parametrize("shape", [(), (1,), (17,), (0,), (0, 5), (5, 0), (3, 4, 5), (2, 3, 4, 5)])
def test_every_shape_is_rounded_and_a_scratch_buffer_changes_nothing(shape):
    source = torch.randn(shape) if shape else torch.randn(())
    lower, upper = neighbours(source)
    result = rounded(source)
    assert result.shape == source.shape
    assert ((result.float() == lower) | (result.float() == upper)).all()
    assert torch.equal(rounded(source, scratch=torch.empty_like(source)), result)


def test_a_vector_and_the_rows_of_a_matrix_do_not_share_noise():
    source = from_bits([0x3F808000]).expand(64, 512).contiguous()
    result = (rounded(source) > 1).double()
    assert (result[0] != result[1]).any()
    agreement = (result[:-1] == result[1:]).double().mean().item()
    assert agreement == pytest.approx(0.5, abs=5 * 0.5 / (63 * 512) ** 0.5)

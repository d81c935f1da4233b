"""The Triton kernels for plain weights against their torch twins: on a CUDA device, or in Triton's interpreter."""

import copy
import math

import pytest
import reference
import torch
from conftest import dense, relative_error
from kernel_runs import DEVICE, kernels, key_of, random, twin_, update_  # noqa: F401

from hf_stateless.update.kernels import launch
from hf_stateless.update.kernels import plain as plain_update
from hf_stateless.update.kernels import sinkgd as sinkgd_update
from hf_stateless.update.layout import LAYOUTS as KINDS
from hf_stateless.update.layout import layout_of
from hf_stateless.update.write import write_update_


pytest.importorskip("triton")
LAYOUTS = [
    ("out_in", (7, 33)),
    ("out_in", (33, 7)),
    ("out_in", (1, 40)),
    ("out_in", (40, 1)),
    ("out_in", (1, 1)),
    ("out_in", (3, 5, 9)),
    ("out_in", (2, 2, 3, 4)),
    ("in_out", (33, 7)),
    ("in_out", (3, 5, 9)),
    ("vector", (37,)),
]
each_layout = pytest.mark.parametrize(("layout", "shape"), LAYOUTS)


@pytest.fixture
def small_tiles(monkeypatch):
    """Long rows, several tiles of rows and several chunks, at sizes that an interpreter can do."""
    monkeypatch.setattr(sinkgd_update, "_LONGEST_ROW", 16)
    monkeypatch.setattr(sinkgd_update, "_LONG_ROWS", (4, 16))
    monkeypatch.setattr(sinkgd_update, "_TURNED", (8, 8))


def normalized(grad, **options):
    """The normalised gradient, as a step of size one from zero takes it."""
    weight = torch.zeros_like(grad, dtype=torch.float32)
    assert update_([weight], [grad], **options) == [True]
    return -weight


def expected(grad, layout="out_in", iterations=5):
    grad = grad.detach().cpu()
    matrices = grad.reshape(1, -1) if layout == "vector" else grad.mT if layout == "in_out" else grad
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    each = torch.stack([reference.multi_normalize(one, iterations=iterations) for one in flat]).view_as(matrices)
    return (each.mT if layout == "in_out" else each).reshape(grad.shape)


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_matches_naive_alternation_in_float64_to_1e_6(layout, shape, dtype):
    grad = random(*shape, dtype=dtype)
    assert relative_error(normalized(grad, layout=layout).cpu(), expected(grad, layout)) <= 1e-6


def test_long_rows_match_too(small_tiles):
    grad = random(9, 50)
    assert relative_error(normalized(grad).cpu(), expected(grad)) <= 1e-6


def test_an_odd_width_matches():
    grad = random(3, 5461)
    result = normalized(grad, num_iterations=2).cpu()
    assert relative_error(result, expected(grad, iterations=2)) <= 1e-6


def stretched(dim, ratio):
    grad = dense(24, 30, dtype=torch.float64)
    grad.select(dim, 2).mul_(ratio)
    return grad


HAZARDS = {
    "1e-30": dense(12, 20, dtype=torch.float64) * 1e-30,
    "1e30": dense(12, 20, dtype=torch.float64) * 1e30,
    "a row of 1e-25": stretched(0, 1e-25),
    "a column of 1e-15": stretched(1, 1e-15),
    "a zero row": stretched(0, 0),
    "a zero column": stretched(1, 0),
}


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("name", HAZARDS)
def test_extreme_scales_and_zeros_match(name, layout):
    grad = HAZARDS[name].float().to(DEVICE)
    grad = grad.mT.contiguous() if layout == "in_out" else grad
    result = normalized(grad, layout=layout, num_iterations=3).cpu()
    assert relative_error(result, expected(grad, layout, iterations=3)) <= 1e-6
    assert torch.equal(result == 0, grad.cpu() == 0)


@pytest.mark.parametrize("value", [1e-45, 1e-39, 3e38])
def test_the_smallest_and_largest_numbers_stay_finite(monkeypatch, value):
    grad = random(6, 9).sign() * value
    kernel, twin = torch.zeros(6, 9, device=DEVICE), torch.zeros(6, 9, device=DEVICE)
    assert update_([kernel], [grad]) == twin_(monkeypatch, [twin], [grad]) == [True]
    torch.testing.assert_close(kernel, twin, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_bf16_weights_are_the_nearest_to_the_exact_result(layout):
    weight, grad = random(160, 300, dtype=torch.bfloat16), random(160, 300, dtype=torch.bfloat16, seed=1)
    exact = weight.double().cpu() * (1 - 0.01 * 0.1) - 0.01 * expected(grad, layout, iterations=2)
    update_([weight], [grad], layout=layout, lr=0.01, weight_decay=0.1, num_iterations=2)
    differing = (weight.cpu() != exact.to(torch.bfloat16)).sum().item()
    assert differing < 100e-6 * weight.numel()


@each_layout
def test_the_rounding_noise_is_that_of_the_twin_bit_for_bit(monkeypatch, layout, shape):
    """A decay of 1 + 2^-12 is exact in float32, and a zero learning rate takes the gradient out of it."""
    start = random(*shape, dtype=torch.bfloat16)
    kernel, twin = start.clone(), start.clone()
    options = {"layout": layout, "lr": 2.0**-60, "weight_decay": -(2.0**48), "num_iterations": 1}
    grad = random(*shape, dtype=torch.bfloat16, seed=1)
    update_([kernel], [grad], [key_of(3)], **options)
    twin_(monkeypatch, [twin], [grad], [key_of(3)], **options)
    assert torch.equal(kernel, twin)
    assert kernel.numel() < 30 or not torch.equal(kernel, start)


def test_stochastic_rounding_is_unbiased():
    start, grad = random(64, 64, dtype=torch.bfloat16), random(64, 64, seed=1)
    moved = torch.zeros(64, 64, dtype=torch.float64, device=DEVICE)
    for step in range(6):
        weight = start.clone()
        update_([weight], [grad], [key_of(step=step)], lr=1e-3, num_iterations=1)
        moved += weight.double() - start.double()
    exact = -1e-3 * expected(grad, iterations=1)
    # Of each rounding the error is below one step of bfloat16, of 6 * 4096 its mean is a hundred times smaller.
    step_size = 2.0 ** (torch.frexp(start.float()).exponent.double().cpu() - 8)
    error = (moved.cpu() / 6 - exact) / step_size
    assert abs(error.mean().item()) < 4 * 0.5 / math.sqrt(6 * 64 * 64)


def test_a_zero_or_bad_gradient_leaves_its_weight_alone(monkeypatch):
    grads = [random(5, 20, seed=i) for i in range(5)]
    grads[1].zero_()
    grads[2][3, 7], grads[3][0, 0], grads[4][1, 19] = math.nan, math.inf, -math.inf
    for layout in ("out_in", "in_out"):
        starts = [random(5, 20, seed=10 + i) for i in range(5)]
        weights, looped = [w.clone() for w in starts], [w.clone() for w in starts]
        flags = update_(weights, grads, layout=layout, lr=0.1, weight_decay=0.1)
        assert flags == [True, True, False, False, False]
        assert flags == twin_(monkeypatch, looped, grads, layout=layout, lr=0.1, weight_decay=0.1)
        assert [torch.equal(w, s) for w, s in zip(weights, starts, strict=True)] == [False, *[True] * 4]
        torch.testing.assert_close(weights, looped, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spoil", ["zero", "nan"])
def test_the_matrices_of_a_stack_stand_or_fall_together(monkeypatch, spoil):
    """As in the twin: without a token an expert still decays, and one bad expert holds all of its tensor back."""
    grads = [random(4, 5, 9, seed=i) for i in range(2)]
    grads[1][2] = 0 if spoil == "zero" else math.nan
    weights = [random(4, 5, 9, seed=10 + i) for i in range(2)]
    looped = [w.clone() for w in weights]
    flags = update_(weights, grads, lr=0.1, weight_decay=0.1)
    assert flags == twin_(monkeypatch, looped, grads, lr=0.1, weight_decay=0.1) == [True, spoil == "zero"]
    torch.testing.assert_close(weights, looped, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_no_bit_depends_on_the_run_on_the_batch_or_on_the_chunk(monkeypatch, small_tiles, layout):
    grads = [random(2, 20, 18, dtype=torch.bfloat16, seed=i) for i in range(3)]

    def run(batches, chunk):
        monkeypatch.setattr(sinkgd_update, "CHUNK_BYTES", chunk)
        weights = [random(2, 20, 18, dtype=torch.bfloat16, seed=10 + i) for i in range(3)]
        for batch in batches:
            keys = [key_of(i) for i in batch]
            update_([weights[i] for i in batch], [grads[i] for i in batch], keys, layout=layout, lr=0.1)
        return torch.stack(weights)

    first = run([[0, 1, 2]], 1 << 20)
    assert torch.equal(run([[0, 1, 2]], 1 << 20), first)
    assert torch.equal(run([[2], [0, 1]], 1 << 20), first)
    assert torch.equal(run([[0, 1, 2]], 1), first)  # each matrix of each stack on its own


def test_several_tiles_of_rows_in_a_program_match(monkeypatch):
    monkeypatch.setattr(sinkgd_update, "_TILE", 64)
    monkeypatch.setattr(sinkgd_update, "_PROGRAM", 400)
    monkeypatch.setattr(sinkgd_update, "_ROWS", 4)
    grad = random(61, 20)
    assert relative_error(normalized(grad, num_iterations=3).cpu(), expected(grad, iterations=3)) <= 1e-6


def test_tables_of_addresses_are_written_once(monkeypatch):
    start, launched = launch.start, []

    def counted(kernel, *args, **options):
        launched.append(kernel)
        start(kernel, *args, **options)

    monkeypatch.setattr(launch, "start", counted)
    launch._table.cache_clear()
    tensors = [random(3, 4) for _ in range(20)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    tables = [launch.pointer_table(some) for some in (tensors, tensors, tensors[:3])]
    assert len(launched) == 3
    assert tables[0] is tables[1]
    assert [tables[0][:20].tolist(), tables[2][:3].tolist()] == [addresses, addresses[:3]]
    monkeypatch.setattr(launch, "is_capturing", lambda: True)
    own = launch.pointer_table(tensors)
    assert own is not tables[0]
    assert torch.equal(own, tables[0])


def test_tensors_that_lie_differently_in_memory_are_one_batch(monkeypatch):
    grads = [random(6, 10), random(10, 6).mT, random(6, 20)[:, ::2], random(6, 13, seed=3)[:, 3:]]
    weights = [random(6, 10, seed=4), random(6, 10, seed=5), random(10, 6, seed=6).mT, random(6, 30)[:, ::3]]
    weights = [w.bfloat16() if i == 1 else w for i, w in enumerate(weights)]
    looped, keys = copy.deepcopy(weights), [key_of(i) for i in range(4)]
    before = [grad.clone() for grad in grads]
    assert update_(weights, grads, keys, lr=0.1) == [True] * 4
    twin_(monkeypatch, looped, grads, keys, lr=0.1)
    torch.testing.assert_close(weights, looped, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))


def test_a_learning_rate_on_the_device_gives_the_same_step():
    weights = [random(6, 10) for _ in range(2)]
    rates = [0.125, torch.tensor(0.125, device=DEVICE)]
    for weight, lr in zip(weights, rates, strict=True):
        update_([weight], [random(6, 10, seed=1)], lr=lr, weight_decay=0.5)
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("layout", "dtype", "num_iterations"),
    [("conv", torch.float32, 5), ("out_in", torch.float64, 5), ("out_in", torch.float32, 5.5)],
)
def test_what_the_kernels_cannot_do_is_left_to_the_twin(layout, dtype, num_iterations):
    assert not sinkgd_update.fits(
        [random(2, 4, dtype=dtype)], [random(2, 4, dtype=dtype)], KINDS[layout], num_iterations
    )


def test_an_empty_shard_is_left_to_the_twin():
    empty = torch.empty(0, 4, device=DEVICE)
    assert not sinkgd_update.fits([empty], [empty], KINDS["out_in"], 5)


@each_layout
@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, "tensor"), (torch.float32, "number")], ids=str)
def test_updates_of_plain_weights_are_written_together_as_torch_writes_each(layout, shape, dtype, rate):
    kind = layout_of(layout)
    weights = [random(*shape, dtype=dtype, seed=i) for i in range(18)]
    directions = torch.stack([kind.as_matrix(random(*shape, seed=100 + i)) for i in range(18)])
    keys = [key_of(i) for i in range(18)] if dtype == torch.bfloat16 else None
    usable = torch.arange(18, device=DEVICE) % 3 != 1
    factors = (0.1, 0.9) if rate == "number" else torch.tensor([0.1, 0.9], device=DEVICE).unbind()
    directions[0 if usable.logical_not()[0] else 1] = math.nan  # what is held back may hold anything
    twins, before = [w.clone() for w in weights], [w.clone() for w in weights]
    assert plain_update.fits_plain(weights, directions, kind)
    plain_update.plain_update_(weights, directions, usable, keys, step_size=factors[0], decay=factors[1], layout=kind)
    for i, (weight, twin) in enumerate(zip(weights, twins, strict=True)):
        if usable[i]:
            write_update_(twin, kind.back(directions[i].clone(), shape), *factors, keys[i] if keys else None)
            # With a multiply-add torch rounds once less.
            torch.testing.assert_close(weight, twin, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
            assert not torch.equal(weight, before[i])
        else:
            assert torch.equal(weight, before[i])

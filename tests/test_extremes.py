"""Any gradient that is finite gets the same step from the kernels and from torch, and bf16 weights nearly always."""

import statistics

import numpy
import pytest
import torch
import triton_interpreter  # noqa: F401
from conftest import dense, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import multinorm_update_

from hf_stateless.norms.sinkhorn import matvec, scalings_by_blocks, sinkhorn_scalings
from hf_stateless.update.kernels import cpu_compiler, cpu_sinkgd
from hf_stateless.weights.noise import rounding_key


OPTIONS = {"lr_scale": 1.0, "norms": ("row_l2", "col_l2")}
SIZES = st.sampled_from([1, 2, 3, 5, 8, 17, 40])
LONG = st.sampled_from([(1, 600), (600, 1), (2, 500), (500, 3)])
LARGEST = 3e38


@st.composite
def extreme_gradients(draw):
    """Entries of 1e-45 to 3e38, alike, by rows, by columns or each for itself, with zero rows, columns and entries."""
    m, n = draw(st.one_of(st.tuples(SIZES, SIZES), LONG))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    grad = torch.randn(m, n, dtype=torch.float64, generator=random)
    kind = draw(st.sampled_from(["alike", "rows", "columns", "entries"]))
    sizes = {"alike": (1, 1), "rows": (m, 1), "columns": (1, n), "entries": (m, n)}[kind]
    low, high = draw(st.sampled_from([(-45, 38.4), (-45, -38), (-40, -30), (30, 38.4), (-22, 19)]))
    exponents = torch.rand(sizes, dtype=torch.float64, generator=random) * (high - low) + low
    grad = (grad * 10**exponents).clamp(-LARGEST, LARGEST)
    if draw(st.booleans()):
        grad[draw(st.integers(0, m - 1))] = 0
    if draw(st.booleans()):
        grad[:, draw(st.integers(0, n - 1))] = 0
    if draw(st.booleans()):
        grad *= torch.rand(m, n, generator=random) < 0.3
    return grad.to(draw(st.sampled_from([torch.float32, torch.bfloat16]))).nan_to_num(0, LARGEST, -LARGEST)


def step_of(grad, kernels, iterations, layout="out_in"):
    """The step from zero, and whether the gradient was found finite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_STATELESS_KERNELS", kernels)
        patch.setattr(cpu_sinkgd, "_SMALLEST", 1)
        patch.setattr(cpu_sinkgd, "_WORTH_THREADS", 1 << 20)
        weight, options = torch.zeros(grad.shape), {**OPTIONS, "lr": 1.0, "weight_decay": 0.0, "layout": layout}
        [finite] = multinorm_update_([weight], [grad], None, num_iterations=iterations, **options)
    return weight, bool(finite)


def assert_alike(grad, kernels, iterations, layout="out_in"):
    with numpy.errstate(all="ignore"):
        (kernel, finite), (twin, as_twin) = (step_of(grad, one, iterations, layout) for one in (kernels, "torch"))
    assert finite == as_twin
    assert torch.isfinite(kernel).all()
    # Of what is 1e-18 times its row's largest the squares are denormal numbers, which have lost digits.
    torch.testing.assert_close(kernel, twin, rtol=1e-4, atol=1e-6)
    assert relative_error(kernel, twin) < 2e-6 or not twin.any()
    assert torch.equal(kernel == 0, twin == 0)


@settings(max_examples=20)
@given(grad=extreme_gradients(), iterations=st.sampled_from([1, 2, 5]), turned=st.booleans())
def test_triton_does_what_torch_does_on_any_gradient(grad, iterations, turned):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on CPU, in Triton's interpreter")
    layout = "in_out" if turned else "out_in"
    assert_alike(grad.mT.contiguous() if turned else grad, "triton", iterations, layout)


@pytest.mark.skipif(not cpu_compiler.compiler(), reason="needs a C compiler")
@settings(max_examples=300)
@given(grad=extreme_gradients(), iterations=st.sampled_from([1, 2, 5]))
def test_c_does_what_torch_does_on_any_gradient(grad, iterations):
    assert_alike(grad, "", iterations)


@pytest.mark.parametrize("value", [1e-45, 1e-40, 9.2e-41, 1.1e-38, 1.2e-38, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["triton", ""])
def test_the_smallest_and_largest_numbers_are_read_as_they_are(value, dtype, kernels):
    """Denormal numbers of bfloat16 as well, which Triton's interpreter casts to others."""
    if kernels and torch.cuda.is_available():
        pytest.skip("on CPU, in Triton's interpreter")
    grad = (dense(6, 9).sign() * value).to(dtype)
    assert_alike(grad, kernels, 5)


@pytest.mark.parametrize("shape", [(200_000, 4), (65_536, 16), (16, 65_536), (2, 300_000), (300_000, 2)])
def test_long_sums_keep_their_digits(shape):
    grad = dense(*shape)
    row, column = sinkhorn_scalings(grad.double())
    expected = row.unsqueeze(1) * grad * column
    blocks = [slice(first, min(first + 50_000, shape[0])) for first in range(0, shape[0], 50_000)]
    for row, column in (sinkhorn_scalings(grad), scalings_by_blocks(grad, 5, blocks)):
        assert relative_error(row.unsqueeze(1) * grad * column, expected) < 1e-6


def test_a_long_sum_is_cut_wherever_its_matrix_lies():
    stored, vector = dense(9000, 3, dtype=torch.float32).abs(), dense(9000, seed=1).abs()
    for matrix in (stored.mT, stored.mT.contiguous(), torch.stack([stored.mT] * 2)):
        vectors = vector.expand(*matrix.shape[:-2], -1)
        expected = (matrix.double() @ vectors.double().unsqueeze(-1)).squeeze(-1)
        assert relative_error(matvec(matrix, vectors), expected) < 6e-7


# What a weight of bf16 may differ in: a relative error of 1e-6 of the step reaches the other side of a spacing of
# 2^-8 with a probability of 256 in a million where the step is the weight, and of less where it is smaller.
FLIPS = {"a step as large as the weights": (1.0, 500e-6, 200e-6), "one of a tenth": (0.1, 100e-6, 40e-6)}
SHAPES = [(256, 1024), (1024, 256), (33, 8192), (8192, 33), (3, 70_000), (70_000, 3)]


@pytest.mark.skipif(not cpu_compiler.compiler(), reason="needs a C compiler")
@pytest.mark.parametrize("size", FLIPS)
def test_bf16_weights_of_c_and_torch_differ_in_few(size):
    step, worst, median = FLIPS[size]
    found = []
    for shape in SHAPES:
        for scale, key in ((1e-5, None), (1e-20, rounding_key(3, 1, torch.ones(1))), (1e20, None)):
            start, grad = dense(*shape, dtype=torch.bfloat16), dense(*shape, scale=scale, seed=1)
            results = []
            for kernels in ("", "torch"):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("HF_STATELESS_KERNELS", kernels)
                    patch.setattr(cpu_sinkgd, "_SMALLEST", 1)
                    patch.setattr(cpu_sinkgd, "_WORTH_THREADS", 1 << 20)
                    results.append(start.clone())
                    options = {**OPTIONS, "lr": step, "weight_decay": 0.1, "layout": "out_in", "num_iterations": 5}
                    multinorm_update_([results[-1]], [grad.bfloat16()], key and [key], **options)
            found.append((results[0] != results[1]).double().mean().item())
            assert not torch.equal(results[0], start)
    print(size, max(found) * 1e6, statistics.median(found) * 1e6)
    assert max(found) < worst
    assert statistics.median(found) < median

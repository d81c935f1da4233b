"""Whitening on a CUDA device: how close to the paper's polynomial in float64, and what it allocates."""

import pytest
import reference
import torch
from conftest import dense, relative_error
from test_whitening import with_spectrum

from hf_stateless.norms.projections import row_standardize
from hf_stateless.norms.whitening import WHITENINGS, newton_schulz, polar_express


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(256, 256), (250, 683), (683, 250), (33, 61)]


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", ["1/i", "log to 1e-4"])
def test_float32_on_cuda_is_the_papers_polynomial(shape, spectrum):
    grad = row_standardize(with_spectrum(*shape, spectrum))
    assert relative_error(newton_schulz(grad.cuda()).cpu(), reference.newton_schulz(grad)) <= 2e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_float16_on_cuda_has_a_cosine_of_0_999(shape):
    grad = row_standardize(with_spectrum(*shape, "1/i"))
    result = newton_schulz(grad.cuda(), ns_dtype="float16").cpu().double()
    assert torch.cosine_similarity(result.flatten(), reference.newton_schulz(grad).flatten(), dim=0) >= 0.999


@pytest.mark.parametrize("name", WHITENINGS)
def test_a_batch_on_cuda_equals_the_loop_on_cpu(name):
    grads = dense(5, 48, 129)
    loop = torch.stack([WHITENINGS[name](grad) for grad in grads])
    assert relative_error(WHITENINGS[name](grads.cuda()).cpu(), loop) <= 1e-3


@pytest.mark.parametrize("ns_dtype", ["float32", "float16"])
def test_temporaries_on_cuda_are_five_gram_matrices_and_copies_of_the_gradient(ns_dtype):
    grads = dense(4, 512, 1376).cuda()
    newton_schulz(grads, ns_dtype=ns_dtype)  # cuBLAS keeps its workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    newton_schulz(grads, ns_dtype=ns_dtype)
    gram_matrices = 4 * 512 * 512 * 4
    assert torch.cuda.max_memory_allocated() - before <= 5 * gram_matrices + 3 * grads.nbytes


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("shape", [(256, 256), (300, 683), (683, 300)])
@pytest.mark.parametrize(("spectrum", "least"), [("1/i", 0.999), ("log to 1e-4", 0.985)])
def test_bfloat16_on_cuda_is_as_close_to_float64_as_on_a_cpu(shape, steps, spectrum, least):
    grad = row_standardize(with_spectrum(*shape, spectrum))
    exact = polar_express(grad.double(), ns_steps=steps)
    for device in ("cpu", "cuda"):
        result = polar_express(grad.to(device), ns_steps=steps, ns_dtype="bfloat16").cpu()
        assert result.dtype == torch.float32
        assert torch.cosine_similarity(result.double().flatten(), exact.flatten(), dim=0) >= least, device


@pytest.mark.parametrize("shape", [(256, 512), (255, 512)])
def test_large_matrices_are_multiplied_in_bfloat16_where_the_card_is_fast_in_it(shape):
    grad = dense(*shape).cuda()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) and min(shape) >= 256
    assert torch.equal(polar_express(grad), polar_express(grad, ns_dtype="bfloat16" if fast else "float32"))


def test_temporaries_of_polar_express_on_cuda_are_two_copies_in_bfloat16_and_the_result():
    grads = dense(4, 512, 1376).cuda()
    polar_express(grads, ns_dtype="bfloat16")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    polar_express(grads, ns_dtype="bfloat16")
    gram_matrices = 4 * 512 * 512 * 2
    assert torch.cuda.max_memory_allocated() - before <= 3 * gram_matrices + 2 * grads.nbytes

"""What only a CUDA device can show; run with `pytest -m gpu`, skipped elsewhere."""

import pytest
import torch

import hf_stateless
from hf_stateless import PRESETS, StatelessOptimizer
from hf_stateless.weights.noise import rounding_key, rounding_noise


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(64, 96)] * 3 + [(96, 64)] * 2 + [(33, 17), (4, 32, 48)]


def stepped(device, dtype, steps=3, **options):
    """The weights after a few steps with the same random weights and gradients on any device."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).mul(0.02).to(dtype).to(device)) for s in SHAPES]
    optimizer = StatelessOptimizer([{"params": params, "algorithm": "multinorm", **options}], lr=1e-2)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype).to(device)
        optimizer.step()
    return [p.detach().cpu() for p in params]


@pytest.mark.parametrize("name", PRESETS)
def test_batched_steps_on_cuda_equal_the_loop_on_cpu(name):
    options = PRESETS[name].group()
    pairs = zip(*(stepped(device, torch.float32, **options) for device in ("cuda", "cpu")), strict=True)
    for cuda, cpu in pairs:
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-5)


def test_rounding_noise_is_the_same_on_cuda_and_cpu():
    noise = [
        rounding_noise(65, 130, rounding_key(3, 7, torch.full((1,), 11.0, device=device))).cpu()
        for device in ("cuda", "cpu")
    ]
    assert torch.equal(*noise)


def test_two_bf16_runs_on_cuda_are_bitwise_equal():
    first, second = stepped("cuda", torch.bfloat16), stepped("cuda", torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "embeddings", ["adamw", "adamw_8bit", "sinkhorn_momentum", "row_moment", "factored", "stateless"]
)
def test_every_treatment_of_embeddings_trains_on_cuda(embeddings, make_model):
    if embeddings == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = make_model("llama").cuda().to(torch.bfloat16)
    optimizer = hf_stateless.create_optimizer(model, "sinkgd", lr=1e-2, embeddings=embeddings)
    ids = torch.randint(0, model.config.vocab_size, (4, 16), device="cuda")
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_layerwise_updates_lower_the_peak_memory():
    peaks = {}
    for layerwise in (None, "matrices"):
        torch.cuda.empty_cache()
        params = [torch.nn.Parameter(torch.randn(1024, 1024, device="cuda") * 0.02) for _ in range(32)]
        optimizer = StatelessOptimizer([{"params": params, "algorithm": "multinorm"}], lr=1e-3, release=layerwise)
        optimizer.train()
        torch.cuda.reset_peak_memory_stats()
        x = torch.randn(16, 1024, device="cuda")
        for p in params:
            x = x @ p
        x.sum().backward()
        optimizer.step()
        peaks[layerwise] = torch.cuda.max_memory_allocated()
        del params, optimizer, x, p
    # 32 gradients of 4 MiB are alive at once without release; a few of them with it.
    assert peaks["matrices"] < peaks[None] - 20 * 4 * 2**20

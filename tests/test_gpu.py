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


def groups_of_every_kind(lr):
    """Groups of all rules that have no decomposition into eigenvalues, in bf16, with gradients."""
    torch.manual_seed(0)

    def group(algorithm, *shapes, **options):
        params = [torch.nn.Parameter(torch.randn(s, device="cuda").bfloat16() * 0.02) for s in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        return {"params": params, "algorithm": algorithm, "lr": lr, "weight_decay": 0.1, **options}

    chains = [{"norms": preset.norms, "num_iterations": preset.num_iterations} for preset in PRESETS.values()]
    return [
        *(group("multinorm", *SHAPES, **chain) for chain in chains),
        group("multinorm", (64, 96), (64, 96), **chains[0], min_signal=0.5),
        *(group("multinorm", (64, 256), (64, 256), **chain, momentum=0.9) for chain in chains),
        group("adamw", (64, 96), (96,), (33,), (33,)),
        *(group(name, (64, 96)) for name in ("sinkhorn_momentum", "row_moment", "column_moment", "factored")),
    ]


def weights_in(optimizer):
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("rate", ["number", "tensor"])
@pytest.mark.parametrize("kernels", ["", "torch"])
def test_a_step_never_waits_for_the_device(rate, kernels, monkeypatch, caplog):
    monkeypatch.setenv("HF_STATELESS_KERNELS", kernels)
    optimizer = StatelessOptimizer(groups_of_every_kind(1e-2 if rate == "number" else torch.tensor(1e-2).cuda()))
    bad = [group["params"][0] for group in optimizer.param_groups]
    for p in bad:
        p.grad[0, 0] = float("nan")
    before = [p.detach().clone() for p in bad]
    optimizer.step()  # compiles kernels, and copies tables to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, bad, before))
    optimizer.state_dict()
    assert len({r.getMessage() for r in caplog.records if "has NaN" in r.getMessage()}) == len(bad)


@pytest.mark.parametrize("kernels", ["", "torch"])
def test_a_captured_step_replays_the_steps_of_a_schedule_to_the_bit(kernels, monkeypatch):
    """The noise of rounding advances with the counters on the device."""
    monkeypatch.setenv("HF_STATELESS_KERNELS", kernels)
    rate = torch.tensor(1e-2, device="cuda")
    eager, captured = (StatelessOptimizer(groups_of_every_kind(rate)) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    eager.step()
    for lr in (3e-3, 1e-2, 1e-3):
        rate.fill_(lr)
        graph.replay()
        eager.step()
        assert all(map(torch.equal, weights_in(captured), weights_in(eager)))

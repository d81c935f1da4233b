"""Whole steps of an optimizer by the Triton kernels and by their torch twins, and how many launches they take."""

import math

import pytest
import torch
from kernel_runs import DEVICE, kernels, key_of, random, twin_, update_  # noqa: F401

from hf_stateless import PRESETS, StatelessOptimizer
from hf_stateless.ranks import alone
from hf_stateless.update import reads
from hf_stateless.update.kernels import int8 as int8_update
from hf_stateless.update.kernels import launch
from hf_stateless.update.kernels import plain as plain_update
from hf_stateless.update.kernels import sinkgd as sinkgd_update


pytest.importorskip("triton")


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (3, 5, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_whitened_step_is_written_by_one_kernel_for_all(shape, dtype, launches, monkeypatch):
    def step(choice):
        monkeypatch.setenv("HF_STATELESS_KERNELS", choice)
        monkeypatch.setattr(reads, "_READ_AT_ONCE", ())
        monkeypatch.setattr(alone, "BATCH_BYTES", 1 << 20)
        params = [torch.nn.Parameter(random(*shape, dtype=dtype, seed=i)) for i in range(5)]
        group = {"params": params, "algorithm": "multinorm", **PRESETS["swan"].group(), "weight_decay": 0.1}
        for i, p in enumerate(params):
            p.grad = random(*shape, dtype=dtype, seed=100 + i) * (math.nan if i == 3 else i != 1)
        optimizer = StatelessOptimizer([group], lr=0.05)
        optimizer.step()
        return params, [optimizer.state[p]["step"].item() for p in params], optimizer.updates_not_finite

    ours, twins = step("triton"), step("torch")
    assert launches.count("apply_update") >= 1
    assert ours[1:] == twins[1:] == ([1, 1, 1, 0, 1], 1)
    for one, twin in zip(ours[0], twins[0], strict=True):
        torch.testing.assert_close(one, twin, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("held", [True, False])
def test_what_min_signal_holds_back_on_the_device_is_no_work_for_kernels(held, monkeypatch):
    """The kernel knows of no flag: its factors are 0 and 1 where nothing may move."""
    monkeypatch.setattr(reads, "_READ_AT_ONCE", ())
    weights = [torch.nn.Parameter(random(6, 10, dtype=torch.bfloat16, seed=i)) for i in range(3)]
    group = {"params": weights, "algorithm": "multinorm", "weight_decay": 0.1, "min_signal": 0.5}
    optimizer = StatelessOptimizer([group], lr=0.05)
    for step in range(18):
        before = [w.detach().clone() for w in weights]
        for i, w in enumerate(weights):
            w.grad = random(6, 10, dtype=torch.bfloat16, seed=i) * (0.01 if held and step == 17 else 1)
        optimizer.step()
    assert all(torch.equal(w, b) == held for w, b in zip(weights, before, strict=True))
    assert optimizer.held_steps == held
    assert [optimizer.state[w]["step"].item() for w in weights] == [18 - held] * 3


def stepped(monkeypatch, choice, steps=2):
    """An optimizer after some steps with one bad gradient, and what it holds."""
    monkeypatch.setenv("HF_STATELESS_KERNELS", choice)
    shapes = [(6, 10), (6, 10), (0, 10), (3, 5, 8), (12,)]
    params = [torch.nn.Parameter(random(*s, dtype=torch.bfloat16, seed=i)) for i, s in enumerate(shapes)]
    groups = [
        {"params": params[:4], "algorithm": "multinorm", "weight_decay": 0.1},
        {"params": params[4:], "algorithm": "multinorm", "layout": "vector"},
    ]
    optimizer = StatelessOptimizer(groups, lr=0.05)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = random(*p.shape, dtype=torch.bfloat16, seed=100 * step + i)
        if step:
            params[1].grad[2, 2] = math.nan
        optimizer.step()
    return params, [optimizer.state[p]["step"].item() for p in params if p.numel()]


def test_an_optimizer_steps_as_with_the_twin(monkeypatch, caplog):
    params, counts = stepped(monkeypatch, "triton")
    assert caplog.text.count("parameter 1 has NaN or infinite entries") == 1
    twin_params, twin_counts = stepped(monkeypatch, "torch")
    assert counts == twin_counts == [2, 1, 2, 2]
    for ours, theirs in zip(params, twin_params, strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that were launched."""
    names = []

    def start(kernel, programs, *args, **options):
        names.append(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__)
        launched(kernel, programs, *args, **options)

    launched = launch.start
    for module in (launch, sinkgd_update, int8_update, plain_update):
        monkeypatch.setattr(module, "start", start)
    return names


def test_launches_grow_with_chunks_and_not_with_matrices(launches):
    counts = []
    launch._table.cache_clear()  # an allocator may give these tensors the addresses of others before them
    for matrices in (3, 9):
        params = [torch.nn.Parameter(random(4, 6, dtype=torch.bfloat16, seed=i)) for i in range(matrices)]
        for p in params:
            p.grad = torch.ones_like(p)
        launches.clear()
        StatelessOptimizer([{"params": params, "algorithm": "multinorm"}], lr=0.1).step()
        counts.append(len(launches))
        assert launches.count("write_pointers") == 2
        assert launches.count("pass_whole_rows") == launches.count("finish_columns") == 5
        assert launches.count("apply_update") == 1
    assert counts == [13, 13]

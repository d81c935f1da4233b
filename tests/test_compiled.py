"""SinkGD on CPU through torch.compile: the same as the eager step, only when asked for, and told once."""

import logging
import shutil

import pytest
import torch
from conftest import dense, relative_error

from hf_stateless import StatelessOptimizer, compiled
from hf_stateless.rounding import rounding_key
from hf_stateless.update_rules import multinorm_update_


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"),
]

RULE = {"lr": 0.01, "lr_scale": 0.4, "weight_decay": 0.1, "layout": "out_in", "norms": ("row_l2", "col_l2")}
SHAPES = [(128, 128), (172, 512), (512, 172), (246, 5461)]


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv("HF_STATELESS_COMPILE", "1")


@pytest.fixture
def calls(monkeypatch):
    """The results of the compiled steps that were taken."""
    results, step = [], compiled.compiled_update_

    def recorded(*args, **options):
        results.append(step(*args, **options))
        return results[-1]

    monkeypatch.setattr(compiled, "compiled_update_", recorded)
    return results


def updated(weight, grad, key=None, **options):
    result = weight.clone()
    finite = multinorm_update_([result], [grad], None if key is None else [key], **RULE, num_iterations=5, **options)
    assert finite == [True]
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_compiled_step_is_the_eager_one(shape, dtype, asked, calls, monkeypatch):
    weight, grad = (dense(*shape, seed=s).float().to(dtype) for s in (1, 2))
    key = rounding_key(0, 1, torch.ones(1)) if dtype == torch.bfloat16 else None
    result = updated(weight, grad, key)
    assert calls == [True]
    monkeypatch.delenv("HF_STATELESS_COMPILE")
    eager = updated(weight, grad, key)
    assert len(calls) == 1
    assert not torch.equal(eager, weight)
    if dtype == torch.float32:
        assert relative_error(result, eager) <= 1e-6
    else:
        assert (result != eager).float().mean() <= 1e-4


@pytest.mark.parametrize("spread", [1e-30, 1e30])
def test_rows_too_far_apart_for_squares_are_left_to_the_eager_step(spread, asked, calls, monkeypatch):
    weight, grad = torch.zeros(128, 128), dense(128, 128).float()
    grad[1] *= spread
    result = updated(weight, grad)
    assert calls == [None]
    monkeypatch.delenv("HF_STATELESS_COMPILE")
    assert torch.equal(result, updated(weight, grad))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_zero_or_bad_gradient_leaves_the_weight_alone(value, asked, calls):
    weight, grad = torch.nn.Parameter(torch.ones(128, 128)), torch.ones(128, 128)
    weight.grad = grad.fill_(value)
    StatelessOptimizer([{"params": [weight], "algorithm": "multinorm", "weight_decay": 0.1}], lr=0.1).step()
    assert calls == [None]
    assert torch.equal(weight, torch.ones(128, 128))


def test_the_time_of_the_compilation_is_told_once(asked, caplog):
    compiled._ready.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hf_stateless"):
        for seed in range(3):
            updated(torch.zeros(160, 128), dense(160, 128, seed=seed).float())
    (message,) = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
    assert "float32 on CPU, for all shapes, in " in message


def test_a_compiler_that_fails_is_told_once_and_the_eager_step_goes_on(asked, caplog, monkeypatch):
    weight, grad = torch.zeros(128, 128), dense(128, 128).float()
    monkeypatch.setattr(compiled, "_state", {"failed": False})
    monkeypatch.setattr(compiled, "_ready", lambda *_: (_ for _ in ()).throw(RuntimeError("no compiler\nat all")))
    with caplog.at_level(logging.WARNING, logger="hf_stateless"):
        results = [updated(weight, grad) for _ in range(2)]
    assert [record.getMessage() for record in caplog.records] == [
        "HF_STATELESS_COMPILE=1: compilation failed, SinkGD goes on without it (RuntimeError: no compiler)."
    ]
    monkeypatch.delenv("HF_STATELESS_COMPILE")
    assert all(torch.equal(result, updated(weight, grad)) for result in results)

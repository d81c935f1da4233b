"""No step reads a tensor on the host where that would wait for a GPU, and it does what it does on CPU."""

import logging

import pytest
import torch
from conftest import dense
from roads import ARRIVED, CASES, GUARDED, LORA, OF_MATRICES, OF_THE_REST, nothing_waits, of_cpus, of_gpus, steps_of

from hf_stateless import StatelessOptimizer
from hf_stateless.optimizer import adamw
from hf_stateless.optimizer.rules import RULES
from hf_stateless.update import reads
from hf_stateless.weights.stored import stand_in


# Tables that are copied to the device once, and kept.
AT_FIRST = {("noise.py", "_key_constants"), ("rounding.py", "places")} | ARRIVED
KINDS = ("plain", "nan", "zero", "plain", "third", "inf", "-inf", "zero", "plain")


def on_both(make, kinds, caplog):
    """What is left on the road of CPUs and on that of GPUs, and what is said on each."""
    left = []
    for road in (of_cpus, of_gpus):
        caplog.clear()
        optimizer, tensors = steps_of(make, kinds, road)
        optimizer.state_dict()  # at the latest here the host hears of all
        left.append((tensors, sorted(record.getMessage() for record in caplog.records), optimizer))
    return left


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("case", [*OF_MATRICES, *OF_THE_REST, *LORA])
def test_the_road_of_gpus_never_reads_and_leaves_the_bits_of_the_road_of_cpus(case, caplog):
    """NaN, infinity, zero and zero in a part included: weights, states, counters and warnings."""
    if case == "adamw 8 bits":
        pytest.importorskip("bitsandbytes")
    caplog.set_level(logging.WARNING)
    (expected, warned, _), (actual, told, _) = on_both(CASES[case], KINDS, caplog)
    assert_same_bits(actual, expected)
    assert told == warned
    assert len(warned) >= 3


@pytest.mark.parametrize("case", GUARDED)
@pytest.mark.parametrize("kinds", [("weak",), ("zero", "weak", "plain", "weak"), ("nan", "weak", "inf", "zero")])
def test_min_signal_holds_back_the_same_steps_on_both_roads(case, kinds, caplog):
    """16 steps make the history; a zero or bad gradient is not remembered."""
    caplog.set_level(logging.WARNING)
    kinds = ("plain",) * 17 + kinds
    (expected, warned, cpu), (actual, told, device) = on_both(GUARDED[case], kinds, caplog)
    assert_same_bits(actual, expected)
    assert told == warned
    assert device.held_steps == cpu.held_steps > 0


@pytest.mark.parametrize("case", [name for name in CASES if "float64" not in name and "complex" not in name])
def test_a_learning_rate_on_the_device_is_never_read(case):
    """The rate goes through a product more than a number does, so the last digit may differ."""
    if case == "adamw 8 bits":
        pytest.importorskip("bitsandbytes")
    left = [steps_of(CASES[case], KINDS[:5], of_gpus, lr)[1] for lr in (torch.tensor(0.05), 0.05)]
    tolerance = 0.05 if any(word in case for word in ("bf16", "int8", "8 bits")) else 2e-3
    for a, b in zip(*left, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=4 if a.dtype == torch.int8 else tolerance
        )


@pytest.mark.parametrize("case", [name for name in CASES if "lora" not in name and "complex" not in name])
def test_a_rate_of_zero_on_the_device_moves_no_weight(case):
    if case == "adamw 8 bits":
        pytest.importorskip("bitsandbytes")
    _, (first, *_) = steps_of(CASES[case], ["plain"], of_gpus, torch.tensor(0.0))
    expected = CASES[case]()["params"][0]
    assert torch.equal(first, getattr(expected, "stored", (expected.detach(),))[0])


@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("case", [name for name in CASES if "8 bits" not in name])
def test_tensors_without_contents_are_stepped(case, lr, monkeypatch):
    """What looks at a value, and what copies one from or to the host, fails: there is nothing to look at."""
    sent = []
    monkeypatch.setattr(reads, "to_host", lambda values: (values, sent.append(values) or NeverThere()))
    monkeypatch.setattr(adamw, "adamw", lambda *args, **kwargs: None)  # of torch: it has no form without contents
    group = CASES[case]()
    group["params"] = [stand_in(p, "meta") for p in group["params"]]
    optimizer = StatelessOptimizer([group], lr=0.05)
    if lr == "tensor":
        optimizer.param_groups[0]["lr"] = torch.full((), 0.05, device="meta")
    for step in range(3):
        for p in group["params"]:
            p.grad = torch.ones(p.shape, dtype=p.dtype, device="meta")
        with nothing_waits(AT_FIRST if step == 0 else ARRIVED):
            optimizer.step()
    assert {values.device.type for values in sent} == {"meta"}
    assert len(sent) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", [name for name in RULES if name not in ("lora_product", "adamw_8bit")])
def test_hooks_in_backward_never_read_either(algorithm, dtype, caplog):
    """One gradient has NaN, one is zero."""
    left = []
    for road in (of_cpus, of_gpus):
        caplog.clear()
        params = [torch.nn.Parameter(dense(6, 9, dtype=dtype, seed=i)) for i in range(3)]
        group = {"params": params, "algorithm": algorithm, "weight_decay": 0.1}
        optimizer = StatelessOptimizer([group], lr=0.05, release="all")
        for step, factors in enumerate(([1, 1, 1], [1, float("nan"), 0], [0, 1, 1])):
            with road():
                optimizer.train()
                sum((p * dense(6, 9, seed=step) * f).sum() for p, f in zip(params, factors, strict=True)).backward()
                optimizer.step()
        held = [optimizer.state[p][name] for p in params for name in sorted(optimizer.state[p])]
        left.append([t.detach().clone() for t in (*params, *held)])
        assert sum("parameter 1 has NaN" in record.getMessage() for record in caplog.records) == 1
    assert_same_bits(*left)


@pytest.mark.parametrize("kind", ["number of a step later", "asked for", "saved", "put to sleep"])
def test_what_the_device_has_not_told_yet_is_heard_later_or_waited_for(kind, monkeypatch, caplog):
    """The event of a copy that is done after one look, or when it is waited for."""
    monkeypatch.setattr(reads, "_READ_AT_ONCE", ())
    monkeypatch.setattr(reads, "to_host", lambda values: (values, ThereNextTime()))
    p = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = StatelessOptimizer([{"params": [p], "algorithm": "multinorm"}])
    p.grad = torch.full((2, 3), float("nan"))
    optimizer.step()
    assert not caplog.records
    p.grad = torch.ones(2, 3)
    hear = {"saved": optimizer.state_dict, "put to sleep": optimizer.eval, "asked for": lambda: optimizer.held_steps}
    hear.get(kind, optimizer.step)()
    assert [record.getMessage()[:39] for record in caplog.records] == ["The gradient of parameter 0 has NaN or "]


class ThereNextTime:
    done = False

    def query(self):
        done, self.done = self.done, True
        return done

    def synchronize(self):
        self.done = True


class NeverThere:
    """The event of a copy that is not done yet."""

    def query(self):
        return False

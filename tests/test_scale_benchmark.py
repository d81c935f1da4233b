"""`recipes/benchmarks/scale.py`: its rules are those of the real step, and its table is that of its JSON."""

import json

import communication
import pytest
import scale
import torch
from conftest import TINY_MODELS
from documents import ROOT, read

from hf_stateless.reports.predicted import Settings, build_model, estimate


RESULTS = ROOT / "recipes" / "benchmarks" / "results" / "scale.json"
SHAPES = [(96, 64), (96, 64), (64, 96), (32, 64), (32, 64), (32, 64)]
STACKS = [scale.Stack((96, 64), 2), scale.Stack((64, 96), 1), scale.Stack((32, 64), 3)]


@pytest.mark.parametrize("ranks", [2, 4, 5])
@pytest.mark.parametrize(("row", "rule"), [("swan", scale.exchanged), ("sinkgd", scale.summed)])
def test_the_bytes_are_those_of_the_real_step(row, rule, ranks):
    real = [communication.count(row, SHAPES, ranks, rank, torch.bfloat16) for rank in range(ranks)]
    counted = rule(STACKS, ranks)
    assert counted["collectives"] == max(traffic.collectives for traffic in real)
    assert counted["bytes"] == pytest.approx(max(traffic.bytes for traffic in real), rel=0.01)


@pytest.mark.parametrize(("name", "step"), [("swan", "swan"), ("sinkgd", "sinkgd"), ("swan_layerwise", "swan")])
def test_a_prediction_tells_what_the_step_of_that_model_sends(name, step):
    model = build_model(TINY_MODELS["llama"]().config, Settings())
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if n.endswith("proj.weight")]
    real = max(communication.count(step, shapes, 2, rank, torch.bfloat16).bytes for rank in range(2))
    (row,) = estimate(model, [name], Settings(seq=16, fsdp=2))
    assert row.sent == pytest.approx(real, rel=0.02)
    weights = sum(p.numel() * 2 for p in model.parameters())
    assert row.sent_by_fsdp == pytest.approx(3 * weights / 2, rel=0.01)


@pytest.mark.parametrize(("name", "sent"), [("adamw_torch", 0), ("adafactor", None), ("multinorm", None)])
def test_what_is_in_no_formula_is_not_told(name, sent):
    model = build_model(TINY_MODELS["gpt2"]().config, Settings())
    (row,) = estimate(model, [name], Settings(seq=16, fsdp=4))
    assert row.sent == sent
    assert row.sent_by_fsdp > 0


def test_the_models_have_the_parameters_that_their_names_say():
    sizes = {
        name: sum(s.count * s.shape[0] * s.shape[1] * s.experts for s in model.stacks)
        for name, model in scale.MODELS.items()
    }
    expected = {"7B": 6.5e9, "70B": 68.5e9, "Qwen3-235B-A22B": 234e9, "DeepSeek-V3": 669e9}
    assert sizes == {name: pytest.approx(size, rel=0.02) for name, size in expected.items()}


def test_experts_are_sent_nowhere_and_whitened_where_they_lie():
    alone = scale.exchanged([scale.Stack((64, 96), 2)], 4)
    beside = scale.exchanged([scale.Stack((64, 96), 2), scale.Stack((64, 96), 3, experts=8)], 4)
    assert beside["bytes"] == alone["bytes"] > 0
    assert beside["whitening"] == pytest.approx(alone["whitening"] + 3 * 2 * scale.whitening_seconds((64, 96)))


def test_the_table_on_the_page_is_that_of_the_file_and_is_counted_anew():
    records = json.loads(RESULTS.read_text(encoding="utf-8"))["records"]
    assert [(r["model"], r["cards"]) for r in records] == [(m, c) for m in scale.MODELS for c in scale.CARDS]
    assert scale.table(records) in read("recipes/benchmarks/README.md")
    anew = scale.table([scale.record("7B", 8), scale.record("DeepSeek-V3", 512)]).splitlines()[2:]
    assert set(anew) <= set(scale.table(records).splitlines())

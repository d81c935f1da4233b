"""`recipes/benchmarks/scale.py`: its rules are those of the real step, and its table is that of its JSON."""

import json

import communication
import pytest
import scale
import torch
from documents import ROOT, read


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

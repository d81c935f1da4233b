"""The table of GRPO on the page is what the committed results hold."""

import json

import pytest
from documents import ROOT, section


RATES = (5e-6, 1e-5, 2e-5, 4e-5)
RESULTS = json.loads((ROOT / "recipes/benchmarks/results/grpo-sums-cpu.json").read_text(encoding="utf-8"))
RUNS = {(record["title"], record["learning_rate"]): record for record in RESULTS["records"]}


def cell(title, rate):
    if (title, rate) not in RUNS:
        return "not run"
    passed = RUNS[title, rate]["passed"]
    return "collapsed" if passed is None else f"{passed:.3f}"


@pytest.mark.parametrize("title", ["AdamW", "`sinkgd`", "`swan`"])
def test_the_shares_on_the_page_are_the_results(title):
    cells = [cell(title, rate) for rate in RATES]
    assert f"| {title} | {' | '.join(cells)} |" in section("recipes/README.md", "GRPO").replace("**", "")


def test_the_best_of_all_three_lie_within_one_standard_error():
    best = {}
    for (title, _), record in RUNS.items():
        if record["passed"] is not None:
            best[title] = max(best.get(title, 0.0), record["passed"])
    errors = [record["standard_error"] for record in RUNS.values() if record["passed"] in best.values()]
    assert max(best.values()) - min(best.values()) < min(errors)
    assert "level at the best of these" in section("recipes/README.md", "GRPO")

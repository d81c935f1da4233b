"""The benchmark of the step's time: counted bytes, a real tiny run, and what the README says of the results."""

import argparse
import json
import os
import sys

import pytest
import torch
from documents import ROOT, read


sys.path.insert(0, str(ROOT / "recipes" / "benchmarks"))

import step_time
import step_time_rows
from step_time_rows import BASELINE, ROWS, SLOW, Row


RESULTS = ROOT / "recipes" / "benchmarks" / "results"
TABLES = ["step-time-cpu.json", "step-time-2-threads-cpu.json", "step-time-whitening-cpu.json"]


def test_bytes_are_gradient_weight_and_state_once_each_way():
    """AdamW in float32 reads four numbers for each weight and writes three; SinkGD reads two and writes one."""
    assert ROWS[BASELINE].least_bytes(10, 4) == 10 * 7 * 4
    assert ROWS[BASELINE].least_bytes(10, 2) == 10 * 7 * 2
    assert ROWS["sinkgd"].least_bytes(10, 4) == 10 * 3 * 4
    assert ROWS["AdamW8bit (bitsandbytes)"].least_bytes(256, 2) == 256 * (3 * 2 + 4) + 4 * 4


def test_a_row_without_its_package_says_so():
    assert (
        Row(None, needs="a_package_that_is_not_there").missing("cpu") == "a_package_that_is_not_there is not installed"
    )
    assert ROWS["swan, float16"].missing("cpu") == "not on cpu"
    assert ROWS["sinkgd"].missing("cpu") == ROWS["swan, float16"].missing("cuda") == ""


def test_kernels_are_off_for_the_time_of_a_step_only(monkeypatch):
    monkeypatch.delenv("HF_STATELESS_KERNELS", raising=False)
    with ROWS["sinkgd, torch"].at_work():
        assert os.environ["HF_STATELESS_KERNELS"] == "torch"
    assert "HF_STATELESS_KERNELS" not in os.environ


def test_a_tiny_run_measures_every_row_that_is_here(monkeypatch):
    monkeypatch.setitem(step_time.MODELS, "60m", (64, 96, 1, 2))
    monkeypatch.setattr(step_time, "SEQUENCE", 16)
    rows = [row for row in ROWS if not ROWS[row].missing("cpu")]
    args = argparse.Namespace(rows=rows, layers=None, rounds=2, device="cpu", train_step=1000)
    bandwidth = step_time.copy_bandwidth("cpu", size=1 << 20)
    records = step_time.measure("60m", torch.float32, bandwidth, args)
    assert [record["optimizer"] for record in records] == rows
    weights = 4 * 64 * 64 + 3 * 64 * 96
    for record in records:
        assert record["milliseconds"] > 0
        assert 0 < record["share_of_training_step"] < 1
        assert record["least_bytes"] == ROWS[record["optimizer"]].least_bytes(weights, 4)
    assert records[0]["ratio"] == 1
    assert step_time.table(records).count("\n") == 1 + len(rows)
    assert len(step_time.shares(records).splitlines()) == len(rows)


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_readme_are_the_results(name):
    assert step_time.table(json.loads((RESULTS / name).read_text())["records"]) in read("README.md")


@pytest.mark.parametrize("name", TABLES[:2])
def test_sinkgd_on_a_cpu_takes_at_most_twice_fused_adamw_in_the_results(name):
    records = [r for r in json.loads((RESULTS / name).read_text())["records"] if r["optimizer"] == "sinkgd"]
    assert {(r["model"], r["dtype"]) for r in records} == {
        (model, dtype) for model in ("60m", "130m") for dtype in ("float32", "bfloat16")
    }
    assert max(r["ratio"] for r in records) <= 2


def test_the_shares_in_the_readme_are_the_results():
    records = json.loads((RESULTS / "step-time-share-cpu.json").read_text())["records"]
    for row in (BASELINE, "sinkgd", "swan"):
        shares = [100 * r["share_of_training_step"] for r in records if r["optimizer"] == row]
        assert f"{min(shares):.2g} to {max(shares):.2g} %" in read("README.md")


def test_slow_rows_are_rows():
    assert set(SLOW) < set(step_time_rows.ROWS)

"""The benchmark of the step's time: counted bytes, a real tiny run, and what the pages say of the results."""

import argparse
import json
import os
import sys

import pytest
import step_time
import step_time_rows
import torch
from documents import ROOT, page_with, section
from step_time_rows import BASELINE, ROWS, SLOW, Row


RESULTS = ROOT / "recipes" / "benchmarks" / "results"
AMX = ["step-time-whitening-amx-cpu.json", "step-time-whitening-amx-2-threads-cpu.json"]
TABLES = ["step-time-cpu.json", "step-time-2-threads-cpu.json", "step-time-whitening-cpu.json", *AMX]


def test_bytes_are_gradient_weight_and_state_once_each_way():
    """AdamW in float32 reads four numbers for each weight and writes three; SinkGD reads two and writes one."""
    shapes = [(2, 3), (4, 1)]
    assert ROWS[BASELINE].least_bytes(shapes, 4) == 10 * 7 * 4
    assert ROWS[BASELINE].least_bytes(shapes, 2) == 10 * 7 * 2
    assert ROWS["sinkgd"].least_bytes(shapes, 4) == 10 * 3 * 4
    assert ROWS["AdamW8bit (bitsandbytes)"].least_bytes([(16, 16)], 2) == 256 * (3 * 2 + 4) + 4 * 4


def test_bytes_of_low_rank_moments_are_those_of_the_longer_side():
    weights = 512 * 1376
    assert ROWS["APOLLO (apollo_torch)"].least_bytes([(512, 1376)], 4) == 12 * weights + 2 * 2 * 4 * 256 * 1376


def test_a_row_without_its_package_says_so(monkeypatch):
    missing = Row(None, needs="a_package_that_is_not_there")
    assert missing.missing("cpu") == "a_package_that_is_not_there is not installed"
    assert ROWS["swan, newton_schulz, float16"].missing("cpu") == "not on cpu"
    assert ROWS["sinkgd"].missing("cpu") == ROWS["swan, newton_schulz, float16"].missing("cuda") == ""
    monkeypatch.setitem(ROWS, "missing", missing)
    args = argparse.Namespace(rows=["missing", "sinkgd"], slow=False, device="cpu")
    step_time.choose_rows(args)
    assert args.rows == [BASELINE, "sinkgd"]
    assert args.left_out == {"missing": "a_package_that_is_not_there is not installed"}


def test_a_row_whose_package_fails_says_so():
    def fails(params):
        raise RuntimeError("no library for this device")

    assert Row(fails, needs="torch").missing("cpu") == "torch fails on cpu: RuntimeError"


def test_a_row_steps_once_to_see_whether_its_package_works():
    stepped = []

    class Counted(torch.optim.SGD):
        def step(self):
            stepped.append(self)

    assert Row(Counted, needs="torch").missing("cpu") == ""
    assert len(stepped) == 1


def test_kernels_are_off_for_the_time_of_a_step_only(monkeypatch):
    monkeypatch.delenv("HF_STATELESS_KERNELS", raising=False)
    with ROWS["sinkgd, torch"].at_work():
        assert os.environ["HF_STATELESS_KERNELS"] == "torch"
    assert "HF_STATELESS_KERNELS" not in os.environ


def test_a_tiny_run_measures_every_row_that_is_here(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(step_time.MODELS, "60m", (64, 96, 1, 2))
    monkeypatch.setattr(step_time, "SEQUENCE", 16)
    monkeypatch.setattr(step_time, "COPIED", 1 << 20)
    output = tmp_path / "results.json"
    rows = [row for row in ROWS if not ROWS[row].needs and "cpu" in ROWS[row].devices]
    words = ["--models", "60m", "--rounds", "2", "--train_step", "1000", "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["step_time.py", "--rows", *rows, *words])
    step_time.main()
    results = json.loads(output.read_text())
    records, setup = results["records"], results["setup"]
    assert [(r["dtype"], r["optimizer"]) for r in records] == [(d, r) for d in ("float32", "bfloat16") for r in rows]
    shapes = [(64, 64)] * 4 + [(96, 64)] * 2 + [(64, 96)]
    for record in records:
        low, high = record["milliseconds_quartiles"]
        assert 0 < low <= record["milliseconds"] <= high
        assert 0 < record["host_milliseconds"] <= high
        assert 0 < record["share_of_training_step"] < 1
        assert record["forward_and_backward_seconds"] > 0
        assert record["of_copy_bandwidth"] > 0
        size = {"float32": 4, "bfloat16": 2}[record["dtype"]]
        assert record["least_bytes"] == ROWS[record["optimizer"]].least_bytes(shapes, size)
    assert records[0]["ratio"] == 1
    assert setup["torch"] == torch.__version__
    assert setup["command"].endswith(f"--rounds 2 --train_step 1000 --device cpu --output {output}")
    assert step_time.table(records) in capsys.readouterr().out
    assert step_time.table(records).count("\n") == 1 + len(rows)
    assert len(step_time.shares(records).splitlines()) == 2 * len(rows)


def test_the_bandwidth_is_that_of_the_same_round(monkeypatch):
    """A step as long as the copy beside it, however noisy the rounds are."""
    monkeypatch.setattr(step_time, "COPIED", 500)
    monkeypatch.setattr(step_time, "rounds", lambda *_: {"copy": [1.0, 7.0, 2.0], BASELINE: [1.0, 7.0, 2.0]})
    args = argparse.Namespace(layers=1, train_step=None, device="cpu")
    (record,) = step_time.measure("60m", torch.float32, args)
    assert record["of_copy_bandwidth"] == record["least_bytes"] / 1000
    assert record["of_copy_bandwidth_quartiles"] == [record["of_copy_bandwidth"]] * 2
    assert record["milliseconds"] == 2000


@pytest.mark.parametrize("host", [0.25, 1.0, 1.5])
def test_the_time_of_the_host_ends_where_the_call_returns(monkeypatch, host):
    """On a device of its own the step goes on after that, until it is idle."""
    clock = [2.0]
    monkeypatch.setattr(step_time.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: clock.__setitem__(0, 2.0 if clock[0] == 2.0 else 5.0))
    total, of_host = step_time.seconds(lambda: clock.__setitem__(0, 2.0 + host), "cuda")
    assert (total, of_host) == (3.0, host)


def test_a_table_shows_ratio_and_bandwidth_in_columns_of_model_and_dtype():
    record = {"model": "60m", "dtype": "bfloat16", "optimizer": "sinkgd", "ratio": 1.204, "of_copy_bandwidth": 0.316}
    assert step_time.table([record]) == "| | 60M bf16 |\n|---|---:|\n| sinkgd | 1.20x, 32 % |"


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--rounds", "1"], "--rounds=1: at least 2"), (["--train_step", "0"], "--train_step=0: expected a number")],
)
def test_bad_numbers_are_refused_in_one_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["step_time.py", *words])
    with pytest.raises(SystemExit):
        step_time.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_page_are_the_results(name):
    assert page_with(step_time.table(json.loads((RESULTS / name).read_text())["records"]))


@pytest.mark.parametrize("name", TABLES[:2])
def test_sinkgd_on_a_cpu_takes_at_most_twice_fused_adamw_in_the_results(name):
    records = [r for r in json.loads((RESULTS / name).read_text())["records"] if r["optimizer"] == "sinkgd"]
    assert {(r["model"], r["dtype"]) for r in records} == {
        (model, dtype) for model in ("60m", "130m") for dtype in ("float32", "bfloat16")
    }
    assert max(r["ratio"] for r in records) <= 2


def share_at(tokens, share, measured_tokens):
    """The share of a training step of other tokens: forward and backward grow with them, the optimizer's step not."""
    return share / (share + (1 - share) * tokens / measured_tokens)


def test_the_shares_that_the_pages_tell_are_the_results():
    results = json.loads((RESULTS / "step-time-share-cpu.json").read_text())
    large, small = results["setup"]["tokens_of_a_training_step"], 2048
    assert large == 131072
    told = {}
    for row in (BASELINE, "sinkgd", "swan"):
        measured = [r["share_of_training_step"] for r in results["records"] if r["optimizer"] == row]
        for tokens in (large, small):
            shares = [100 * share_at(tokens, share, large) for share in measured]
            told[row, tokens] = f"{min(shares):.2g} to {max(shares):.2g} %"
        assert page_with(f"| {row} | {told[row, large]} | {told[row, small]} |")
    limits = section("README.md", "Limits")
    swan = f"takes {told['swan', small]} of a training step of {small:,} tokens, and {told['swan', large]} of one of"
    assert f"{swan} {large:,}." in limits
    assert f"That of `sinkgd` takes {told['sinkgd', small]} and {told['sinkgd', large]}." in limits


def test_slow_rows_are_rows():
    assert set(SLOW) < set(step_time_rows.ROWS)

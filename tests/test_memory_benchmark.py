"""The benchmark of memory: what is committed keeps the promised ratios, and it runs."""

import json
import subprocess
import sys
from pathlib import Path

import memory
import memory_rows
import pytest

from hf_stateless.reports.predicted import command


BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"


def by_optimizer(file):
    return {record["optimizer"]: record for record in json.loads(file.read_text())["records"]}


def assert_gradients_are_released(records):
    """At most the largest gradient and what AdamW still needs; to a thousandth of a GiB, as it is written."""
    for row in ("sinkgd_layerwise", "sinkgd_layerwise, release=all"):
        kept = 0 if "all" in row else records[row]["gradients_of_adamw_gib"]
        assert records[row]["gradients_gib"] <= records[row]["largest_gradient_gib"] + kept + 1e-3
        assert records[row]["gradients_gib"] < records["sinkgd"]["gradients_gib"]


def test_the_committed_measurement_keeps_the_promised_ratios():
    records = by_optimizer(BENCHMARKS / "results" / "memory-cpu.json")
    assert records["AdamW (fused)"]["weights_gib"] == pytest.approx(200e6 * 4 / 2**30, rel=0.05)
    assert_gradients_are_released(records)
    for row in ("sinkgd_layerwise", "sinkgd_layerwise, release=all"):
        assert records[row]["ratio"] < 0.55
        assert records[row]["time_ratio"] < 1.05


@pytest.mark.parametrize(
    "row", ["AdamW (fused)", "swan", "swan_layerwise, release=all", "sinkgd_layerwise, int8, stateless"]
)
def test_predictions_are_those_of_the_command(row, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py", "--model", "llama-tiny", "--vocab_size", "512", "--predict"])
    args = memory.parse_args()
    args.dtype, args.length, args.checkpointing = "bfloat16", 64, True
    predicted = memory_rows.predicted_gib([row], memory.config_of(args), args)[row]
    config = memory.config_of(args)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    name, options = memory_rows.ROWS[row].optim, memory_rows.ROWS[row].options
    words = [
        "--optim",
        name,
        "--seq",
        "64",
        "--checkpointing",
        "--dtype",
        "int8" if "int8" in row else "bf16",
    ]
    words += ["--optim-args", ",".join(f"{key}={value}" for key, value in options.items())] if options else []
    assert command.main([str(tmp_path), "--json", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert predicted * 2**30 == pytest.approx(told["estimates"][0]["peak"], abs=1)


def test_a_run_that_is_stopped_keeps_what_was_measured_beside_its_prediction(monkeypatch, tmp_path):
    file = tmp_path / "memory.json"
    sizes = {"peak": 0.02, "libraries": 0.0}

    def measured(row, args):
        if row == "sinkgd":
            raise KeyboardInterrupt
        return sizes

    monkeypatch.setattr(memory, "measure_in_process", measured)
    words = ["--model", "llama-tiny", "--vocab_size", "512", "--length", "64", "--predict", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *words, "--rows", "swan", "sinkgd", "--output", str(file)])
    with pytest.raises(KeyboardInterrupt):
        memory.main()
    records = by_optimizer(file)
    assert list(records) == ["AdamW (fused)", "swan"]
    for record in records.values():
        assert 0.02 / (1 + record["over_predicted"]) == pytest.approx(record["predicted_gib"], abs=6e-4)


@pytest.mark.slow
def test_the_memory_benchmark_runs_and_finds_the_gradients_released(tmp_path):
    output = tmp_path / "memory.json"
    sizes = ["--model", "llama-20m", "--vocab_size", "8000", "--runs", "1", "--steps", "1", "--rounds", "2"]
    command = [sys.executable, str(BENCHMARKS / "memory.py"), *sizes, "--time", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_gradients_are_released(by_optimizer(output))
    assert "| sinkgd_layerwise |" in done.stdout

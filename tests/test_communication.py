"""The benchmark of communication counts what the formulas say, on a model small enough to do by hand."""

import json
import subprocess
import sys

import pytest
from documents import ROOT


RANKS, SIZE, INNER = 4, 512, 1376


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    output = tmp_path_factory.mktemp("communication") / "results.json"
    script = ROOT / "recipes" / "benchmarks" / "communication.py"
    words = ("--models", "60m", "--layers", "2", "--ranks", str(RANKS), "--output", str(output))
    done = subprocess.run(
        [sys.executable, str(script), *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("| sinkgd |") == 1
    return {record["step"]: record for record in json.loads(output.read_text())["records"]}


def test_sinkgd_sends_column_sums_and_a_flag_of_each_matrix(records):
    numbers = 2 * (4 * (SIZE + 1) + 2 * (SIZE + 1) + (INNER + 1))
    ring = 2 * (RANKS - 1) / RANKS
    assert records["sinkgd"]["collectives"] == 5
    assert records["sinkgd"]["mib_sent"] == pytest.approx(5 * ring * 4 * numbers / 2**20, abs=0.05)


def test_one_matrix_at_a_time_sends_the_same_bytes_in_more_collectives(records):
    assert records["sinkgd, one matrix at a time"]["collectives"] == 5 * 2 * 7
    assert records["sinkgd, one matrix at a time"]["mib_sent"] == records["sinkgd"]["mib_sent"]


def test_whole_matrices_are_what_fsdp_gathers_once(records):
    whole = records["whole matrices on every rank"]
    assert whole["collectives"] == 2 * 7
    assert whole["part_of_fsdp"] == pytest.approx(1 / 3, abs=1e-3)


def test_swan_sends_two_all_to_alls_per_shape_and_fewer_bytes_than_gathering(records):
    assert records["swan"]["collectives"] == 2 * 3
    assert records["swan"]["mib_sent"] < records["whole matrices on every rank"]["mib_sent"]

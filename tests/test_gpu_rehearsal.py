"""Every stage of the one command for a GPU with tiny sizes on CPU, as a person types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT
from gpu_report import TABLES, section
from gpu_stages import STAGES


pytest.importorskip("trl")
pytest.importorskip("peft")
# In the place of reasoning-gym, which need not be installed.
GYM = """
from dataclasses import dataclass

@dataclass
class Config:
    seed: int = 0
    size: int = 10

class Sums:
    def __init__(self, config):
        self.config = config
    def __len__(self):
        return self.config.size
    def __getitem__(self, i):
        return {"question": f"{i} + 1 =", "answer": str(i + 1), "metadata": {}}
    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])

DATASETS = {"chain_sum": (Sums, Config)}

def create_dataset(name, **options):
    return Sums(Config(**options))
"""


@pytest.mark.slow
def test_every_stage_is_rehearsed_on_cpu(tmp_path):
    for name in ("__init__", "factory"):
        (tmp_path / "gym" / "reasoning_gym").mkdir(parents=True, exist_ok=True)
        (tmp_path / "gym" / "reasoning_gym" / f"{name}.py").write_text(GYM)
    command = [sys.executable, str(ROOT / "recipes" / "benchmarks" / "gpu.py"), "--rehearse"]
    folders = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "gym"), "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([*command, *folders], env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout
    text = (tmp_path / "out" / "gpu.json").read_text()
    results = json.loads(text)
    assert {name: entry["status"] for name, entry in results["stages"].items()} == {s.name: "measured" for s in STAGES}
    for place in (tmp_path, ROOT, Path.home()):
        assert f"{place}/" not in text
    for stage in STAGES:
        for record in results["stages"][stage.name]["records"]:
            optional = {"failed", "milliseconds", "ratio"} if stage.kind in ("ranks", "whitening") else set()
            assert {key for _, key, _ in TABLES[stage.kind][1]} - optional <= record.keys()
    shown = section(results)
    assert all(f"| {stage.name} | not measured" not in shown for stage in STAGES)
    fine_tuned = [record for name in ("SFT", "GRPO") for record in results["stages"][name]["records"]]
    assert [record["card"] for record in fine_tuned] == [True, True]

"""The Trainer's `deepspeed=` on two CPU processes; runs where DeepSpeed is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_models import assert_close
from zero_worker import CASES, LOADED, save_model, train


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
KILLED = (2, 3)
WORKER = Path(__file__).with_name("zero_worker.py")


def launch(*words):
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(WORKER), *map(str, words)]
    return subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a model is, and what is left of runs of which a rank was killed in its fourth step."""
    folder = tmp_path_factory.mktemp("zero")
    save_model(folder / "model")
    for stage in KILLED:
        assert launch(folder, stage).returncode != 0
    return folder


@pytest.fixture(scope="module")
def results(folder):
    done = launch(folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_equals_one_process(case, results, tmp_path):
    optim, _, options = CASES[case]
    one = train(tmp_path, optim, batch_size=4, **options)
    for result in results:
        assert_close(result[case], one, 1e-5)


@pytest.mark.parametrize("case", LOADED)
def test_a_model_that_is_cut_while_it_is_loaded_equals_one_process(case, results, tmp_path):
    optim, options = LOADED[case]
    save_model(tmp_path / "model")
    one = train(tmp_path, optim, batch_size=4, loaded=tmp_path / "model", **options)
    for result in results:
        assert_close(result[case], one, 1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_of_deepspeed_equals_one_that_never_stopped(stage, results):
    for result in results:
        assert_close(result[f"resumed, stage {stage}"], result[f"saved, stage {stage}"], 0.0)
        assert_close(result[f"saved, stage {stage}"], results[0][f"sinkgd, stage {stage}"], 0.0)


@pytest.mark.parametrize("stage", KILLED)
def test_after_a_killed_rank_the_other_ends_and_the_last_whole_checkpoint_resumes(stage, folder, results):
    assert (folder / f"killed{stage}" / "out" / "checkpoint-3" / "trainer_state.json").is_file()
    for result in results:
        assert_close(result[f"after a death, stage {stage}"], results[0][f"sinkgd, stage {stage}"], 0.0)

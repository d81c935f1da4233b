"""The Trainer's `deepspeed=` on two CPU processes; runs where DeepSpeed is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_models import assert_close
from zero_worker import CASES, train


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
WORKER = Path(__file__).with_name("zero_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(WORKER), str(folder)]
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_equals_one_process(case, results, tmp_path):
    optim, _, options = CASES[case]
    one = train(tmp_path, optim, batch_size=4, **options)
    for result in results:
        assert_close(result[case], one, 1e-5)


def test_a_resumed_run_of_deepspeed_equals_one_that_never_stopped(results):
    for result in results:
        assert_close(result["resumed"], result["saved"], 0.0)
        assert_close(result["saved"], results[0]["sinkgd, stage 2"], 0.0)

"""Updates in backward in a Trainer that torchrun starts on two processes."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY_MODELS, VOCAB_SIZE
from distributed_models import WORLD, assert_close, weights_of
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments


pytestmark = pytest.mark.slow


SCRIPT = """
import gc, sys, torch
from test_layerwise_launched import train_by_trainer
gc.freeze()  # as in conftest.py
world = int(__import__("os").environ["WORLD_SIZE"])
assert world == 2, world
train_by_trainer(sys.argv[1])
"""
RUNS = {
    "layerwise": ("sinkgd_layerwise", {}),
    "plain": ("sinkgd", {}),
    "layerwise, accumulated": ("sinkgd_layerwise", {"gradient_accumulation_steps": 2}),
    "layerwise, all released": ("sinkgd_layerwise", {"optim_args": "release=all", "max_grad_norm": 0.0}),
    "plain, unclipped": ("sinkgd", {"max_grad_norm": 0.0}),
    "layerwise swan": ("swan_layerwise", {"optim_args": "lr_scale=0.2"}),
    "plain swan": ("swan", {"optim_args": "lr_scale=0.2"}),
}


def trainer_run(optim, folder, batch_size=2, **options):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCAB_SIZE, (64, 12), generator=generator).tolist()
    args = TrainingArguments(
        f"{folder}/out",
        optim=optim,
        max_steps=4,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    torch.manual_seed(0)
    trainer = Trainer(TINY_MODELS["llama"](), args, train_dataset=[{"input_ids": r, "labels": r} for r in rows])
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return trainer, {"norms": norms, "weights": weights_of(trainer.model)}


def train_by_trainer(folder):
    results = {}
    for case, (optim, options) in RUNS.items():
        trainer, results[case] = trainer_run(optim, folder, **options)
        assert trainer.accelerator.num_processes == dist.get_world_size() == WORLD
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    torch.save(results, Path(folder) / f"trainer-{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def trainer_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORLD)]
    command = [*launcher, "script.py", str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"trainer-{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_the_trainer_on_two_processes_keeps_replicas_equal_to_the_bit(trainer_results):
    assert_close(trainer_results[0], trainer_results[1])


@pytest.mark.parametrize(
    ("layerwise", "plain"),
    [
        ("layerwise", "plain"),
        ("layerwise, all released", "plain, unclipped"),
        ("layerwise swan", "plain swan"),
    ],
)
def test_the_trainer_on_two_processes_trains_as_the_plain_optimizer(layerwise, plain, trainer_results):
    assert_close(trainer_results[0][layerwise]["weights"], trainer_results[0][plain]["weights"], 5e-6)
    assert trainer_results[0][layerwise]["norms"] == pytest.approx(trainer_results[0][plain]["norms"], rel=1e-5)


@pytest.mark.parametrize(("case", "batch_size"), [("layerwise", 4), ("layerwise, accumulated", 8)])
def test_the_trainer_on_two_processes_equals_one_with_the_whole_batch(case, batch_size, trainer_results, tmp_path):
    _, expected = trainer_run("sinkgd", tmp_path, batch_size=batch_size)
    assert_close(copy.copy(trainer_results[0][case]["weights"]), expected["weights"], 1e-5)
    assert trainer_results[0][case]["norms"] == pytest.approx(expected["norms"], rel=1e-5)

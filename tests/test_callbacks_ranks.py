"""The memory report of several processes, of a GPU, and against the prediction of a real run."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from documents import ROOT
from measured_runs import MIB, new_trainer
from transformers import LlamaConfig, LlamaForCausalLM

import hf_stateless
from hf_stateless.reports.files import GIB
from hf_stateless.reports.measured.schema import MemoryReport


pytest_plugins = ["measured_runs"]
pytestmark = pytest.mark.usefixtures("without_picture")


@pytest.fixture(scope="module", params=["ddp.yaml", "fsdp2.yaml"])
def ranks(request, tmp_path_factory):
    """What both ranks of a distributed run counted themselves, and the report of the run."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    config = ROOT / "recipes" / "accelerate_configs" / request.param
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--mixed_precision", "no", "--num_processes", "2", "--main_process_port", port]
    command += [str(ROOT / "tests" / "memory_worker.py"), str(folder), "sinkgd"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    facts = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return request.param.removesuffix(".yaml").upper(), facts, MemoryReport.load(folder)


def test_the_report_of_two_ranks_is_of_the_one_with_the_higher_peak(ranks):
    strategy, facts, report = ranks
    assert (report.setup.world_size, report.setup.strategy) == (2, strategy)
    assert report.setup.model == "LlamaForCausalLM"
    assert bool(facts[0]["sharded"]) == (strategy == "FSDP2")
    # The last rank took 64 MiB more.
    assert report.measured.peak.max - report.measured.peak.min > 40 * MIB
    # FSDP2 fills smaller parts up, in memory, to the size of the others.
    assert facts[1]["weights"] <= report.counted.weights <= facts[0]["weights"]
    assert report.counted.optimizer_state == facts[1]["optimizer_state"]
    assert report.cost.tokens == 4 * 4 * 11  # of both ranks
    for rank in facts:
        with_loss = [entry for entry in rank["logs"] if "loss" in entry]
        assert len(with_loss) == 2
        assert with_loss[0]["memory/peak_gib"] == pytest.approx(report.measured.peak.max / GIB, rel=0.05)
    assert facts[0]["has_report"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optim", ["sinkgd", "adamw_torch_fused"])
def test_a_gpu_run_reports_what_its_allocator_says(optim, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8192))
    trainer = new_trainer(tmp_path, optim, model, use_cpu=False, max_steps=6)
    hf_stateless.attach_memory_report(trainer)
    trainer.train()
    report = MemoryReport.load(tmp_path)
    assert (report.measured.kind, report.measured.ooms, report.measured.retries) == ("CUDA allocator", 0, 0)
    assert report.setup.device_capacity == torch.cuda.get_device_properties(0).total_memory
    assert report.measured.reserved.max >= report.measured.peak.max >= torch.cuda.memory_allocated()
    held = sum(vars(report.counted).values())
    assert held <= report.measured.peak.max < 1.5 * held
    assert 0 < report.cost.optimizer_share < 1
    if optim == "adamw_torch_fused":
        assert report.predicted["adamw_torch_fused"].peak == pytest.approx(report.measured.peak.max, rel=0.1)


PREDICTED_AGAINST_REAL = """
import sys, torch, hf_stateless
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
optim, folder = sys.argv[1:]
sizes = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 4, "num_attention_heads": 8}
model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=4000))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 4000, (8, 64)).tolist()]
args = TrainingArguments(
    folder, optim=optim, use_cpu=True, report_to=[], max_steps=3, per_device_train_batch_size=2, save_strategy="no"
)
trainer = Trainer(model, args, train_dataset=rows)
hf_stateless.attach_memory_report(trainer)
trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["sinkgd", "sinkgd_layerwise", "adamw_torch_fused"])
def test_the_predicted_peak_of_adamw_is_within_a_tenth_of_a_real_run(optim, tmp_path):
    """Each in a process of its own: what the first leaves behind would count for the second."""
    for name in {optim, "adamw_torch_fused"}:
        command = [sys.executable, "-c", PREDICTED_AGAINST_REAL, name, str(tmp_path / name)]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}  # freed blocks go back
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300, capture_output=True)
    predicted = MemoryReport.load(tmp_path / optim).predicted["adamw_torch_fused"]
    measured = MemoryReport.load(tmp_path / "adamw_torch_fused").measured
    assert predicted.peak == pytest.approx(measured.peak.max, rel=0.1)

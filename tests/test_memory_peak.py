"""The peak that is predicted from a config is the one that training the model takes."""

import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY_MODELS, tiny_inputs
from memory_models import DTYPES, SMALL, measured_peak, meta_model, real_model, small_llama
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_stateless
from hf_stateless.reports.predicted import (
    Settings,
    build_model,
    estimate,
)
from hf_stateless.reports.predicted.model import checkpoint_activations
from hf_stateless.reports.predicted.state import RULES


PLAIN = ["sinkgd", "swan", "adamw_torch", "adamw_torch_fused"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optim", [*PLAIN, "sinkgd_layerwise", "swan_layerwise"])
@pytest.mark.parametrize("model", SMALL)
def test_the_predicted_peak_is_what_is_alive_in_a_real_step(model, optim, dtype, checkpointing):
    settings = Settings(dtype=dtype, batch=2, seq=64, checkpointing=checkpointing, device="cpu")
    real = real_model(model, dtype).train()
    if checkpointing:
        checkpoint_activations(real)
    tokens = torch.randint(3, 300, (2, 64))
    measured = measured_peak(real, {"input_ids": tokens, "labels": tokens}, optim)
    predicted = estimate(meta_model(model, settings), [optim], settings)[0].peak
    # In backward a CPU keeps the buffers of the largest update, which count for much in a model of this size.
    assert predicted == pytest.approx(measured, rel=0.1 if optim.endswith("layerwise") else 0.03)


@pytest.mark.parametrize("optim", ["sinkgd", "swan", "sinkgd_layerwise"])
def test_the_predicted_peak_holds_with_momentum(optim):
    settings, options = Settings(dtype="bf16", batch=2, seq=64, device="cpu"), {"momentum": 0.9}
    tokens = torch.randint(3, 300, (2, 64))
    inputs = {"input_ids": tokens, "labels": tokens}
    measured = measured_peak(real_model("small_llama", "bf16").train(), inputs, optim, **options)
    predicted = estimate(meta_model("small_llama", settings), [optim], settings, options)[0].peak
    assert predicted == pytest.approx(measured, rel=0.1 if optim.endswith("layerwise") else 0.03)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_the_predicted_peak_holds_for_other_kinds_of_models(model):
    settings = Settings(dtype="fp32", batch=2, seq=8, device="cpu")
    measured = measured_peak(real_model(model).train(), tiny_inputs(model), "sinkgd")
    predicted = estimate(meta_model(model, settings), ["sinkgd"], settings)[0].peak
    assert predicted == pytest.approx(measured, rel=0.1)


# PEFT asks transformers for an attribute that it has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_predicted_peak_holds_for_lora(checkpointing):
    peft = pytest.importorskip("peft")
    settings = Settings(dtype="fp32", batch=2, seq=64, lora=4, checkpointing=checkpointing, device="cpu")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    real = peft.get_peft_model(real_model("small_llama"), config).train()
    if checkpointing:
        checkpoint_activations(real.get_base_model())
    tokens = torch.randint(3, 300, (2, 64))
    measured = measured_peak(real, {"input_ids": tokens, "labels": tokens}, "sinkgd")
    row = estimate(meta_model("small_llama", settings), ["sinkgd"], settings)[0]
    assert row.peak == pytest.approx(measured, rel=0.03)
    assert row.gradients == sum(p.nbytes for p in real.parameters() if p.requires_grad)


RESIDENT_SET = """
import json, resource, sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
import hf_stateless

def train(batch, seq, **sizes):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=dtype).train()
    model.config.use_cache = False
    if optim.startswith("adamw"):
        optimizer = torch.optim.AdamW(model.parameters(), fused=optim == "adamw_torch_fused")
    else:
        optimizer = hf_stateless.create_optimizer(model, optim, lr=1e-3)
    tokens = torch.randint(0, sizes["vocab_size"], (batch, seq))
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

optim, dtype, run = sys.argv[1], getattr(torch, sys.argv[2]), json.loads(sys.argv[3])
tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
train(1, 8, vocab_size=100, **tiny)
with open("/proc/self/statm") as statm:
    before = int(statm.read().split()[1]) * resource.getpagesize()
train(**run)
# Not `ru_maxrss`, which begins with what the parent process held when it forked.
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(peak * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the resident set from /proc")
@pytest.mark.parametrize("optim", PLAIN)
@pytest.mark.parametrize(
    ("sizes", "batch", "dtype"),
    [
        pytest.param((384, 1024, 6, 16000), 2, "fp32", id="23M-fp32"),
        pytest.param((768, 2048, 8, 32000), 1, "bf16", id="106M-bf16"),
    ],
)
def test_the_predicted_peak_is_within_a_tenth_of_the_resident_set(sizes, batch, optim, dtype):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    config = {**dict(zip(names, sizes, strict=True)), "num_attention_heads": sizes[0] // 64}
    settings = Settings(dtype=dtype, batch=batch, seq=256, device="cpu")
    predicted = estimate(build_model(LlamaConfig(**config), settings), [optim], settings)[0].peak
    arguments = [optim, str(DTYPES[dtype]).removeprefix("torch."), json.dumps({**config, "batch": batch, "seq": 256})]
    # Freed tensors go back to the system at once, so that the resident set is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RESIDENT_SET, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert predicted == pytest.approx(int(done.stdout.split()[-1]), rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optim", PLAIN)
def test_the_predicted_peak_is_within_a_tenth_of_the_allocated_memory(optim):
    config = small_llama(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16)
    settings = Settings(batch=2, seq=1024)
    predicted = estimate(build_model(config, settings), [optim], settings)[0].peak
    gc.collect()  # models of other tests
    before = torch.cuda.memory_allocated()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().train()
    model.config.use_cache = False
    fused = optim == "adamw_torch_fused" or None  # None: torch takes foreach on a GPU
    make = torch.optim.AdamW(model.parameters(), fused=fused) if optim in RULES else None
    optimizer = make or hf_stateless.create_optimizer(model, optim, lr=1e-3)
    tokens = torch.randint(3, 300, (2, 1024), device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)

"""Models and loops that tests of updates in backward share."""

import pytest
import torch
from conftest import TINY_MODELS, VOCAB_SIZE, tiny_inputs
from peft import LoraConfig, get_peft_model
from transformers.optimization import get_cosine_schedule_with_warmup

from hf_stateless import PRESETS, create_optimizer


RELEASE = ("matrices", "all")
each_name = pytest.mark.parametrize("name", PRESETS)
each_release = pytest.mark.parametrize("release", RELEASE)


def lora():
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(TINY_MODELS["llama"](), config)


MODELS = {key: TINY_MODELS[key] for key in ("llama", "llama_tied", "gpt2", "qwen3_moe", "t5")} | {"lora": lora}


def make(key, dtype=torch.float32):
    torch.manual_seed(0)
    return MODELS[key]().to(dtype)


def batch_for(key, seed=0, batch_size=2):
    inputs = tiny_inputs("t5" if key == "t5" else "llama", batch_size=batch_size)
    tokens = torch.randint(3, VOCAB_SIZE, (batch_size, 8), generator=torch.Generator().manual_seed(seed))
    return {name: tokens.clone() for name in inputs}


def loss_of(model, key="llama", seed=0):
    return model(**batch_for(key, seed)).loss


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(actual, expected, rtol=0.0, atol=0.0):
    torch.testing.assert_close(weights_of(actual), weights_of(expected), rtol=rtol, atol=atol)


def take_steps(model, optimizer, steps=3, key="llama", forward=loss_of):
    """Train under warm-up and cosine; the loop is the same for every optimizer."""
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, steps + 1)
    for step in range(steps):
        forward(model, key, step).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def both(name, key="llama", *, prepare=lambda model: model, release="matrices", dtype=torch.float32, **run):
    """Return the model trained with and without `_layerwise`, prepared alike."""
    trained = []
    for suffix, options in (("_layerwise", {"release": release}), ("", {})):
        model = make(key, dtype)
        prepare(model)
        optimizer = create_optimizer(model, name + suffix, lr=1e-2, weight_decay=0.1, **options)
        trained.append(take_steps(model, optimizer, key=key, **run))
    return trained

"""Updates in backward: the norm that clipping and the log see, and accelerate without the Trainer."""

import copy

import pytest
import torch
from accelerate import Accelerator
from layerwise_runs import assert_same, each_release, loss_of, make

from hf_stateless import create_optimizer


# transformers renames gradient checkpointing to activation checkpointing; both names work, and PEFT uses the old one.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")


# ---- Clipping


@each_release
def test_the_norm_of_released_gradients_is_that_of_the_gradients(release):
    model, plain = make("llama"), make("llama")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2, release=release)
    loss_of(model).backward()
    loss_of(plain).backward()
    groups = create_optimizer(plain, "sinkgd", lr=1e-2).param_groups
    released = [p for g in groups if release == "all" or g["algorithm"] == "multinorm" for p in g["params"]]
    expected = torch.nn.utils.get_total_norm([p.grad for p in released])
    torch.testing.assert_close(optimizer.released_norm(), expected, rtol=1e-6, atol=0)
    optimizer.step()
    assert optimizer.released_norm() is None


def test_accelerate_clips_by_the_norm_of_all_gradients():
    accelerator = Accelerator(cpu=True)
    norms, trained = [], []
    for name in ("sinkgd_layerwise", "sinkgd"):
        model = make("llama")
        optimizer = create_optimizer(model, name, lr=1e-2, adamw_eps=1e-2)
        loss_of(model).backward()
        norms.append(accelerator.clip_grad_norm_(model.parameters(), 1e-2))
        optimizer.step()
        trained.append(model)
    assert norms[1] > 0.1
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)
    # Clipping rounds the plain optimizer's gradients of the matrices once more.
    assert_same(*trained, rtol=1e-6, atol=1e-7)


def test_a_norm_other_than_the_2_norm_is_refused_with_the_fix():
    accelerator, model = Accelerator(cpu=True), make("llama")
    create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    loss_of(model).backward()
    with pytest.raises(ValueError, match=r"norm_type=inf.*leave norm_type out"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0, norm_type=float("inf"))
    optimizer.step()


def test_clipping_of_other_models_is_untouched():
    accelerator, model, other = Accelerator(cpu=True), make("llama"), make("gpt2")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    loss_of(model).backward()
    loss_of(other).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
    assert accelerator.clip_grad_norm_(other.parameters(), 1e9) == expected
    optimizer.step()


# ---- accelerate without the Trainer


@each_release
def test_accumulation_of_accelerate_ends_in_one_update(release):
    """Whoever clips at each micro-batch, as many loops do, releases nothing early."""
    trained = []
    for name, options in (("sinkgd_layerwise", {"release": release}), ("sinkgd", {})):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        model = make("llama")
        optimizer = create_optimizer(model, name, lr=1e-2, **options)
        model, optimizer = accelerator.prepare(model, optimizer)
        for micro_batch in range(8):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, seed=micro_batch))
                accelerator.clip_grad_norm_(model.parameters(), 1e9)
                optimizer.step()
                optimizer.zero_grad()
        trained.append(model)
    assert_same(*trained)


def test_fp16_of_accelerate_is_refused_with_the_fix(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr("hf_stateless.optimizer.release.AcceleratorState", lambda: accelerator_with_fp16(accelerator))
    with pytest.raises(ValueError, match=r"fp16 scales the loss.*mixed_precision='bf16'"):
        create_optimizer(make("llama"), "sinkgd_layerwise", lr=1e-2)


def accelerator_with_fp16(accelerator):
    state = copy.copy(accelerator.state)
    state.__dict__ = {**accelerator.state.__dict__, "_mixed_precision": "fp16"}
    return state


def test_large_matrices_in_parts_have_the_same_norm(monkeypatch):
    def trained(name):
        model = make("llama", torch.bfloat16)
        optimizer = create_optimizer(model, name, lr=1e-2, embeddings="stateless")
        loss_of(model).backward()
        norm = optimizer.released_norm() if "layerwise" in name else None
        optimizer.step()
        return model, norm

    whole = trained("sinkgd_layerwise")[1]
    monkeypatch.setattr("hf_stateless.optimizer.release._PART", 100)
    in_parts, norm = trained("sinkgd_layerwise")
    torch.testing.assert_close(norm, whole, rtol=1e-6, atol=0)
    assert_same(in_parts, trained("sinkgd")[0])

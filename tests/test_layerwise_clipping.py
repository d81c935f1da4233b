"""Updates in backward: the norm that clipping and the log see, and accelerate without the Trainer."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from layerwise_runs import assert_same, each_release, loss_of, make
from torch.nn.utils import clip_grad_norm_ as imported_before

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


CLIPS = {
    "accelerate": lambda *args, **more: Accelerator(cpu=True).clip_grad_norm_(*args, **more),
    "torch": lambda *args, **more: torch.nn.utils.clip_grad_norm_(*args, **more),
    "torch, imported before": imported_before,
}
each_clip = pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)


@each_clip
@pytest.mark.parametrize("max_norm", [1e-2, 1e9, math.inf])
def test_every_way_to_clip_counts_the_gradients_that_are_freed(clip, max_norm):
    norms, trained = [], []
    for name in ("sinkgd_layerwise", "sinkgd"):
        model = make("llama")
        optimizer = create_optimizer(model, name, lr=1e-2, adamw_eps=1e-2)
        for seed in range(2):
            loss_of(model, seed=seed).backward()
            norms.append(clip((p for p in model.parameters()), max_norm))
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model)
    assert norms[2] > 0.1
    torch.testing.assert_close(norms[:2], norms[2:], rtol=1e-6, atol=0)
    assert_same(*trained, rtol=1e-6, atol=1e-7)


@each_clip
def test_the_norm_is_whole_where_no_gradient_is_left(clip):
    model, plain = make("llama"), make("llama")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2, release="all")
    loss_of(model).backward()
    loss_of(plain).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    torch.testing.assert_close(clip(model.parameters(), 1.0), expected, rtol=1e-6, atol=0)
    optimizer.step()


@each_clip
@pytest.mark.parametrize("norm_type", [1, 3.0, float("inf")])
def test_a_norm_other_than_the_2_norm_is_refused_with_the_fix(clip, norm_type):
    model = make("llama")
    create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    loss_of(model).backward()
    with pytest.raises(ValueError, match=r"only the 2-norm is known; leave norm_type out"):
        clip(model.parameters(), 1.0, norm_type=norm_type)
    optimizer.step()


@pytest.mark.parametrize("place", [Accelerator(cpu=True), torch.nn.utils], ids=["accelerate", "torch"])
def test_clipping_by_value_says_once_what_it_does_not_see(place, caplog, monkeypatch):
    monkeypatch.setattr("hf_stateless.trainer.clipping._SAID", set())
    plain, model = make("llama"), make("llama")
    for each, name in ((plain, "sinkgd"), (model, "sinkgd_layerwise")):
        optimizer = create_optimizer(each, name, lr=1e-2)
        for _ in range(2):
            loss_of(each).backward()
            place.clip_grad_value_(each.parameters(), 1e-3)
            assert max(p.grad.abs().max() for p in each.parameters() if p.grad is not None) <= 1e-3
            optimizer.step()
        assert sum("clip_grad_value_ sees only" in r.message for r in caplog.records) == (each is model)


def test_clipping_of_other_models_is_untouched():
    accelerator, model, other = Accelerator(cpu=True), make("llama"), make("gpt2")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    loss_of(model).backward()
    loss_of(other).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
    assert accelerator.clip_grad_norm_(other.parameters(), 1e9) == expected
    assert torch.nn.utils.clip_grad_norm_(other.parameters(), 1e9, 1.0) > expected
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

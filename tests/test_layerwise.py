"""Updates in backward: equal to those in `step()`, with the gradients really gone, or refused with the fix."""

import contextlib
import copy
import gc
import io

import pytest
import torch
from layerwise_runs import MODELS, assert_same, both, each_name, each_release, loss_of, make, take_steps, weights_of
from live_gradients import LiveGradients, gradient_bytes

from hf_stateless import create_optimizer
from hf_stateless.optimizer.release import Release


# transformers renames gradient checkpointing to activation checkpointing; both names work, and PEFT uses the old one.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")


# ---- The same update


@each_name
@each_release
@pytest.mark.parametrize("key", MODELS)
def test_steps_are_those_of_the_plain_optimizer_to_the_bit(name, key, release):
    layerwise, plain = both(name, key, release=release)
    assert_same(layerwise, plain)
    assert any((value != weights_of(make(key))[n]).any() for n, value in weights_of(plain).items())


@each_name
def test_bf16_steps_draw_the_rounding_noise_of_the_plain_optimizer(name):
    assert_same(*both(name, dtype=torch.bfloat16))


@pytest.mark.parametrize("embeddings", ["adamw_8bit", "stateless", "sinkhorn_momentum", "row_moment", "factored"])
def test_embeddings_of_every_kind_are_updated_in_backward_to_the_bit(embeddings):
    trained = []
    for name, options in (("sinkgd", {}), ("sinkgd_layerwise", {"release": "all"})):
        model = make("llama")
        trained.append(take_steps(model, create_optimizer(model, name, lr=1e-2, embeddings=embeddings, **options)))
        assert options == {} or all(p.grad is None for p in model.parameters())
    assert_same(*trained)


def test_a_closure_may_run_the_backward_pass():
    model, plain = make("llama"), make("llama")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)

    def closure():
        loss = loss_of(model)
        loss.backward()
        return loss

    assert optimizer.step(closure) == loss_of(plain)
    take_steps(plain, create_optimizer(plain, "sinkgd", lr=1e-2), steps=0)
    loss_of(plain).backward()
    create_optimizer(plain, "sinkgd", lr=1e-2).step()
    assert_same(model, plain)


# ---- Memory


@each_name
@pytest.mark.parametrize("key", MODELS)
def test_one_gradient_of_a_matrix_is_alive_at_a_time(name, key):
    model = make(key)
    live = LiveGradients(model)
    optimizer = create_optimizer(model, f"{name}_layerwise", lr=1e-2)
    take_steps(model, optimizer, key=key)
    sizes = gradient_bytes(optimizer)
    assert 0 < live.peak <= sizes["largest"] + sizes["adamw"]


@pytest.mark.parametrize("embeddings", ["adamw", "stateless"])
@pytest.mark.parametrize("key", ["llama", "llama_tied", "gpt2", "lora"])
def test_no_gradient_is_alive_after_backward_when_all_are_released(key, embeddings):
    model = make(key)
    live = LiveGradients(model)
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2, release="all", embeddings=embeddings)
    loss_of(model, key).backward()
    assert live.now() == 0
    assert all(p.grad is None for p in model.parameters())
    largest = max(p.numel() * p.element_size() for g in optimizer.param_groups for p in g["params"])
    assert 0 < live.peak <= largest


def test_the_plain_optimizer_holds_every_gradient():
    """The measuring is sound: without hooks it finds all of them."""
    model = make("llama")
    live = LiveGradients(model)
    take_steps(model, create_optimizer(model, "sinkgd", lr=1e-2), steps=1)
    assert live.peak == sum(p.numel() * p.element_size() for p in model.parameters())


def test_a_step_after_held_passes_alone_updates_everything():
    model, plain = make("llama"), make("llama")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    with optimizer.hold():
        loss_of(model).backward()
    optimizer.step()
    loss_of(plain).backward()
    create_optimizer(plain, "sinkgd", lr=1e-2).step()
    assert_same(model, plain)


@pytest.mark.parametrize("context", [contextlib.nullcontext, "hold"])
def test_a_second_backward_pass_is_refused_with_the_fix(context):
    model = make("llama")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"second gradient .*optimizer\.hold\(\)"):  # noqa: SIM117
        with optimizer.hold() if context == "hold" else context():
            loss_of(model).backward()


def test_a_gradient_that_is_not_finite_leaves_its_matrix_alone_and_is_named(caplog):
    model, plain = make("llama"), make("llama")
    for each, name in ((model, "sinkgd_layerwise"), (plain, "sinkgd")):
        weight = each.model.layers[0].mlp.up_proj.weight
        weight.register_hook(lambda grad: grad * float("nan"))
        optimizer = create_optimizer(each, name, lr=1e-2)
        loss_of(each).backward()
        optimizer.step()
    assert_same(model, plain)
    assert sum("layers.0.mlp.up_proj.weight" in record.message for record in caplog.records) == 2


# ---- Several optimizers on one model


@pytest.mark.parametrize("successor", ["sinkgd", "sinkgd_layerwise"])
def test_the_latest_optimizer_has_the_model_to_itself(successor):
    """A notebook cell that is run again: the hooks of the first optimizer must not update, nor free, anything."""
    model, plain = make("llama"), make("llama")
    before = take_steps(model, create_optimizer(model, "sinkgd_layerwise", lr=1e-2), steps=1)
    plain.load_state_dict(before.state_dict())
    first = create_optimizer(model, "sinkgd_layerwise", lr=1.0)
    take_steps(model, create_optimizer(model, successor, lr=1e-2))
    take_steps(plain, create_optimizer(plain, "sinkgd", lr=1e-2))
    assert_same(model, plain)
    assert not first.release.hooked & {id(p) for p in model.parameters()}


def test_an_optimizer_that_was_thrown_away_is_freed_and_updates_nothing():
    model = make("llama")
    create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    gc.collect()
    before = weights_of(model)
    loss_of(model).backward()
    torch.testing.assert_close(weights_of(model), before, rtol=0, atol=0)
    assert all(p.grad is not None for p in model.parameters())
    assert not [each for each in gc.get_objects() if type(each) is Release and each.hooked & ids_of(model)]


def ids_of(model):
    return {id(p) for p in model.parameters()}


def test_a_hooked_model_can_be_copied_and_saved():
    model = make("llama")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    twin = copy.deepcopy(model)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False), model)
    loss_of(twin).backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert optimizer.release.released_norm() is None

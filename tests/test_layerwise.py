"""Updates in backward: equal to those in `step()`, with the gradients really gone, or refused with the fix."""

import contextlib
import copy
import gc
import io
import json
import logging
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_MODELS, VOCAB_SIZE, tiny_inputs
from live_gradients import LiveGradients, gradient_bytes
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import get_cosine_schedule_with_warmup

from hf_stateless import PRESETS, StatelessOptimizer, create_optimizer, multi_normalize
from hf_stateless.optimizer.release import LayerwiseUpdates
from hf_stateless.trainer.handler import handle


# transformers renames gradient checkpointing to activation checkpointing; both names work, and PEFT uses the old one.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")

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


@pytest.mark.parametrize("embeddings", ["adamw_8bit", "stateless", "sinkhorn_momentum"])
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


# ---- Backward passes of every kind


class Blocks(nn.Module):
    """Linear blocks, checkpointed if asked for, the first of them used twice if it is shared."""

    def __init__(self, use_reentrant=None, shared=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB_SIZE, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.use_reentrant, self.shared = use_reentrant, shared

    def forward(self, input_ids, labels=None):
        hidden = self.embed(input_ids)
        for block in [*self.blocks, *([self.blocks[0]] if self.shared else [])]:
            run = block if self.use_reentrant is None else self.checkpointed(block)
            hidden = torch.tanh(run(hidden))
        return hidden.square().mean()

    def checkpointed(self, block):
        return lambda hidden: checkpoint(block, hidden, use_reentrant=self.use_reentrant)


def blocks_trained(name, steps=3, **options):
    model = Blocks(**options)
    optimizer = create_optimizer(model, name, lr=1e-2)
    for step in range(steps):
        model(**batch_for("llama", step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks_are_updated_as_without_hooks(use_reentrant):
    plain = blocks_trained("sinkgd", use_reentrant=use_reentrant)
    assert_same(blocks_trained("sinkgd_layerwise", use_reentrant=use_reentrant), plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("key", ["llama", "gpt2", "qwen3_moe"])
def test_transformers_gradient_checkpointing_changes_nothing(key, use_reentrant):
    def prepare(model):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    assert_same(*both("sinkgd", key, prepare=prepare))


@pytest.mark.parametrize("use_reentrant", [None, False])
def test_a_module_that_is_used_twice_is_updated_once_with_the_sum(use_reentrant):
    plain = blocks_trained("sinkgd", use_reentrant=use_reentrant, shared=True)
    assert_same(blocks_trained("sinkgd_layerwise", use_reentrant=use_reentrant, shared=True), plain)


def test_a_shared_module_under_reentrant_checkpointing_is_refused_with_the_fix():
    with pytest.raises(RuntimeError, match=r"blocks\.0\.weight got a second gradient .*use_reentrant=False"):
        blocks_trained("sinkgd_layerwise", use_reentrant=True, shared=True)


def test_two_modules_that_share_a_weight_are_updated_once():
    def prepare(model):
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight

    assert_same(*both("sinkgd", prepare=prepare))


def offloaded(model, key, seed):
    with torch.autograd.graph.save_on_cpu():
        return loss_of(model, key, seed)


def autocast(model, key, seed):
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of(model, key, seed)


def partly_used(model, key, seed):
    """Leave the last layer out of every second step."""
    return loss_of(model, key, seed) if seed % 2 else model.model.embed_tokens.weight.square().mean()


@pytest.mark.parametrize("forward", [offloaded, autocast, partly_used])
@each_release
def test_forward_passes_of_every_kind_give_the_steps_of_the_plain_optimizer(forward, release):
    assert_same(*both("sinkgd", forward=forward, release=release))


def compiled(model, key, seed):
    """The loss of a compiled model, which is not a graph of single operations."""
    loss = loss_of(model, key, seed)
    assert "Compiled" in type(loss.grad_fn).__name__
    return loss


@each_name
def test_a_compiled_model_takes_the_steps_of_the_plain_optimizer(name):
    assert_same(*both(name, prepare=lambda model: model.compile(backend="aot_eager"), forward=compiled))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(8))

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64, bias=False)

    def forward(self, hidden):
        return torch.tanh(self.linear(hidden))


def bytes_of_backward(pieces):
    """The most that a backward pass has allocated at a time, in gradients of one layer."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Deep()
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    for module in pieces(model):
        module.compile(backend="aot_eager")
    for _ in range(2):
        loss = model(torch.randn(2, 64)).sum()
        with torch.profiler.profile(profile_memory=True) as profile:
            loss.backward()
        optimizer.step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(sizes)) / (64 * 64 * 4)


def test_compiling_layer_by_layer_keeps_the_memory_and_in_one_piece_loses_it():
    """A compiled graph hands over all its gradients at its end."""
    assert bytes_of_backward(lambda model: []) < 4
    assert bytes_of_backward(lambda model: model.layers) < 4
    assert bytes_of_backward(lambda model: [model]) > 8


@pytest.mark.slow
def test_a_model_compiled_by_inductor_takes_the_steps_of_the_plain_optimizer():
    assert_same(*both("sinkgd", prepare=lambda model: model.compile(), forward=compiled), rtol=1e-5, atol=1e-6)


@each_release
def test_held_backward_passes_are_summed_into_one_update(release):
    model, plain = make("llama"), make("llama")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2, release=release)
    reference = create_optimizer(plain, "sinkgd", lr=1e-2)
    for step in range(3):
        with optimizer.hold(), optimizer.hold():
            loss_of(model, seed=2 * step).backward()
            assert all(p.grad is not None for p in model.parameters())
        loss_of(model, seed=2 * step + 1).backward()
        loss_of(plain, seed=2 * step).backward()
        loss_of(plain, seed=2 * step + 1).backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    assert_same(model, plain)


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
    assert not first.layerwise.hooks_any({id(p) for p in model.parameters()})


def test_an_optimizer_that_was_thrown_away_is_freed_and_updates_nothing():
    model = make("llama")
    create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    gc.collect()
    before = weights_of(model)
    loss_of(model).backward()
    torch.testing.assert_close(weights_of(model), before, rtol=0, atol=0)
    assert all(p.grad is not None for p in model.parameters())
    assert not [each for each in gc.get_objects() if type(each) is LayerwiseUpdates and each.hooks_any(ids_of(model))]


def ids_of(model):
    return {id(p) for p in model.parameters()}


def test_a_foreign_optimizer_beside_a_live_one_is_refused_with_the_fix():
    model = make("llama")
    ours = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    foreign = torch.optim.SGD(model.parameters(), lr=1e-2)
    loss_of(model).backward()
    foreign.step()
    foreign.zero_grad()
    with pytest.raises(RuntimeError, match=r"old_optimizer\.layerwise\.remove\(\)"):
        loss_of(model).backward()
    ours.layerwise.remove()
    foreign.zero_grad()
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_hooked_model_can_be_copied_and_saved():
    model = make("llama")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    twin = copy.deepcopy(model)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False), model)
    loss_of(twin).backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert optimizer.layerwise.released_norm() is None


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


# ---- The Trainer


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCAB_SIZE, (64, 12), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


@pytest.fixture
def run(tmp_path, rows):
    """`run("sinkgd_layerwise", max_steps=4)`: a Trainer after training a tiny Llama."""

    def run(optim, key="llama", resume=None, callbacks=(), watch=None, dtype=torch.float32, **options):
        defaults = {
            "output_dir": str(tmp_path / optim),
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        args = TrainingArguments(optim=optim, **{**defaults, **options})
        model = make(key, dtype)
        if watch:
            watch(model)
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Updates(TrainerCallback):
    """Observes each step from outside: the weights before and after it, and the gradients between."""

    def __init__(self):
        self.grads, self.steps = {}, []

    def watch(self, model):
        self.model = model
        for name, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, name=name: self.grads.update({name: p.grad.clone()}))

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = weights_of(self.model)

    def on_step_end(self, args, state, control, **kwargs):
        moved = {name: value - self.before[name] for name, value in weights_of(self.model).items()}
        self.steps.append((moved, dict(self.grads)))


@each_name
@each_release
def test_the_rate_of_every_matrix_is_the_logged_one_at_every_step(name, release, run):
    updates = Updates()
    options = {"optim_args": f"release={release}", "max_grad_norm": 0.0 if release == "all" else 1.0}
    trainer = run(f"{name}_layerwise", callbacks=[updates], watch=updates.watch, weight_decay=0.0, **options)
    rates, preset = logged(trainer, "learning_rate"), PRESETS[name]
    assert len(rates) == len(updates.steps) == 6
    assert len(set(rates)) > 4
    group = trainer.optimizer.param_groups[0]
    assert group["algorithm"] == "multinorm"
    for (moved, grads), rate in zip(updates.steps, rates, strict=True):
        for parameter in group["param_names"]:
            x = multi_normalize(grads[parameter], preset.norms, preset.num_iterations)
            observed = -(moved[parameter] * x).sum() / x.square().sum() / group["lr_scale"]
            # A weight of size 0.1 holds a step of 1e-3 to five digits.
            assert observed.item() == pytest.approx(rate, rel=1e-3, abs=1e-8), parameter


def test_the_rate_of_the_adamw_part_is_the_logged_one_when_it_is_updated_in_backward(run):
    updates = Updates()
    options = {"optim_args": "release=all,adamw_beta1=0,adamw_beta2=0", "max_grad_norm": 0.0}
    trainer = run("sinkgd_layerwise", callbacks=[updates], watch=updates.watch, weight_decay=0.0, **options)
    for (moved, grads), rate in zip(updates.steps, logged(trainer, "learning_rate"), strict=True):
        grad = grads["lm_head.weight"]
        large = grad.abs() > 1e-5  # without momentum a step is the sign of the gradient, but for epsilon
        observed = -moved["lm_head.weight"][large] * grad[large].sign()
        torch.testing.assert_close(observed, torch.full_like(observed, rate), rtol=2e-3, atol=1e-8)


@each_name
def test_a_whole_run_equals_that_of_the_plain_optimizer(name, run):
    layerwise = run(f"{name}_layerwise", max_grad_norm=0.0)
    plain = run(name, max_grad_norm=0.0)
    assert_same(layerwise.model, plain.model)
    assert logged(layerwise, "loss") == logged(plain, "loss")


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0, 1e-2])
def test_the_logged_norm_and_the_clipped_part_agree_with_the_plain_run(max_grad_norm, run):
    options = {"max_grad_norm": max_grad_norm, "optim_args": "adamw_eps=1e-2"}
    layerwise, plain = run("sinkgd_layerwise", **options), run("sinkgd", **options)
    norms = logged(layerwise, "grad_norm")
    assert len(norms) == 6
    assert min(norms) > 0.1
    assert norms == pytest.approx(logged(plain, "grad_norm"), rel=2e-5)
    assert_same(layerwise.model, plain.model, rtol=1e-5, atol=1e-6)


def test_clipping_still_reaches_the_adamw_part(run):
    runs = [run("sinkgd_layerwise", max_grad_norm=norm, optim_args="adamw_eps=1e-2") for norm in (0.0, 1e-2)]
    heads = [trainer.model.lm_head.weight for trainer in runs]
    assert (heads[0] - heads[1]).abs().max() > 1e-4


def test_the_logged_norm_counts_gradients_that_were_all_released(run):
    layerwise = run("sinkgd_layerwise", max_grad_norm=0.0, optim_args="release=all")
    plain = run("sinkgd", max_grad_norm=0.0)
    assert logged(layerwise, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-5)


def test_accumulation_is_exact_and_says_what_it_costs(run, caplog):
    with caplog.at_level(logging.WARNING, "hf_stateless"):
        many = run("sinkgd_layerwise", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert sum("gradient_accumulation_steps=8: the gradients of all" in r.message for r in caplog.records) == 1
    caplog.clear()
    one = run("sinkgd_layerwise", per_device_train_batch_size=8)
    assert not [r for r in caplog.records if "gradient_accumulation_steps" in r.message]
    plain = run("sinkgd", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    # The same samples in another order of summation: rounding of 1e-7 of a gradient, after six steps of up to 1e-2.
    assert_same(many.model, one.model, rtol=1e-4, atol=1e-5)
    assert_same(many.model, plain.model, rtol=1e-5, atol=1e-6)
    assert logged(many, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_settings_of_the_trainer_give_the_run_of_the_plain_optimizer(options, run):
    torch._dynamo.reset()
    layerwise, plain = (run(optim, max_grad_norm=0.0, **options) for optim in ("sinkgd_layerwise", "sinkgd"))
    assert_same(layerwise.model, plain.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True}, "set bf16=True instead, or leave out _layerwise"),
        ({"auto_find_batch_size": True}, "set per_device_train_batch_size, or leave out _layerwise"),
        ({"optim_args": "release=all"}, "max_grad_norm=1.0 cannot be applied: set max_grad_norm=0, or release=matric"),
        ({"optim_args": "release=some"}, "matrices | all"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_work_is_refused_with_the_fix(options, message, run):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        run("sinkgd_layerwise", **options)


def test_a_model_that_is_sharded_in_part_is_refused_with_the_fix():
    """Under tensor parallelism the Trainer computes the norm itself, from the gradients that are left."""
    model = make("llama")
    model.lm_head.weight.device_mesh = "tensor parallel"
    args = TrainingArguments(optim="sinkgd_layerwise", use_cpu=True, report_to=[])
    kwargs = {"adam_kwargs": {"betas": (0.9, 0.999), "eps": 1e-8}, "optim_args": {}, "optimizer_kwargs": {}}
    with pytest.raises(ValueError, match=r"tensor parallelism.*leave out _layerwise"):
        handle("sinkgd_layerwise", SimpleNamespace(model=model, args=args, **kwargs))


class Reader(TrainerCallback):
    """Reads the groups as loggers of third parties do."""

    def __init__(self):
        self.rates = []

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        assert all(len(group["params"]) for group in optimizer.param_groups)
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        assert self.rates[-1] == lr_scheduler.get_last_lr()


def test_callbacks_read_the_live_groups(run):
    reader = Reader()
    trainer = run("sinkgd_layerwise", callbacks=[reader])
    assert len(reader.rates) == 6
    assert [rates[0] for rates in reader.rates[:-1]] == pytest.approx(logged(trainer, "learning_rate")[1:], rel=1e-12)
    assert isinstance(trainer.optimizer.optimizer, StatelessOptimizer)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


SAVING = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}


@each_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_release
def test_a_resumed_run_ends_with_the_same_weights(name, dtype, release, run, tmp_path):
    options = {**SAVING, "optim_args": f"release={release}", "max_grad_norm": 0.0 if release == "all" else 1.0}
    whole = run(f"{name}_layerwise", dtype=dtype, **options)
    halves = {"dtype": dtype, "output_dir": str(tmp_path / "half"), **options}
    run(f"{name}_layerwise", callbacks=[StopAt(4)], **halves)
    resumed = run(f"{name}_layerwise", resume=True, **halves)
    assert resumed.state.global_step == 8
    assert_same(resumed.model, whole.model)


def test_a_checkpoint_moves_between_layerwise_and_plain(run, tmp_path):
    whole = run("sinkgd", max_grad_norm=0.0, **SAVING)
    options = {"output_dir": str(tmp_path / "half"), "max_grad_norm": 0.0, **SAVING}
    run("sinkgd_layerwise", callbacks=[StopAt(4)], **options)
    assert_same(run("sinkgd", resume=True, **options).model, whole.model)


def test_the_best_model_is_loaded_at_the_end_and_goes_on_training(run, tmp_path):
    saving = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = run("sinkgd_layerwise", **{**SAVING, **saving})
    losses = logged(trainer, "eval_loss")
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    before = weights_of(trainer.model)
    trainer.train()
    assert all((value != before[name]).any() for name, value in weights_of(trainer.model).items())


def test_save_only_model_resumes_from_the_weights(run):
    first = run("sinkgd_layerwise", callbacks=[StopAt(4)], save_only_model=True, **SAVING)
    resumed = run("sinkgd_layerwise", resume=True, save_only_model=True, **SAVING)
    assert resumed.state.global_step == 8
    assert any((a != b).any() for a, b in zip(first.model.parameters(), resumed.model.parameters(), strict=True))


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


# ---- The memory benchmark

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"


def by_optimizer(file):
    return {record["optimizer"]: record for record in json.loads(file.read_text())["records"]}


def assert_gradients_are_released(records):
    """At most the largest gradient and what AdamW still needs; to a thousandth of a GiB, as it is written."""
    for row in ("sinkgd_layerwise", "sinkgd_layerwise, release=all"):
        kept = 0 if "all" in row else records[row]["gradients_of_adamw_gib"]
        assert records[row]["gradients_gib"] <= records[row]["largest_gradient_gib"] + kept + 1e-3
        assert records[row]["gradients_gib"] < records["sinkgd"]["gradients_gib"]


def test_the_committed_measurement_keeps_the_promised_ratios():
    records = by_optimizer(BENCHMARKS / "results" / "memory-cpu.json")
    assert records["AdamW (fused)"]["weights_gib"] == pytest.approx(200e6 * 4 / 2**30, rel=0.05)
    assert_gradients_are_released(records)
    for row in ("sinkgd_layerwise", "sinkgd_layerwise, release=all"):
        assert records[row]["ratio"] < 0.55
        assert records[row]["time_ratio"] < 1.05


@pytest.mark.slow
def test_the_memory_benchmark_runs_and_finds_the_gradients_released(tmp_path):
    output = tmp_path / "memory.json"
    options = ["--model", "llama-20m", "--runs", "1", "--steps", "1", "--time", "--rounds", "2"]
    command = [sys.executable, str(BENCHMARKS / "memory.py"), *options, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_gradients_are_released(by_optimizer(output))
    assert "| sinkgd_layerwise |" in done.stdout

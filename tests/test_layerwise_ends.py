"""Hooks of updates in backward end with training: nobody's later backward changes weights or loses gradients."""

import gc
import logging
import weakref

import pytest
import torch
from accelerate import Accelerator
from conftest import VOCAB_SIZE
from layerwise_runs import assert_same, each_release, loss_of, make, take_steps, weights_of
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_stateless import create_optimizer


def rows():
    tokens = torch.randint(3, VOCAB_SIZE, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_of(model, folder, optim, release="matrices", callbacks=(), **options):
    own = {"optim_args": f"release={release}"} if optim.endswith("_layerwise") else {}
    args = TrainingArguments(
        str(folder),
        optim=optim,
        **{"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_grad_norm": 0.0, **own},
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    data = {"train_dataset": rows(), "eval_dataset": rows()[:2]}
    return Trainer(model, args, callbacks=list(callbacks), **data)


class Fails(TrainerCallback):
    """Raises in the middle of training: at an event, or in a backward pass."""

    def __init__(self, error, event):
        self.error, self.event = error, event

    def raise_at(self, event):
        if event == self.event:
            self.event = None
            raise self.error

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.raise_at("begin")
            if self.event == "backward":
                model.model.layers[0].self_attn.q_proj.weight.register_hook(lambda grad: self.raise_at("backward"))

    def on_substep_end(self, args, state, control, **kwargs):
        self.raise_at("between micro-batches")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.raise_at("before step")

    def on_train_end(self, args, state, control, **kwargs):
        self.raise_at("end")


def assert_left_alone(model):
    """A backward pass gives every gradient, that of a model without hooks, and changes no weight."""
    twin = make("llama")
    twin.load_state_dict(model.state_dict())
    before = weights_of(model)
    for each in (model, twin):
        each.zero_grad()
        loss_of(each).backward()
        loss_of(each, seed=1).backward()  # accumulates
    torch.testing.assert_close(weights_of(model), before, rtol=0, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)
    model.zero_grad()


# ---- The Trainer


@each_release
def test_after_training_a_backward_is_nobodys_and_training_goes_on(release, tmp_path):
    trained = []
    for optim in ("sinkgd_layerwise", "sinkgd"):
        trainer = trainer_of(make("llama"), tmp_path, optim, release, eval_strategy="steps", eval_steps=1)
        for _ in range(2):
            trainer.train()
            assert_left_alone(trainer.model)
            trainer.evaluate()
            assert_left_alone(trainer.model)
        trained.append(trainer)
    assert trained[0].optimizer.optimizer.release.hooked & {id(p) for p in trained[0].model.parameters()}
    assert_same(trained[0].model, trained[1].model)


@pytest.mark.parametrize(
    ("event", "error", "release"),
    [
        ("begin", KeyboardInterrupt(), "matrices"),
        ("backward", torch.OutOfMemoryError("out of memory"), "all"),
        ("backward", RuntimeError("in a hook"), "matrices"),
        ("between micro-batches", KeyboardInterrupt(), "all"),
        ("before step", RuntimeError("in a callback"), "matrices"),
        ("end", SystemExit(1), "all"),
    ],
)
def test_after_an_error_in_training_too(event, error, release, tmp_path):
    options = {"gradient_accumulation_steps": 2} if event == "between micro-batches" else {}
    model = make("llama")
    fails = Fails(error, event)
    trainer = trainer_of(model, tmp_path, "sinkgd_layerwise", release, [fails], **options)
    with pytest.raises(type(error)):
        trainer.train()
    assert fails.event is None
    trainer.accelerator.gradient_state._set_sync_gradients(True)  # what an error between micro-batches leaves
    assert_left_alone(model)
    before = weights_of(model)
    trainer.train()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("second", ["adamw_torch", "sgd", "sinkgd", "swan_layerwise"])
@pytest.mark.parametrize("first", ["sinkgd_layerwise", "a loop"])
def test_a_second_trainer_trains_as_if_there_had_been_no_first(first, second, tmp_path, caplog):
    model, fresh = make("llama"), make("llama")
    if first == "a loop":
        old = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)  # still there, and nobody said that it has ended
        take_steps(model, old)
    else:
        old = trainer_of(model, tmp_path, first)
        old.train()
    fresh.load_state_dict(model.state_dict())
    for each in (model, fresh):
        trainer_of(each, tmp_path, second).train()
    assert_same(model, fresh)
    assert not [r for r in caplog.records if r.name.startswith("hf_stateless.optimizer")]
    del old


def test_two_trainers_take_turns_on_one_model(tmp_path):
    trained = []
    for optim in ("sinkgd_layerwise", "sinkgd"):
        model = make("llama")
        ours, other = trainer_of(model, tmp_path, optim), trainer_of(model, tmp_path, "adamw_torch")
        for trainer in (ours, other, ours, other):
            trainer.train()
        trained.append(model)
    assert_same(*trained)


def test_training_steps_that_do_not_wake_the_optimizer_still_update_in_backward(tmp_path):
    class Own(Trainer):
        """As many scripts have it: `training_step` without `optimizer.train()`."""

        left = None

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            self.left = [name for name, p in model.named_parameters() if p.grad is not None]
            return loss.detach()

    model = make("llama")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2, release="all")
    args = trainer_of(model, tmp_path, "adamw_torch").args
    trainer = Own(model, args, train_dataset=rows(), optimizers=(optimizer, None))
    for _ in range(2):
        trainer.train()
        assert trainer.left == []
        assert_left_alone(model)


# ---- A loop of one's own


def prepared(model, name, **options):
    return Accelerator(cpu=True).prepare(create_optimizer(model, name, lr=1e-2, **options))


@each_release
@pytest.mark.parametrize("make_optimizer", [lambda *a, **k: create_optimizer(*a, lr=1e-2, **k), prepared])
def test_eval_puts_the_hooks_to_sleep_and_train_or_a_step_wakes_them(make_optimizer, release):
    model, plain = make("llama"), make("llama")
    optimizer = make_optimizer(model, "sinkgd_layerwise", release=release)
    reference = create_optimizer(plain, "sinkgd", lr=1e-2)
    for wake in ("train", "step", "train"):
        take_steps(model, optimizer, steps=1)
        take_steps(plain, reference, steps=1)
        optimizer.eval()
        assert_left_alone(model)
        if wake == "train":
            optimizer.train()
    assert_same(model, plain)
    weight = model.model.layers[0].self_attn.q_proj.weight
    loss_of(model).backward()
    assert weight.grad is None
    optimizer.eval()  # in the middle of a step: what was updated stays counted
    optimizer.step()
    loss_of(plain).backward()
    reference.step()
    assert_same(model, plain)


FOREIGN = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "SGD of one matrix": lambda model: torch.optim.SGD([model.model.layers[0].mlp.up_proj.weight], lr=1e-2),
    "prepared": lambda model: Accelerator(cpu=True).prepare(torch.optim.Adam(model.parameters(), lr=1e-2)),
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters()),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_optimizer_takes_the_hooks_off_in_its_first_step_and_says_so(kind, caplog):
    model = make("llama")
    ours = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    foreign = FOREIGN[kind](model)
    loss_of(model).backward()
    foreign.step(*[lambda: 0.0] * (kind == "LBFGS"))
    assert sum("old_optimizer.eval()" in r.message for r in caplog.records) == 1
    assert_left_alone(model)
    foreign.step(*[lambda: 0.0] * (kind == "LBFGS"))
    assert sum("old_optimizer.eval()" in r.message for r in caplog.records) == 1
    ours.train()  # and it may come back
    loss_of(model).backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is None


def test_an_optimizer_of_ours_that_steps_again_takes_the_hooks_back(caplog):
    model = make("llama")
    first = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    second = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    loss_of(model).backward()
    first.step()
    assert sum("old_optimizer.eval()" in r.message for r in caplog.records) == 1
    take_steps(model, first)
    assert not second.release.awake
    assert first.release.awake


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, as Lookahead is."""

    def __init__(self, inner):
        super().__init__([{"params": [p for g in inner.param_groups for p in g["params"]]}], {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step(closure)


@pytest.mark.parametrize("beside", ["a wrapper", "other parameters", "another model", "a sleeper"])
def test_optimizers_that_do_not_take_over_leave_the_hooks_where_they_are(beside, caplog):
    model, plain, other = make("llama"), make("llama"), make("gpt2")
    ours = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    if beside == "other parameters":
        rest = [p for p in model.parameters() if p.ndim == 1]
        foreign = torch.optim.SGD(rest, lr=0.0)
    elif beside == "another model":
        foreign = torch.optim.SGD(other.parameters(), lr=1e-2)
    elif beside == "a sleeper":
        foreign = torch.optim.SGD(model.parameters(), lr=0.0)
    for seed in range(2):
        if beside == "a sleeper":
            ours.eval()
            loss_of(model, seed=5).backward()
            foreign.step()
            foreign.zero_grad()
            ours.train()
        loss_of(model, seed=seed).backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad is None
        if beside == "a wrapper":
            Wrapper(ours).step()
        elif beside != "a sleeper":
            foreign.step()
        if beside != "a wrapper":
            ours.step()
        ours.zero_grad()
    take_steps_of(plain)
    assert_same(model, plain)
    assert not caplog.records


def take_steps_of(model):
    optimizer = create_optimizer(model, "sinkgd", lr=1e-2)
    for seed in range(2):
        loss_of(model, seed=seed).backward()
        optimizer.step()
        optimizer.zero_grad()


@each_release
@pytest.mark.parametrize("kept", ["nothing", "its driver", "a gradient"])
def test_hooks_go_with_the_optimizer_without_a_garbage_collection(kept, release):
    model = make("llama")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2, release=release)
    loss_of(model).backward()
    if kept != "a gradient":
        optimizer.step()
        model.zero_grad()
    driver = optimizer.release if kept == "its driver" else None
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        assert_left_alone(model)
    finally:
        gc.enable()
    assert driver is None or not driver.awake


def test_hooks_are_silent_about_what_is_no_training(caplog):
    with caplog.at_level(logging.INFO, "hf_stateless.optimizer"):
        model = make("llama")
        optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
        take_steps(model, optimizer)
        optimizer.eval()
        take_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert not [r for r in caplog.records if r.name.startswith("hf_stateless.optimizer")]


@pytest.mark.parametrize("release", ["matrices", "all"])
def test_a_step_without_hooks_is_refused_where_nobody_has_averaged(monkeypatch, make_model, release):
    model = make_model("llama")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2, release=release)
    optimizer.release.remove()
    loss_of(model).backward()
    before = weights_of(model)
    monkeypatch.setattr("hf_stateless.optimizer.release.are_replicas", lambda parameters: True)
    with pytest.raises(RuntimeError, match=r"not averaged over the processes: call optimizer\.train\(\)"):
        optimizer.step()
    torch.testing.assert_close(weights_of(model), before, rtol=0, atol=0)
    monkeypatch.undo()
    optimizer.step()  # one process has nothing to average
    assert any(not torch.equal(new, old) for new, old in zip(weights_of(model).values(), before.values(), strict=True))

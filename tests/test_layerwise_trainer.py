"""Updates in backward in a Trainer: schedule, log, accumulation, checkpoints."""

import logging

import pytest
import torch
from conftest import VOCAB_SIZE
from layerwise_runs import assert_same, each_name, each_release, make, weights_of
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_stateless import PRESETS, StatelessOptimizer, multi_normalize


# transformers renames gradient checkpointing to activation checkpointing; both names work, and PEFT uses the old one.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")


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
            x = multi_normalize(grads[parameter], **vars(preset.chain))
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

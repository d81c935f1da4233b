"""What `attach_memory_report` measures and logs is what the run really took."""

import collections
import sys

import pytest
import torch
from measured_runs import KEYS, MIB, bytes_of, new_trainer, padded, run
from transformers import Trainer, TrainerCallback

import hf_stateless
from hf_stateless.reports.files import GIB
from hf_stateless.reports.measured.schema import MemoryReport
from hf_stateless.reports.predicted import optimizer_state_bytes


pytest_plugins = ["measured_runs"]
pytestmark = pytest.mark.usefixtures("without_picture")


@pytest.mark.parametrize(
    ("optim", "model"),
    [("sinkgd", "llama"), ("swan", "llama_tied"), ("adamw_torch", "gpt2"), ("sinkgd_layerwise", "llama")],
)
def test_counted_bytes_are_those_of_the_tensors(optim, model, tmp_path):
    trainer, report = run(tmp_path, optim, model)
    state = trainer.optimizer.optimizer.state
    assert report.counted.weights == bytes_of([*trainer.model.parameters(), *trainer.model.buffers()])
    assert report.counted.optimizer_state == bytes_of(t for of_p in state.values() for t in of_p.values())
    assert sum(group.state_bytes for group in report.groups) == report.counted.optimizer_state
    assert sum(group.parameters for group in report.groups) == trainer.model.num_parameters()
    all_gradients = bytes_of(trainer.model.parameters())
    if optim.endswith("_layerwise"):
        assert 0 < report.counted.gradients < 0.8 * all_gradients
    else:
        assert report.counted.gradients == all_gradients


def test_a_gradient_that_backward_has_freed_is_counted(tmp_path):
    trainer = new_trainer(tmp_path, optim="sinkgd_layerwise")
    for p in trainer.model.parameters():
        p.requires_grad = p.ndim == 2 and p.shape[0] != trainer.model.vocab_size
    hf_stateless.attach_memory_report(trainer)
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    largest = max(bytes_of([p]) for p in trained)
    assert largest <= MemoryReport.load(tmp_path).counted.gradients < 0.5 * bytes_of(trained)


@pytest.mark.parametrize("optim", ["sinkgd", "adamw_torch"])
def test_the_parts_add_up_to_the_peak(optim, tmp_path):
    _, report = run(tmp_path, optim)
    rest, counted = report.residual, report.counted
    parts = (rest.before_training, rest.activations_and_temporaries, *vars(counted).values())
    assert sum(parts) == report.measured.peak.max == max(vars(report.measured.moments).values())
    assert report.measured.peak.min == report.measured.peak.max
    assert min(parts) >= 0


@pytest.mark.parametrize("optim", ["sinkgd", "sinkgd_layerwise", "adamw_torch", "adamw_torch_fused"])
def test_the_state_of_adamw_is_predicted_for_the_same_run(optim, tmp_path):
    trainer, report = run(tmp_path, optim)
    assert list(report.predicted) == ["adamw_torch_fused", "adamw_bnb_8bit"]
    for name in report.predicted:
        predicted = report.predicted[name]
        assert predicted.optimizer_state == optimizer_state_bytes(trainer.model, name)
        assert predicted.gradients == bytes_of(trainer.model.parameters())
    if optim.startswith("adamw_torch"):
        assert report.counted.optimizer_state == report.predicted["adamw_torch_fused"].optimizer_state


def test_every_training_log_has_the_numbers_once(tmp_path):
    trainer, report = run(tmp_path, eval_strategy="steps", eval_steps=2)
    logs = trainer.state.log_history
    with_loss = [entry for entry in logs if "loss" in entry]
    assert len(with_loss) == 2
    assert all(entry.keys() >= KEYS for entry in with_loss)
    assert all(not entry.keys() & KEYS for entry in logs if "loss" not in entry)
    assert with_loss[-1]["memory/optimizer_state_gib"] == pytest.approx(report.counted.optimizer_state / GIB, rel=1e-3)
    peak = max(entry["memory/peak_gib"] for entry in with_loss)
    assert peak == pytest.approx(report.measured.peak.max / GIB, rel=1e-3)


def test_trackers_get_the_numbers(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    run(tmp_path, callbacks=[Tracker()])
    assert sum(keys >= KEYS for keys in seen) == 2


def test_attaching_twice_changes_nothing(tmp_path):
    trainer = new_trainer(tmp_path)
    first = hf_stateless.attach_memory_report(trainer)
    log, compute_loss = trainer.log, trainer.compute_loss
    assert hf_stateless.attach_memory_report(trainer) is first
    assert (trainer.log, trainer.compute_loss) == (log, compute_loss)


def test_tokens_are_counted_without_padding_and_without_evaluation(tmp_path):
    seen = []

    def collate(rows):
        batch = padded(rows)
        seen.append((int(batch["attention_mask"].sum()), batch["input_ids"].shape[1]))
        return batch

    trainer = new_trainer(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    trainer.data_collator = collate
    hf_stateless.attach_memory_report(trainer)
    trainer.train()
    in_training = seen[:6]
    trainer.evaluate()
    report = MemoryReport.load(tmp_path)
    assert report.cost.tokens == sum(tokens for tokens, _ in in_training)
    assert report.setup.sequence_length == max(length for _, length in in_training)
    rate = report.cost.tokens_per_second * report.cost.seconds_per_step
    assert rate == pytest.approx(sum(tokens for tokens, _ in in_training[2:]) / 2, rel=1e-6)


class Hoarder(Trainer):
    """Takes memory for a moment, in training or in evaluation; fresh pages, which go back to the system at once."""

    in_training = in_evaluation = 0

    def compute_loss(self, model, *args, **kwargs):
        size = self.in_training if model.training else self.in_evaluation
        torch.ones(size * MIB // 4).sum()
        return super().compute_loss(model, *args, **kwargs)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak is that of the process so far")
def test_peaks_are_of_training_and_of_this_run_alone(tmp_path):
    def peak(folder, **sizes):
        kind = type("Sized", (Hoarder,), sizes)
        _, report = run(tmp_path / folder, kind=kind, eval_strategy="steps", eval_steps=1, max_steps=2)
        assert report.measured.peak_since == "first step"
        return report.measured.peak.max - report.measured.start

    assert peak("training", in_training=200) >= 195 * MIB
    assert peak("evaluation", in_evaluation=200) < 100 * MIB
    assert peak("nothing") < 100 * MIB


@pytest.mark.parametrize(("forward", "step", "share"), [(0.3, 0.1, 0.25), (0.1, 0.3, 0.75)])
def test_the_share_of_the_optimizer_is_that_of_its_step(forward, step, share, clock, tmp_path):
    trainer = new_trainer(tmp_path, max_steps=5)
    hf_stateless.attach_memory_report(trainer)

    def take(seconds):
        clock.now += seconds

    trainer.model.register_forward_pre_hook(lambda *_: take(forward))
    trainer.create_optimizer().register_step_pre_hook(lambda *_: take(step))
    trainer.train()
    cost = MemoryReport.load(tmp_path).cost
    assert cost.seconds_per_step == pytest.approx(forward + step)
    assert cost.optimizer_share == pytest.approx(share)


def test_evaluation_and_saving_are_no_time_of_training(clock, tmp_path):
    class Slow(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.now += 0.1

        def on_prediction_step(self, *args, **kwargs):
            clock.now += 0.5

        on_save = on_prediction_step

    saving = {"save_strategy": "steps", "save_steps": 1}
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "max_steps": 2, **saving}
    trainer = new_trainer(tmp_path, **options)
    hf_stateless.attach_memory_report(trainer)
    trainer.add_callback(Slow())
    trainer.train()
    assert MemoryReport.load(tmp_path).cost.seconds == pytest.approx(2 * 0.1)


class Counted:
    """Counts the calls of a probe's methods."""

    def __init__(self, probe):
        self.probe, self.calls = probe, collections.Counter()

    def __getattr__(self, name):
        self.calls[name] += 1
        return getattr(self.probe, name)


class Untouched(TrainerCallback):
    """Takes from a meter all by which it could reach a tensor, from the third step to the end of the fifth."""

    def __init__(self, memory):
        self.memory, self.taken = memory, {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            meter = self.memory.meter
            self.taken = {name: vars(meter).pop(name) for name in ("model", "optimizer", "_rule", "trained")}
            self.probe = meter.probe = Counted(meter.probe)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            vars(self.memory.meter).update(self.taken, probe=self.probe.probe)


@pytest.mark.parametrize("optim", ["sinkgd", "adamw_torch"])
def test_between_logs_measuring_touches_no_tensor_and_asks_twice_a_step_for_the_peak(optim, tmp_path):
    trainer = new_trainer(tmp_path, optim, max_steps=6, logging_steps=100)
    callback = hf_stateless.attach_memory_report(trainer)
    untouched = Untouched(callback)
    trainer.add_callback(untouched)
    trainer.train()
    assert untouched.probe.calls == {"restart": 2 * 3 - 1, "peaks": 2 * 3}
    assert len(untouched.taken) == 4
    assert callback.report().cost.seconds_per_step > 0

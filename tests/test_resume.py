"""A run that is resumed after its last step takes no other, in all four recipes."""

import json
from pathlib import Path

import pytest
import torch
from measured_runs import new_trainer, token_rows
from resume import last_step, train_or_finish

import hf_stateless


pytestmark = pytest.mark.usefixtures("without_picture")
pytest_plugins = ["measured_runs"]
RECIPES = Path(__file__).parents[1] / "recipes"
EPOCHS = {"max_steps": -1, "per_device_train_batch_size": 4, "logging_steps": 1}  # eight steps each
RUNS = {
    "within an epoch": ({"max_steps": 3}, 3),
    "after a whole epoch": ({**EPOCHS, "num_train_epochs": 1}, 8),
    "at a part of an epoch": ({**EPOCHS, "num_train_epochs": 1.2, "eval_strategy": "epoch"}, 10),
    "with accumulation": ({**EPOCHS, "num_train_epochs": 1.5, "gradient_accumulation_steps": 3}, 5),
    "evaluated at its beginning": ({"max_steps": 3, "eval_on_start": True, "eval_strategy": "steps"}, 3),
    "with skipped data": ({"max_steps": 3, "ignore_data_skip": True}, 3),
    "layer-wise": ({"max_steps": 3, "optim": "sinkgd_layerwise"}, 3),
}


def trainer_of(folder, options):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer = new_trainer(folder, **{**saving, **options})
    hf_stateless.attach_memory_report(trainer)
    return trainer


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_loaded_and_takes_no_step(name, tmp_path, capsys):
    options, steps = RUNS[name]
    trainer = trainer_of(tmp_path, options)
    train_or_finish(trainer, None)
    assert trainer.state.global_step == last_step(trainer) == steps
    checkpoint = tmp_path / f"checkpoint-{steps}"
    (tmp_path / "memory_report.json").unlink()
    before = sorted(path.stat().st_mtime_ns for path in checkpoint.iterdir())

    resumed = trainer_of(tmp_path, options)
    train_or_finish(resumed, str(checkpoint))
    assert f"is at step {steps} of {steps}: nothing is left to train." in capsys.readouterr().out
    assert resumed.state.global_step == steps
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value)
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert resumed.state.log_history == history
    assert sorted(path.stat().st_mtime_ns for path in checkpoint.iterdir()) == before
    report = json.loads((tmp_path / "memory_report.json").read_text())
    assert (report["complete"], report["measured"]["steps"]) == (True, steps)
    assert resumed.args.eval_on_start == options.get("eval_on_start", False)
    assert resumed.args.save_strategy == "steps"


def test_a_stream_that_is_resumed_after_its_end_takes_no_step(tmp_path, capsys):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(token_rows())

    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        trainer = trainer_of(tmp_path, {"max_steps": 3})
        trainer.train_dataset = Stream()
        train_or_finish(trainer, checkpoint)
        assert trainer.state.global_step == 3
    assert "nothing is left to train" in capsys.readouterr().out


@pytest.mark.parametrize("more", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 1}])
def test_a_run_goes_on_where_more_is_asked_for(more, tmp_path, capsys):
    train_or_finish(trainer_of(tmp_path, {"max_steps": 3}), None)
    longer = trainer_of(tmp_path, more)
    train_or_finish(longer, str(tmp_path / "checkpoint-3"))
    assert longer.state.global_step == last_step(longer) > 3
    assert "nothing is left to train" not in capsys.readouterr().out


@pytest.mark.parametrize("script", ["pretrain", "sft", "dpo", "grpo"])
def test_every_recipe_trains_by_it(script):
    texts = [(RECIPES / f"{name}.py").read_text() for name in (script, "finetuning_model")]
    assert ".train(resume" not in texts[0] + texts[1]
    assert "train_or_finish(trainer, checkpoint)" in texts[0] or "train_and_save(trainer, checkpoint)" in texts[0]

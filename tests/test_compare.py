"""`hf-stateless compare` says what the folders of runs say, and what is missing in them."""

import json

import pytest
from measured_runs import new_trainer

import hf_stateless
from hf_stateless.reports.compare import main
from hf_stateless.reports.files import size_text
from hf_stateless.reports.finished_run import read_run
from hf_stateless.reports.measured.schema import MemoryReport
from hf_stateless.run.command import main as cli


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Output folders of real runs: with both files, without a report, without a state."""
    root = tmp_path_factory.mktemp("runs")
    for optim in ("sinkgd", "adamw_torch"):
        trainer = new_trainer(root / optim, optim, eval_strategy="steps", eval_steps=2, logging_steps=1)
        hf_stateless.attach_memory_report(trainer)
        trainer.train()
        trainer.save_state()
    plain = new_trainer(root / "plain", "sgd", save_strategy="steps", save_steps=2)
    plain.train()
    bare = root / "bare"
    bare.mkdir()
    MemoryReport.load(root / "sinkgd").save(bare)
    return root


def output(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_the_numbers_are_those_of_the_files(folders, capsys):
    runs = json.loads(output(capsys, folders / "sinkgd", folders / "adamw_torch", "--json"))
    for run in runs:
        folder = folders / run["run"]
        report, state = MemoryReport.load(folder), json.loads((folder / "trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        evaluated = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
        assert (run["train_loss"], run["eval_loss"]) == (losses[-1], evaluated[-1])
        assert (run["optimizer"], run["steps"], run["notes"]) == (run["run"], 4, [])
        assert (run["tokens"], run["seconds"]) == (report.cost.tokens, report.cost.seconds)
        assert (run["peak"], run["optimizer_state"]) == (report.measured.peak.max, report.counted.optimizer_state)
        assert [point["loss"] for point in run["history"] if "loss" in point] == losses
        assert run["history"][-1]["tokens"] == report.cost.tokens
        assert run["history"][-1]["seconds"] == report.cost.seconds


def test_the_table_has_a_line_for_each_run_and_a_dash_for_what_is_not_known(folders, capsys):
    names = ("sinkgd", "plain", "bare")
    text = output(capsys, *(folders / name for name in names))
    lines = text.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:4]}
    assert list(cells) == list(names)
    report = MemoryReport.load(folders / "sinkgd")
    sizes = [size_text(size) for size in (report.measured.peak.max, report.counted.optimizer_state)]
    assert " ".join(cells["sinkgd"]).endswith(" ".join(sizes))
    assert cells["plain"][0] == "-"
    assert cells["plain"][-2:] == ["-", "-"]
    assert cells["plain"][1] == "4"
    assert cells["bare"][2:4] == ["-", "-"]
    assert "plain: no memory_report.json: hf_stateless.attach_memory_report(trainer)" in text
    assert "bare: no trainer_state.json, so no losses: trainer.save_state()" in text


def test_a_state_is_found_in_the_last_checkpoint(folders):
    assert not (folders / "plain" / "trainer_state.json").exists()
    assert read_run(folders / "plain").steps == 4


def test_runs_of_one_name_are_told_apart(folders, capsys):
    text = output(capsys, folders / "sinkgd", folders / "plain" / ".." / "sinkgd")
    assert text.count(f"{folders.name}/sinkgd ") == 2


@pytest.mark.parametrize("names", [["sinkgd", "adamw_torch"], ["plain"], ["bare", "plain", "sinkgd"]])
def test_the_plot_is_a_picture(names, folders, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output(capsys, *(folders / name for name in names), "--plot", tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes()[1:4] == b"PNG"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder; expected the output_dir of a run"),
        (["empty"], "neither trainer_state.json nor memory_report.json"),
        (["broken"], "no state of a Trainer"),
        (["half"], "no JSON"),
        (["sinkgd", "--plot", "x.nonsense"], "cannot be written"),
        ([], "required: RUN"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, folders, tmp_path, monkeypatch, capsys):
    for name, file in (("broken", "trainer_state.json"), ("half", "memory_report.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text('{"log_history": []}' if name == "broken" else "{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sinkgd").symlink_to(folders / "sinkgd")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("hf-stateless compare: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_command_line_knows_it(folders, capsys):
    assert cli(["compare", str(folders / "sinkgd")]) == 0
    assert "sinkgd" in capsys.readouterr().out

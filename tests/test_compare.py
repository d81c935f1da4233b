"""`hf-stateless compare` says what the folders of runs say, and what is missing in them."""

import json
from pathlib import Path

import pytest
from measured_runs import new_trainer

import hf_stateless
from hf_stateless.reports.compare import main
from hf_stateless.reports.files import size_text
from hf_stateless.reports.finished_run import read_run
from hf_stateless.reports.measured.picture import draw
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


# ---- Files that somebody else has written


STATE = {
    "global_step": 4,
    "log_history": [
        {"step": 1, "loss": 2.0, "num_input_tokens_seen": 5},
        {"step": 2, "eval_loss": 1.0},
        {"step": 4, "loss": 1.5, "train_runtime": 3.0},
    ],
}
STEP, LOSS = ("log_history", 0, "step"), ("log_history", 0, "loss")
VALUES = [
    None,
    "x",
    -1,
    1.5,
    True,
    [],
    {},
    10**400,
    float("nan"),
    float("inf"),
    "\x1b[31mred\x07",
    "$\\frac$",
    "\ud800",
]


def put(values, path, value):
    values = json.loads(json.dumps(values))
    if not path:
        return value
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return values


def answer(folder, capsys, *arguments):
    """Status, output and errors, checked to be what a terminal can show and JSON that a program can read."""
    status = main([str(folder), *arguments])
    out, err = capsys.readouterr()
    assert (status, out == "", err.count("\n")) in [(0, False, 0), (2, True, 1)]
    assert all(c.isprintable() or c == "\n" for c in out + err)
    assert len(err) < 1100
    if status == 0 and "--json" in arguments:
        json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return status, out, err


@pytest.fixture
def run_of(folders, tmp_path):
    """`run_of(state, report)`: a folder with these files; bytes as they are."""
    report = json.loads((folders / "sinkgd" / "memory_report.json").read_text())

    def make(state=STATE, change=((), None)):
        values = put(report, *change) if change[0] else report
        for name, content in (("trainer_state.json", state), ("memory_report.json", values)):
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (tmp_path / name).write_bytes(data)
        return tmp_path

    return make


@pytest.mark.parametrize("value", VALUES, ids=ascii)
def test_any_value_in_a_state_or_report_is_told_or_left_out(value, run_of, capsys):
    for path in [(), ("global_step",), ("log_history",), ("log_history", 1), STEP, LOSS]:
        answer(run_of(put(STATE, path, value)), capsys, "--json")
    for path in [("setup",), ("setup", "optimizer"), ("measured", "peak", "max"), ("cost", "seconds"), ("groups",)]:
        answer(run_of(change=(path, value)), capsys)


@pytest.mark.parametrize("content", [b"", b"\0\xff", b"[" * 100_000, b"9" * 5000, b"NaN", b"null", b"[{}]", b'"x"'])
def test_files_that_are_no_json_of_ours_get_one_line(content, run_of, capsys):
    assert answer(run_of(content), capsys)[0] == 2
    folder = run_of()
    (folder / "memory_report.json").write_bytes(content)
    assert answer(folder, capsys)[0] == 2


def test_a_loss_that_is_no_number_is_shown_and_is_null_in_json(run_of, capsys):
    for value in (float("nan"), float("inf")):
        folder = run_of(put(STATE, ("log_history", 2, "loss"), value))
        assert str(value) in answer(folder, capsys)[1]
        assert json.loads(answer(folder, capsys, "--json")[1])[0]["train_loss"] is None


@pytest.mark.parametrize("name", ["$\\frac$", "\x1b[31mred", "two\nlines", "_hidden", "x" * 200])
def test_a_name_that_is_a_formula_or_an_escape_is_drawn_as_it_is(name, run_of, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = run_of(change=(("setup", "optimizer"), name)).rename(tmp_path.parent / f"{name} of {tmp_path.name}")
    plot = folder / "compare.png"
    assert answer(folder, capsys, "--plot", str(plot))[0] == 0
    assert plot.is_file()
    change = put(json.loads((folder / "memory_report.json").read_text()), ("setup", "model"), name)
    draw(MemoryReport.from_dict(change), folder / "memory.png")
    assert (folder / "memory.png").is_file()


def test_a_file_that_may_not_be_read_gets_one_line(run_of, monkeypatch, capsys):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "Permission denied" in answer(run_of(), capsys)[2]

"""`hf-stateless card`: the card of a finished run with another run beside it, its curves, limits and numbers."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard
from test_model_card import plain_trainer

import hf_stateless
from hf_stateless.reports.card.attach import attach_model_card, save
from hf_stateless.reports.card.beside import differences, read_beside
from hf_stateless.reports.card.curves import CURVES_FILE, alternative_text, curves
from hf_stateless.reports.card.facts import CARD_FILE, DATA_FILE, CardFacts
from hf_stateless.reports.files import size_text
from hf_stateless.reports.measured.schema import REPORT_FILE, MemoryReport
from hf_stateless.run.command import main


RUNS = {"sinkgd": {}, "adamw_torch": {"learning_rate": 3e-4}, "swan_layerwise": {}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three short runs of one model, each with a card and a memory report."""
    place = tmp_path_factory.mktemp("runs")
    for optim, options in RUNS.items():
        trainer = plain_trainer(
            place / optim, optim=optim, eval_strategy="steps", eval_steps=1, eval_on_start=True, **options
        )
        hf_stateless.attach_memory_report(trainer)
        attach_model_card(trainer, base_model="", data="The text counts.")
        trainer.train()
        save(trainer)
    return place


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of their folders, to write into."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


def card(folder):
    return (folder / CARD_FILE).read_text(encoding="utf-8")


def test_a_card_compares_with_runs_that_were_measured(runs, capsys):
    assert (
        main(["card", str(runs / "sinkgd"), "--beside", str(runs / "adamw_torch"), str(runs / "swan_layerwise")]) == 0
    )
    assert capsys.readouterr().out.strip() == str(runs / "sinkgd" / CARD_FILE)
    text = card(runs / "sinkgd")
    part = text[text.index("## Beside") : text.index("## Training procedure")]
    assert "| | this run, `sinkgd` | `adamw_torch` | `swan_layerwise` | how |" in part
    reports = [MemoryReport.load(runs / name) for name in RUNS]
    for label, sizes, how in (
        ("peak", [report.measured.peak.max for report in reports], "measured"),
        ("optimizer state", [report.counted.optimizer_state for report in reports], "counted"),
    ):
        assert f"| {label} | {' | '.join(map(size_text, sizes))} | {how} |" in part
    losses = [CardFacts.load(runs / name).evaluation[0]["value"] for name in RUNS]
    row = next(line for line in part.splitlines() if line.startswith("| loss at the end |"))
    assert [float(cell) for cell in row.split("|")[2:5]] == pytest.approx(losses, rel=1e-3)


def test_what_differs_beside_the_optimizer_is_told(runs):
    facts, report = CardFacts.load(runs / "sinkgd"), MemoryReport.load(runs / "sinkgd")
    told = {name: differences(facts, report, read_beside(runs / name)) for name in RUNS}
    assert re.search(r"differs in: learning\\?_rate \(`5e-05`, `0.0003`\)\.$", told["adamw_torch"])
    assert "every other setting that a card lists" in told["swan_layerwise"]
    other = read_beside(runs / "swan_layerwise")
    other["hyperparameters"]["steps"], other["model"], other["took"]["device"] = 9, "Other", "GPU"
    assert all(word in differences(facts, report, other) for word in ("steps", "`Other`", "`GPU`"))


def test_writing_it_again_keeps_what_was_said(runs):
    folder = runs / "sinkgd"
    said = ["--beside", str(runs / "adamw_torch"), "--limit", "One seed.", "Two *steps* <b>.", "--license", "mit"]
    assert main(["card", str(folder), *said]) == 0
    first = card(folder)
    assert "## Limits\n\n- One seed.\n- Two \\*steps\\* &lt;b&gt;." in first
    assert ModelCard(first).data.license == "mit"
    assert main(["card", str(folder)]) == 0
    assert card(folder) == first


@pytest.mark.parametrize("optim", RUNS)
def test_programs_find_the_numbers_in_the_metadata(optim, runs):
    told, report = (
        ModelCard.load(runs / optim / CARD_FILE).data.to_dict()["training_memory"],
        MemoryReport.load(runs / optim),
    )
    assert told == {
        "peak_bytes": report.measured.peak.max,
        "weights_bytes": report.counted.weights,
        "gradients_bytes": report.counted.gradients,
        "optimizer_state_bytes": report.counted.optimizer_state,
        "peak_is": "resident set",
        "optimizer": optim,
        "device": report.setup.device,
    }


def test_the_curves_are_drawn_and_told_in_words(runs):
    folder = runs / "sinkgd"
    assert "![Held-out loss by steps. sinkgd: " in card(folder)
    alone = (folder / CURVES_FILE).read_bytes()
    assert main(["card", str(folder), "--beside", str(runs / "adamw_torch")]) == 0
    assert alone.startswith(b"\x89PNG")
    assert (folder / CURVES_FILE).read_bytes() != alone, "the other run has a curve too"
    facts = CardFacts.load(folder)
    name, lines = curves(facts)
    assert (name, list(lines)) == ("held-out loss", ["sinkgd", "adamw_torch"])
    assert [step for step, _ in lines["adamw_torch"]] == [0, 1, 2]
    assert alternative_text(facts) in card(folder)


@pytest.mark.parametrize(
    ("results", "drawn"),
    [
        ([{"step": 1, "loss": 0.1, "mean reward": 0.2}, {"step": 2, "loss": 0.1, "mean reward": 0.4}], "mean reward"),
        ([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}], "loss"),
        ([{"step": 5, "training loss": 3.0, "held-out loss": 2.0}], ""),
        ([], ""),
    ],
)
def test_what_is_drawn_is_what_the_run_has(results, drawn):
    assert curves(CardFacts("m", "M", 1, "sinkgd", results=results))[0] == drawn


def test_two_runs_of_one_optimizer_are_told_apart(runs):
    facts = CardFacts.load(runs / "sinkgd")
    facts.beside = [read_beside(runs / "adamw_torch"), read_beside(runs / "adamw_torch")]
    facts.beside[1]["hyperparameters"] = {"learning_rate": 0.1}
    assert list(curves(facts)[1]) == ["sinkgd", "adamw_torch, 0.0003", "adamw_torch, 0.1"]


def test_an_update_in_backward_has_no_share_of_a_step(runs):
    assert MemoryReport.load(runs / "swan_layerwise").cost.optimizer_share is None
    assert 0 < MemoryReport.load(runs / "sinkgd").cost.optimizer_share < 1
    assert "s a step, the updates in its backward." in card(runs / "swan_layerwise")
    assert "of it in the optimizer." in card(runs / "sinkgd")


def test_a_table_of_cards_has_each_run_with_the_first_beside_it(runs, capsys):
    assert main(["card", str(runs / "sinkgd"), "--beside", str(runs / "adamw_torch")]) == 0
    capsys.readouterr()
    assert main(["card", "--table", str(runs / "sinkgd"), str(runs / "swan_layerwise")]) == 0
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert head.startswith("| Card | Optimizer |")
    cells, alone = ([cell.strip() for cell in line.strip("|").split("|")] for line in (first, second))
    assert cells[:3] == ["[sinkgd](sinkgd/README.md)", "`sinkgd` / `adamw_torch`", "Loss"]
    peaks = [MemoryReport.load(runs / name).measured.peak.max for name in ("sinkgd", "adamw_torch")]
    assert cells[5] == " / ".join(map(size_text, peaks))
    assert alone[1] == "`swan_layerwise`"
    assert float(alone[4]) == pytest.approx(CardFacts.load(runs / "swan_layerwise").evaluation[0]["value"], rel=1e-3)


@pytest.mark.parametrize(
    ("said", "message"),
    [(["a", "b"], "got 2 runs"), ([], "the following arguments are required"), (["--table", "none"], "no card_data")],
)
def test_a_wrong_command_gets_one_line(said, message, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    for name, run in zip("ab", RUNS, strict=False):
        (runs / run).rename(runs / name)
    assert main(["card", *said]) == 2
    assert message in capsys.readouterr().err


def damage(folder, case):
    """Make a folder that cannot stand beside another."""
    if case == "no card":
        (folder / DATA_FILE).unlink()
    elif case == "no report":
        (folder / REPORT_FILE).unlink()
    elif case == "no JSON":
        (folder / DATA_FILE).write_text("{")
    elif case == "a list":
        (folder / DATA_FILE).write_text("[]")
    elif case == "not ended":
        values = json.loads((folder / REPORT_FILE).read_text())
        (folder / REPORT_FILE).write_text(json.dumps({**values, "complete": False}))
    elif case == "no numbers":
        values = json.loads((folder / DATA_FILE).read_text())
        (folder / DATA_FILE).write_text(json.dumps({**values, "evaluation": ["x"], "hyperparameters": []}))
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize("case", ["no card", "no report", "no JSON", "a list", "not ended", "no numbers", "no folder"])
@pytest.mark.parametrize("which", ["run", "beside"])
def test_a_folder_that_will_not_do_gets_one_line_and_nothing_is_written(which, case, runs, capsys):
    run, beside = runs / "sinkgd", runs / "adamw_torch"
    if (which, case) in {("run", "no report"), ("run", "not ended")}:
        pytest.skip("the card of a run needs neither")
    before = card(run)
    damage(run if which == "run" else beside, case)
    files = {file: file.read_bytes() for file in run.glob("*") if file.is_file()}
    assert main(["card", str(run), "--beside", str(beside)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("hf-stateless card: ")
    assert printed.count("\n") == 1
    assert {file: file.read_bytes() for file in run.glob("*") if file.is_file()} == files
    assert which == "run" or card(run) == before


def test_a_trainer_can_be_told_of_the_other_run(runs, tmp_path):
    trainer = plain_trainer(tmp_path / "new", optim="multinorm")
    hf_stateless.attach_memory_report(trainer)
    attach_model_card(trainer, beside=[runs / "adamw_torch"], limits=["One seed."])
    trainer.train()
    save(trainer)
    text = card(tmp_path / "new")
    assert "| | this run, `multinorm` | `adamw_torch` | how |" in text
    assert "- One seed." in text
    with pytest.raises(ValueError, match="no run to stand beside another"):
        attach_model_card(trainer, beside=[tmp_path])

"""What trackers are told of a run, and the page of its curves."""

import json
import math
import sqlite3
from html.parser import HTMLParser

import pytest
import torch
from measured_runs import KEYS, new_trainer, without_picture  # noqa: F401
from transformers import TrainerCallback

import hf_stateless
from hf_stateless.reports.card.dashboard import DASHBOARD_FILE, page, write_dashboard
from hf_stateless.reports.card.during_training import attach_push
from hf_stateless.reports.card.facts import CardFacts
from hf_stateless.reports.card.render import render_folder


PARTS = ("weights", "gradients", "optimizer_state", "activations", "before_training")
MORE = {f"memory/{part}_gib" for part in PARTS} | {"memory/optimizer_share"}
SKIPS = {"updates/not_finite", "updates/held_steps"}

pytestmark = pytest.mark.usefixtures("without_picture")


class Logs(TrainerCallback):
    """Keeps what trackers get, and spoils gradients at chosen steps."""

    def __init__(self, spoilt=(), value=math.nan):
        self.seen, self.spoilt, self.value = [], spoilt, value

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.spoilt:
            parameter = next(p for p in model.parameters() if p.ndim == 1)
            parameter.grad.fill_(self.value)


@pytest.mark.parametrize("optim", ["sinkgd", "swan_layerwise", "adamw_torch"])
def test_trackers_get_all_parts_and_a_terminal_four_numbers(optim, tmp_path):
    for tracked in (True, False):
        logs = Logs()
        trainer = new_trainer(str(tmp_path / f"{tracked}"), optim, callbacks=[logs])
        trainer.args.report_to = ["a tracker"] if tracked else []
        hf_stateless.attach_memory_report(trainer)
        trainer.train()
        always = (
            KEYS - {"time/optimizer_share"} if optim.endswith("_layerwise") else KEYS
        )  # its updates are in backward
        expected = always | MORE | (SKIPS if optim != "adamw_torch" else set())
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all({k for k in e if "/" in k} == expected for e in history)
        shown = [entry for entry in logs.seen if "loss" in entry]
        assert all({k for k in e if "/" in k} == (expected if tracked else always) for e in shown)
    for entry in history:
        assert sum(entry[f"memory/{part}_gib"] for part in PARTS) == pytest.approx(entry["memory/peak_gib"], rel=1e-3)
        share = entry["memory/optimizer_state_gib"] / entry["memory/peak_gib"]
        assert entry["memory/optimizer_share"] == pytest.approx(share, rel=2e-3)


@pytest.mark.parametrize(("spoilt", "value", "count"), [((), math.nan, 0), ((1,), math.nan, 1), ((0, 2), math.inf, 2)])
def test_updates_that_were_left_out_are_counted(spoilt, value, count, tmp_path):
    trainer = new_trainer(str(tmp_path), callbacks=[Logs(spoilt, value)], max_grad_norm=0.0)
    hf_stateless.attach_memory_report(trainer)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["updates/not_finite"] == count
    assert last["updates/held_steps"] == 0


def test_steps_that_min_signal_holds_back_are_counted(tmp_path):
    class Weaken(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step >= 17:
                for p in model.parameters():
                    p.grad.mul_(1e-6)

    trainer = new_trainer(
        str(tmp_path), callbacks=[Weaken()], optim_args="min_signal=0.1", max_steps=20, max_grad_norm=0.0
    )
    hf_stateless.attach_memory_report(trainer)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["updates/held_steps"] == trainer.optimizer.optimizer.held_steps == 3


def test_trackio_has_every_number_under_its_name_and_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio import utils  # the folder is read where it is imported

    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path / "trackio")
    import trackio.sqlite_storage

    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    trainer = new_trainer(str(tmp_path / "run"), report_to="trackio", project="curves", run_name="one")
    hf_stateless.attach_memory_report(trainer)
    attach_push(trainer)
    trainer.train()
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        metrics = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by step")]
        (config,) = (json.loads(row[0]) for row in database.execute("select config from configs"))
    names = {name for entry in metrics for name in entry}
    assert names >= {f"train/{name}" for name in KEYS | MORE | SKIPS | {"loss", "grad_norm", "learning_rate"}}
    assert config["optim"] == "sinkgd"
    assert str(tmp_path) not in json.dumps(config)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        assert self.open == [], "each tag is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


LOGS = {
    "empty": ([], 0),
    "one point": ([{"step": 1, "loss": 2.0}], 1),
    "constant": ([{"step": step, "loss": 0.0, "learning_rate": 1e-3} for step in range(5)], 2),
    "nan": ([{"step": 1, "loss": math.nan, "grad_norm": math.inf}, {"step": 2, "loss": 1.0}], 1),
    "words": ([{"step": 1, "loss": "high", "note": None, "eval_loss": 2.5, "rows": [1]}], 1),
    "no step": ([{"loss": 1.0}, {"step": "x", "loss": 1.0}], 0),
    "hostile": ([{"step": 1, "</style><script>alert(1)</script>": 1.0, "a\nb\"'&": 2.0}], 2),
    "many": ([{"step": 1, **{f"reward/{number}": number for number in range(500)}}], 60),
    "totals": ([{"step": 9, "train_runtime": 3.0, "train_loss": 1.0, "total_flos": 1e12, "epoch": 1.0}], 0),
}


@pytest.mark.parametrize("case", LOGS)
def test_a_page_of_curves_is_whole_whatever_the_log_holds(case):
    log, figures = LOGS[case]
    read = Tags(page("a </title><script>x</script>", log))
    assert read.tags.count("figure") == figures
    assert not {"script", "img", "link", "iframe"} & set(read.tags)
    assert "a </title><script>x</script>" in read.texts


def test_a_long_run_makes_a_small_page_with_its_card(tmp_path):
    torch.manual_seed(0)
    log = [
        {"step": step, "loss": 5 / (step + 1), **{f"memory/{part}_gib": step % 7 for part in (*PARTS, "peak")}}
        for step in range(20000)
    ]
    CardFacts(name="x", model="M", parameters=1, optimizer="sinkgd").save(tmp_path)
    assert DASHBOARD_FILE not in render_folder(tmp_path)
    write_dashboard(tmp_path, "run", log)
    text = (tmp_path / DASHBOARD_FILE).read_text()
    assert len(text) < 60_000
    assert Tags(text).tags.count("path") == 7
    assert f"[`{DASHBOARD_FILE}`]({DASHBOARD_FILE})" in render_folder(tmp_path)

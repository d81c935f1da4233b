"""The one command for a GPU: its budget, and what it does after failures and kills."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_report
import pytest
from documents import ROOT
from gpu_stages import Stage


SETUP = {"device": "a card", "rehearsal": False, "torch": "2.11", "transformers": "5.17", "cuda": "13.0"}
# What a stage does in these tests: the second word of its command is one of these names.
SCRIPT = """
import json, os, pathlib, signal, subprocess, sys, time
what, file, runs = sys.argv[1:]
with open(runs, "a") as log:
    log.write(what + chr(10))
if what == "raises":
    raise ValueError(f"no room in {pathlib.Path.home()}/models/llama")
if what == "exits":
    print("ordinary line")
    sys.exit("pretrain.py: error: no text")
if what == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "nothing":
    sys.exit(0)
if what == "garbage":
    pathlib.Path(file).write_text("{")
    sys.exit(0)
if what == "sleeps":
    child = subprocess.Popen(["sleep", "60"])
    pathlib.Path(runs).with_name("child").write_text(str(child.pid))
    time.sleep(60)
pathlib.Path(file).write_text(json.dumps({"setup": {}, "records": [{"optimizer": what, "milliseconds": 1.5}]}))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Sets the stages, each `NAME[:LEAST[:LIMIT]]`, and runs them; `runs` tells which have begun."""
    (tmp_path / "stage.py").write_text(SCRIPT)
    monkeypatch.setattr(gpu, "facts", lambda args: {**SETUP})

    def stages(*names):
        found = []
        for name in names:
            what, least, limit = [*name.split(":"), None, None][:3]
            words = f"{what.split()[0]} {{file}} {tmp_path / 'runs'}"
            stage = Stage(
                what, "step time", str(tmp_path / "stage.py"), words, "", "", int(limit or 20), int(least or 0)
            )
            found.append(stage)
        for module in (gpu, gpu_report):
            monkeypatch.setattr(module, "STAGES", tuple(found))
        return found

    def run(*words):
        status = gpu.main(["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *words])
        return status, json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"]

    def begun():
        return (tmp_path / "runs").read_text().split() if (tmp_path / "runs").is_file() else []

    return argparse.Namespace(stages=stages, run=run, begun=begun, folder=tmp_path)


def ended(pid):
    """Whether a process has ended, if it is given a moment; one that nobody has waited for counts."""
    for _ in range(50):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")")[-1].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_stages_run_in_order_and_the_end_tells_how_they_went(place, capsys):
    place.stages("a", "b", "c")
    status, entries = place.run()
    assert status == 0
    assert place.begun() == ["a", "b", "c"]
    assert [entry["records"] for entry in entries.values()] == [[{"optimizer": w, "milliseconds": 1.5}] for w in "abc"]
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines() if line.endswith("s  measured")] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("stages", "begun"),
    [(("a:100", "b:1"), ["b"]), (("a", "b:1000", "c:2"), ["a", "c"]), (("a:61", "b:62"), [])],
)
def test_a_stage_that_needs_more_than_is_left_is_not_reached_and_a_smaller_one_is(place, stages, begun):
    place.stages(*stages)
    status, entries = place.run("--minutes", "1")
    assert (status, place.begun()) == (0, begun)
    for name, entry in entries.items():
        assert entry["status"] == ("measured" if name in begun else "not reached")
        if name not in begun:
            assert "s were left, it needs" in entry["why"]


@pytest.mark.parametrize(
    ("stage", "minutes", "status", "why"),
    [("sleeps:0:1", "1", "failed", ", its limit"), ("sleeps:0:20", "0.02", "not reached", "when the time was over")],
)
def test_a_stage_is_stopped_at_its_limit_with_all_that_it_started(place, stage, minutes, status, why):
    place.stages(stage)
    _, entries = place.run("--minutes", minutes)
    assert entries["sleeps"]["status"] == status
    assert entries["sleeps"]["why"].startswith("stopped after 1 s")
    assert entries["sleeps"]["why"].endswith(why)
    assert ended((place.folder / "child").read_text())


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("raises", "ValueError: no room in llama"),
        ("exits", "pretrain.py: error: no text"),
        ("dies", "it printed nothing"),
        ("nothing", "it left no figures"),
        ("garbage", "its figures cannot be read: JSONDecodeError"),
    ],
)
def test_a_failed_stage_keeps_its_last_lines_and_the_run_goes_on(place, what, why, capsys):
    place.stages(what, "b")
    status, entries = place.run()
    assert status == 1
    assert entries[what]["status"] == "failed"
    assert entries[what]["why"].startswith(why)
    assert f"FAILED: {why}" in capsys.readouterr().out
    assert entries["b"]["status"] == "measured"
    if what == "exits":
        assert entries[what]["lines"] == ["ordinary line", why]
    assert str(Path.home()) not in json.dumps(entries)


def test_a_resumed_run_skips_what_is_measured_and_tries_last_what_failed(place):
    place.stages("a", "raises", "b:70")
    place.run("--minutes", "1")
    assert place.begun() == ["a", "raises"]
    _, entries = place.run("--minutes", "2")
    assert place.begun() == ["a", "raises", "b", "raises"]
    assert [entry["status"] for entry in entries.values()] == ["measured", "failed", "measured"]
    place.stages("a", "raises:70", "b")
    assert place.run("--minutes", "1")[1]["raises"]["status"] == "failed"  # what is known of it stays
    assert place.begun() == ["a", "raises", "b", "raises"]


def test_figures_of_other_code_are_measured_again_after_what_has_none(place, monkeypatch):
    place.stages("a", "b:1000", "c")
    place.run("--minutes", "1")
    monkeypatch.setattr(gpu, "code", lambda: "other")
    place.stages("a", "b", "c:1000")
    _, entries = place.run("--minutes", "1")
    assert place.begun() == ["a", "c", "b", "a"]
    assert [entries[name]["code"] == "other" for name in "abc"] == [True, True, False]
    assert entries["c"]["status"] == "measured"  # what is not reached again keeps its figures
    assert entries["c"]["records"]
    place.run("--minutes", "1")
    assert place.begun() == ["a", "c", "b", "a"]


def test_a_stage_whose_command_has_changed_is_measured_again(place):
    (stage,) = place.stages("a")
    place.run()
    file = place.folder / "out" / "gpu.json"
    results = json.loads(file.read_text())
    assert results["stages"]["a"]["command"] == stage.command(False)
    results["stages"]["a"]["command"] += " --rounds 3"
    file.write_text(json.dumps(results))
    place.run()
    place.run()
    assert place.begun() == ["a", "a"]


def test_equal_commands_run_once(place):
    place.stages("a", "a again")
    _, entries = place.run()
    assert place.begun() == ["a"]
    assert entries["a again"]["records"] == entries["a"]["records"]
    assert entries["a again"]["why"] == "as 'a', whose command is the same"


@pytest.mark.parametrize("packages", [("no_such_trl",), ("json", "no_such_peft"), ("no_such_trl", "no_such_peft")])
def test_a_stage_whose_package_is_missing_says_which(place, monkeypatch, packages):
    a, b = place.stages("a", "b")
    lacking = Stage(**{**vars(a), "needs": packages})
    monkeypatch.setattr(gpu, "STAGES", (lacking, b))
    status, entries = place.run()
    assert status == 0
    assert entries["a"]["why"] == ", ".join(f"no {name}" for name in packages if name != "json")
    assert place.begun() == ["b"]


def started(place, *names):
    """Start a run of these stages in a process of its own."""
    words = ["--output", str(place.folder / "out"), "--work", str(place.folder / "work")]
    stages = [vars(stage) for stage in place.stages(*names)]
    code = (
        f"import gpu, gpu_report; from gpu_stages import Stage\n"
        f"gpu.STAGES = gpu_report.STAGES = tuple(Stage(**values) for values in {stages!r})\n"
        f"gpu.facts = lambda args: {SETUP!r}\ngpu.main({words!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "recipes" / "benchmarks")}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    for _ in range(200):
        if (place.folder / "child").is_file() and (place.folder / "child").read_text():
            return process
        time.sleep(0.1)
    raise AssertionError("the stage did not begin")


def test_a_killed_run_loses_the_stage_under_way_and_the_next_ends_what_it_left(place):
    process = started(place, "a", "sleeps", "b")
    child = (place.folder / "child").read_text()
    with pytest.raises(SystemExit, match=r"Another run writes to .*: wait for it, or type another --output"):
        place.run()
    process.send_signal(signal.SIGKILL)
    process.wait()
    entries = json.loads((place.folder / "out" / "gpu.json").read_text())["stages"]
    assert {name: entry["status"] for name, entry in entries.items()} == {"a": "measured", "sleeps": "not reached"}
    assert entries["sleeps"]["why"] == "the run ended while it was under way"
    place.stages("a", "sleeps:0:1", "b")
    _, entries = place.run()
    assert ended(child)
    assert place.begun() == ["a", "sleeps", "sleeps", "b"]
    assert entries["b"]["status"] == "measured"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"setup": {**SETUP, "device": "another card"}, "stages": {}}),
        json.dumps({"setup": {**SETUP, "rehearsal": True}, "stages": {}}),
        json.dumps({"setup": {**SETUP, "torch": "2.13"}, "stages": {}}),
        json.dumps({"records": []}),
        json.dumps([1]),
        "{",
    ],
)
def test_results_of_another_kind_are_neither_mixed_nor_overwritten(place, content):
    place.stages("a")
    (place.folder / "out").mkdir()
    file = place.folder / "out" / "gpu.json"
    file.write_text(content)
    with pytest.raises(SystemExit, match="type another --output"):
        place.run()
    assert (file.read_text(), place.begun()) == (content, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "--minutes 0: expected more than 0"),
        (["--minutes", "nan"], "--minutes nan: expected more than 0"),
        (["--stages", "GRP"], "--stages 'GRP': expected some of GPU tests; step time, 1b;"),
    ],
)
def test_bad_options_are_refused_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert message in capsys.readouterr().err

"""What the stages of the one command for a GPU have found, as records and on the page."""

import json
import re

import gpu
import gpu_figures
import gpu_report
import pytest
from documents import read
from gpu_process import telling_line
from gpu_stages import STAGES


SETUP = {"device": "a card", "rehearsal": False, "torch": "2.11", "transformers": "5.17", "cuda": "13.0"}


# Figures


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("12 passed, 3 skipped, 200 deselected in 40.01s", (12, 0, 3)),
        ("1 failed, 2 passed, 1 error in 3.00s", (2, 2, 0)),
        ("18 skipped in 0.50s", (0, 0, 18)),
    ],
)
def test_counts_of_tests_are_read_from_their_last_line(line, counts):
    assert gpu_figures.of_tests(["FAILED tests/test_x.py - 7 passed", line]) == [
        dict(zip(("passed", "failed", "skipped"), counts, strict=True))
    ]


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (
            ["Traceback", "torch.OutOfMemoryError: CUDA out of memory.", "bye"],
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (["step 1", "grpo.py: error: no model", ""], "grpo.py: error: no model"),
        (["E   assert 1 == 2", "1 failed"], "E   assert 1 == 2"),
        (["step 1", "step 2"], "step 2"),
        ([], "it printed nothing"),
    ],
)
def test_the_line_that_tells_why(lines, line):
    assert telling_line(lines) == line


def test_the_best_rate_of_each_row_is_told(tmp_path):
    base = {"seed": 0, "seconds": 1, "parameters": 9, "state_bytes": 8, "sequences": 2, "block": 4, "steps": 3}
    runs = [("swan", 1e-3, 4.2), ("swan", 2e-3, 4.1), ("swan", 4e-3, None), ("adamw", 1e-3, 4.5)]
    for number, (row, rate, loss) in enumerate(runs):
        record = {**base, "row": row, "learning_rate": rate, "eval_loss": loss}
        (tmp_path / f"{number}.json").write_text(json.dumps(record))
    keys = ("row", "learning_rate", "rates", "edge", "tokens")
    found = [tuple(record[key] for key in keys) for record in gpu_figures.of_quality(tmp_path)]
    assert found == [("swan", 2e-3, 2, "the highest", 24), ("adamw", 1e-3, 1, "the only one", 24)]


# The page


RECORDS = {
    "step time": {"model": "1b", "optimizer": "swan", "milliseconds": 12.345, "host_milliseconds": 0.5, "ratio": 1.5},
    "memory": {"optimizer": "swan", "peak_gib": 14.8, "predicted_gib": 14.6, "over_predicted": 0.0137},
    "quality": {
        "row": "sinkgd 1, polar 1, rest 32/4/16x",
        "eval_loss": 4.1304,
        "learning_rate": 4e-3,
        "rates": 3,
        "edge": "the lowest",
        "tokens": 7864320,
    },
    "ranks": {"backend": "nccl", "processes": 2, "way": "", "optimizer": "", "failed": "Duplicate GPU | detected"},
}


def results_of(*names):
    kinds = {stage.name: stage.kind for stage in STAGES}
    entries = {name: {"status": "measured", "records": [RECORDS[kinds[name]]]} for name in names}
    return {"setup": SETUP, "stages": {**entries, "SFT": {"status": "failed", "why": "no", "records": []}}}


@pytest.mark.parametrize(
    "names",
    [(), ("step time, 1b",), ("memory, 7b", "quality, 130M"), ("step time, 7b", "two processes", "memory, 1b")],
)
def test_a_page_says_not_measured_exactly_where_a_stage_has_no_result(names):
    text = gpu_report.section(results_of(*names))
    for stage in STAGES:
        lines = [line for line in text.splitlines() if line.startswith(f"| {stage.name} |")]
        assert len(lines) == 1
        assert lines[0].startswith(f"| {stage.name} | not measured |") == (stage.name not in names)
    assert "one a card (torch 2.11, transformers 5.17, cuda 13.0)" in text


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("step time, 1b", "| step time, 1b | 1b | not measured | swan | 12.35 | 0.50 | 1.50x | not measured |"),
        ("memory, 1b", "| memory, 1b | swan | 14.80 | 14.60 | +1.4% |"),
        (
            "quality, 130M",
            "| quality, 130M | `sinkgd_polar` | 32x / 4x / 16x | 4.130 | 4.0e-03 | 3 | the lowest | 7,864,320 |",
        ),
        (
            "two processes",
            "| two processes | nccl | 2 | | | not measured | not measured | not measured | Duplicate GPU \\| d",
        ),
    ],
)
def test_figures_stand_in_the_tables(name, line):
    assert line in gpu_report.section(results_of(name))


def test_what_failed_or_ended_early_is_said_below_its_figures():
    results = results_of("memory, 1b", "quality, 130M")
    results["stages"]["quality, 130M"] |= {"status": "failed", "why": "stopped after 9 s"}
    lines = gpu_report.section(results).splitlines()
    assert [line for line in lines if line.startswith("- ")] == ["- quality, 130M: failed, stopped after 9 s."]


def test_the_page_is_that_of_the_results():
    results = json.loads(gpu.RESULTS.read_text()) if gpu.RESULTS.is_file() else {}
    page = read("recipes/benchmarks/README.md")
    assert gpu_report.with_section(page, results) == page
    assert ("No run on a GPU has been [measured]" in read("README.md")) == (not results)


def test_what_pages_tell_of_a_gpu_was_measured():
    stages = json.loads(gpu.RESULTS.read_text())["stages"]
    text = {name: read(f"{folder}README.md") for name, folder in (("top", ""), ("page", "recipes/benchmarks/"))}
    every = json.loads(read("recipes/benchmarks/results/quality-gpu.json"))["records"]
    for row, title in (("muon", "Muon"), ("swan", "swan"), ("adamw, rates apart", "AdamW"), ("sinkgd", "sinkgd")):
        [best] = [r for r in stages["quality, 60M"]["records"] if r["row"] == f"{row}, rest 32/4/16x"]
        assert best["eval_loss"] in {run["eval_loss"] for run in every}
        for page in text.values():
            assert re.search(rf"{title}`? (ended |ends )?at {best['eval_loss']:.3f}", page), title
    for size, least, most in (("7b", 0.1, 1.7), ("1b", 2.0, 4.5)):
        over = [100 * r["over_predicted"] for r in stages[f"memory, {size}"]["records"]]
        assert [round(min(over), 1), round(max(over), 1)] == [least, most]
        assert f"by {least} to {most} %" in text["page"]
    for record in stages["training, sinkgd"]["records"] + stages["training, adamw_torch_fused"]["records"]:
        assert f"{round(record['tokens_per_second'], -2):,.0f}" in text["top"]


def test_a_long_table_is_folded_and_figures_of_older_code_are_named():
    results = results_of("memory, 1b", "step time, 1b", "two processes")
    for name, code, at in (("memory, 1b", "old", 1), ("step time, 1b", "new", 2), ("two processes", "new", 3)):
        results["stages"][name] |= {"code": code, "at": at}
    text = gpu_report.section(results)
    assert "Measured before the last change of the code: memory, 1b.\n" in text
    assert "<details>" not in text
    results["stages"]["memory, 1b"]["code"] = "new"
    results["stages"]["step time, 1b"]["records"] *= gpu_report.MOST_LINES
    text = gpu_report.section(results)
    assert "before the last change" not in text
    assert text.count("<details>") == text.count("</details>") == 1


def test_a_report_takes_the_file_over_and_renews_the_page(tmp_path, monkeypatch):
    page, kept, file = (tmp_path / name for name in ("README.md", "results.json", "gpu.json"))
    page.write_text("before\n<!-- gpu: begin -->\nold\n<!-- gpu: end -->\nafter\n")
    monkeypatch.setattr(gpu, "PAGE", page)
    monkeypatch.setattr(gpu, "RESULTS", kept)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    file.write_text(json.dumps(results_of("memory, 1b")))
    for words in ([str(file)], [str(kept)]):
        assert gpu.main(["--report", *words]) == 0
        assert page.read_text().startswith("before\n<!-- gpu: begin -->\nMeasured on one a card")
        assert page.read_text().endswith("\n<!-- gpu: end -->\nafter\n")
        assert page.read_text().count("| memory, 1b | swan | 14.80 |") == 1
        assert json.loads(kept.read_text()) == results_of("memory, 1b")


@pytest.mark.parametrize(
    ("content", "page", "message"),
    [
        (json.dumps({"setup": {**SETUP, "rehearsal": True}, "stages": {}}), "", "is that of a rehearsal on CPU"),
        ("[]", "", "is no file of results"),
        (None, "", "No file"),
        (json.dumps({"setup": SETUP, "stages": {}}), "no marks", "has no lines <!-- gpu: begin -->"),
    ],
)
def test_a_report_of_something_else_changes_nothing(tmp_path, monkeypatch, content, page, message):
    for name in ("PAGE", "RESULTS"):
        monkeypatch.setattr(gpu, name, tmp_path / name)
    (tmp_path / "PAGE").write_text(page)
    if content is not None:
        (tmp_path / "gpu.json").write_text(content)
    with pytest.raises(SystemExit, match=message):
        gpu.main(["--report", str(tmp_path / "gpu.json")])
    assert (tmp_path / "PAGE").read_text() == page
    assert not (tmp_path / "RESULTS").exists()

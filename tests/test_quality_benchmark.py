"""The quality benchmark: its plan, the walk over learning rates, real tiny runs, and the tables on the pages."""

import argparse
import json
import math
import re
from dataclasses import replace

import pytest
import quality
import quality_families
import quality_plan
import quality_report
import rate_walk
import rounding_feedback
import torch
import weight_formats
from datasets import Dataset
from documents import ROOT, guides, page_with, read, section, sections, tracked_files
from quality_plan import ROWS, STUDIES, AdamWFactory, MuonFactory, Study

from hf_stateless import PRESETS
from hf_stateless.update.rate import learning_rate


RESULTS = ROOT / "recipes" / "benchmarks" / "results"
TINY = Study(hidden=32, layers=1, vocab=64, sequences=2, block=16, steps=2)


class Words:
    def __len__(self):
        return 64


@pytest.fixture
def args(tmp_path, monkeypatch):
    blocks = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (8, 16)).tolist()])
    monkeypatch.setattr(quality, "text_blocks", lambda study, args: (blocks, blocks, Words()))
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()
    walk = {"seeds": [0], "rates": 3, "repeat": 1, "factors": None}
    return argparse.Namespace(runs=runs, study="tiny", device="cpu", compile=False, **walk)


@pytest.mark.parametrize("best", [-3, 0, 1, 4])
def test_the_walk_ends_with_a_worse_rate_on_both_sides(best):
    losses = rate_walk.walk(lambda k: abs(k - best), least=4)
    assert min(losses, key=losses.get) == best
    assert {best - 1, best + 1} <= losses.keys()
    assert len(losses) >= 4


def test_a_diverged_run_is_worse_than_every_other():
    losses = rate_walk.walk(lambda k: math.inf if k > 0 else abs(k + 1), least=3)
    assert min(losses, key=losses.get) == -1


def test_the_best_rate_is_one_that_most_seeds_were_run_with():
    runs = [(0, 1.0, 2.0), (0, 2.0, 1.9), (1, 1.0, 2.2), (1, 2.0, 1.7), (0, 4.0, 1.0)]
    records = [{"seed": seed, "learning_rate": lr, "eval_loss": loss} for seed, lr, loss in runs]
    best, losses, means = rate_walk.best_rate(records)
    assert (best, losses) == (2.0, {0: 1.9, 1: 1.7})
    assert means == pytest.approx({1.0: 2.1, 2.0: 1.8, 4.0: 1.0})


@pytest.mark.parametrize(
    ("pick", "reported", "best"),
    [((2.0, 3.0), (9.0, 1.0), 1e-3), ((None, 3.0), (1.0, 2.0), 2e-3), ((2.5, None), (2.0, 1.0), 1e-3)],
    ids=str,
)
def test_rates_are_picked_by_the_other_half_and_none_that_diverged(pick, reported, best):
    rows = zip((1e-3, 2e-3), pick, reported, strict=True)
    records = [{"learning_rate": lr, "seed": 0, "pick_loss": p, "eval_loss": loss} for lr, p, loss in rows]
    assert rate_walk.best_rate(records)[0] == best


@pytest.mark.parametrize("factory", [MuonFactory, AdamWFactory])
def test_the_rows_with_a_factory_update_every_parameter_once(factory):
    model = quality.make_model(TINY, 64, 0)
    optimizer = factory()(model, lr=1e-2, rest_rate=1e-3)
    named = {id(p): name for name, p in model.named_parameters()}
    updated = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(updated) == sorted(named)
    rates = {named[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, lr in rates.items() if lr == 1e-2} == {n for n in named.values() if "_proj" in n}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(input_ids=torch.randint(0, 64, (1, 8)), labels=torch.randint(0, 64, (1, 8))).loss.backward()
    for group in optimizer.param_groups:
        group["lr"] *= 0.5 if group["lr"] == 1e-2 else 0.0  # what a scheduler does reaches the parts
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in named.values() if "_proj" in name}
    assert optimizer.tensors()


KINDS = {"embed_tokens": 0, "lm_head": 1, "norm": 2}


@pytest.mark.parametrize("kinds", [(1, 1, 1), *quality_plan.KINDS[:2]], ids=str)
@pytest.mark.parametrize("row", ["adamw, rates apart", "muon", "swan", "sinkgd"])
def test_every_optimizer_takes_multiples_for_each_kind_of_parameter(row, kinds, args):
    name = row if kinds == (1, 1, 1) else quality_plan.of_kinds(row, kinds)
    model, own = quality.make_model(TINY, 64, 0), ROWS[name]
    factory = own.factory and (own.factory, {"lr": 1e-2, "rest_rate": quality_plan.REST_RATE, "kinds": own.kinds})
    arguments = quality.training_arguments(own, 1e-2, TINY, 0, args)
    trainer = quality.Trainer(model, arguments, optimizer_cls_and_kwargs=factory)
    rates = {id(p): learning_rate(group) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for key, p in model.named_parameters():
        kind = next((i for part, i in KINDS.items() if part in key), None)
        assert rates[id(p)] == pytest.approx(1e-2 if kind is None else quality_plan.REST_RATE * kinds[kind]), key


@pytest.mark.parametrize("row", ["adamw", "lion", "galore"])
def test_a_row_with_one_rate_refuses_others(row):
    with pytest.raises(ValueError, match="one rate for all: take factory=AdamWFactory"):
        replace(ROWS[row], kinds=(32, 4, 16))


@pytest.mark.parametrize("row", ["adamw", "adamw, rates apart", "muon", "swan", "sinkgd"])
def test_every_row_has_the_schedule_of_the_trainer(row, args, monkeypatch):
    """The first step of a warm-up has the rate 0: nothing moves in it, and everything in the second."""
    moved = []

    class Moves(quality.Progress):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.before = [p.detach().clone() for p in model.parameters()]

        def on_step_end(self, args, state, control, model=None, **kwargs):
            moved.append([not torch.equal(*pair) for pair in zip(model.parameters(), self.before, strict=True)])

    monkeypatch.setattr(quality, "Progress", Moves)
    quality.run(row, 2e-3, 0, TINY, args)
    assert [any(moved[0]), all(moved[1])] == [False, True]


@pytest.mark.parametrize("row", ["adamw", "muon", "swan", "sinkgd", "sign"])
def test_a_run_goes_through_the_trainer_and_is_found_again(row, args, monkeypatch):
    loss = quality.cached(row, 1e-3, 0, TINY, args)
    (record,) = quality.read_runs(args.runs)
    assert record["pick_loss"] == loss
    assert 0 < loss < 10
    assert 0 < record["eval_loss"] != loss  # of the other half
    assert record["rest_rate"] == (None if row == "adamw" else quality_plan.REST_RATE)
    per_weight = record["state_bytes"] / record["weight_bytes"]
    assert per_weight == pytest.approx(2, abs=0.01) if row == "adamw" else per_weight < 2
    monkeypatch.setattr(quality, "run", None)  # would be called again
    assert quality.cached(row, 1e-3, 0, TINY, args) == loss


def test_the_runs_of_a_report_are_laid_out_again_and_not_repeated(records, args, monkeypatch):
    quality.restore(RESULTS / "quality-history.json", args.runs)
    assert len(quality.read_runs(args.runs)) == len(records)
    monkeypatch.setattr(quality, "run", None)  # would be called for what is missing
    for record in records:
        study = Study(**{key: record.get(key, value) for key, value in Study().values().items()})
        loss = quality.cached(*(record[key] for key in ("row", "learning_rate", "seed")), study, args)
        assert loss == (math.inf if record["eval_loss"] is None else record["eval_loss"])


def test_every_run_has_a_file_of_its_own(tmp_path):
    names = {
        quality.file_of(quality.configuration(row, lr, seed, study), tmp_path)
        for row in ROWS
        for lr in (1e-3, 2e-3)
        for seed in (0, 1)
        for study in STUDIES.values()
    }
    assert len(names) == len(ROWS) * 2 * 2 * len(set(STUDIES.values()))


def test_rows_name_optimizers_that_the_trainer_knows():
    from transformers.training_args import OptimizerNames

    import hf_stateless  # noqa: F401

    for row in ROWS.values():
        assert (row.optim is None) == (row.factory is not None)
        assert row.optim is None or OptimizerNames(row.optim)


def test_a_table_has_the_best_row_first_and_marks_what_diverged():
    base = {**STUDIES["small"].values(), "seed": 0, "state_bytes": 80, "parameters": 10}
    runs = [("adamw", 1e-3, 3.0), ("adamw", 2e-3, 2.5), ("adamw", 4e-3, None), ("swan", 4e-3, 2.25)]
    records = [{**base, "row": row, "learning_rate": lr, "eval_loss": loss} for row, lr, loss in runs]
    table = quality_report.tables(records)["small"].splitlines()
    assert table[2].startswith("| swan | 2.250 | 1 |  | 4.0e-03 | not run | not run | 8.00 |")
    assert table[3].startswith("| AdamW | 2.500 | 1 |  | 2.0e-03 | 3.000 | inf | 8.00 |")
    assert quality_report.tables(records)["learning rates"].splitlines()[2] == "| small | 2.0e-03 |  |  | 2x |  |"


def test_a_row_is_called_by_words_and_the_spread_of_its_seeds_has_a_cell():
    base = {**STUDIES["small"].values(), "state_bytes": 80, "parameters": 10, "learning_rate": 1e-3}
    runs = [("adamw, rates apart, rest 8x", seed, 2.0 + seed / 4) for seed in (0, 1)]
    table = quality_report.tables([{**base, "row": row, "seed": seed, "eval_loss": x} for row, seed, x in runs])[
        "small"
    ]
    words = "AdamW, own rate for matrices, 8x rate for embeddings, head, norms"
    of_kinds = quality_report.label(quality_plan.of_kinds("muon", (32, 4, 16)))
    assert of_kinds == "Muon, 32x rate for embeddings, 4x for the head, 16x for norms"
    assert table.splitlines()[2].startswith(f"| {words} | 2.125 | 2 | 0.250 | 1.0e-03 |")


LARGEST = ("largest, python", "largest, english")


@pytest.fixture(scope="module")
def records():
    return json.loads((RESULTS / "quality-history.json").read_text())["records"]


def test_the_tables_are_those_of_the_runs(records):
    assert read("recipes/benchmarks/results/quality-history.md") == quality_report.document(records)
    tables = quality_report.tables(records)
    for name in (quality_report.SCHEDULE, quality_report.CONSTANT, "long", "learning rates"):
        assert page_with(tables[name])


@pytest.fixture(scope="module")
def new_records():
    return json.loads((RESULTS / "quality-cpu.json").read_text())["records"]


def test_the_tables_of_rates_by_kind_are_those_of_the_runs(new_records):
    assert read("recipes/benchmarks/results/quality-cpu.md") == quality_families.document(new_records)
    assert page_with(quality_families.summary(new_records))
    short = quality_families.summary(new_records, names=quality_families.SHORT)
    assert short in section("README.md", "Is it as good as AdamW?")


def test_the_share_of_steps_until_another_ends_is_read_from_curves_of_common_seeds():
    def ended(curves):
        return quality_families.Best("swan", 1e-3, dict.fromkeys(curves, 3.0), curves, {}, 0.0)

    adamw = ended({0: [(10, 5.0), (20, 4.0)], 1: [(10, 5.0), (20, 4.4)]})
    faster = {0: [(10, 5.0), (20, 3.6)], 2: [(10, 1.0), (20, 1.0)]}
    assert adamw.reaches(adamw) == 1
    assert ended(faster).reaches(adamw) == pytest.approx((10 + 10 * 1.0 / 1.4) / 20)  # 5.0 to 3.6 by 4.0, of seed 0
    assert ended({0: [(10, 3.9), (20, 3.8)]}).reaches(adamw) == 0.5
    assert ended({0: [(10, 5.0), (20, 4.1)]}).reaches(adamw) is None
    assert ended({7: faster[2]}).reaches(adamw) is None


def test_every_loss_that_the_pages_tell_is_one_of_a_run_or_a_mean(records, new_records):
    page = page_with(quality_report.tables(records)[quality_report.SCHEDULE])
    parts = {
        "page": section(page, "Quality"),
        "readme": section("README.md", "Is it as good as AdamW?") + section("README.md", "Which learning rate?"),
    }
    means = [
        rate_walk.best_rate(same)[1].values()
        for study in STUDIES
        for same in quality_report.by_row(quality_report.of_study(records, study)).values()
    ]
    known = {f"{sum(losses) / len(losses):.3f}" for losses in means}
    on_a_gpu = json.loads(read("recipes/benchmarks/results/quality-gpu.json"))["records"]
    every = (*records, *new_records, *on_a_gpu)
    known |= {f"{record['eval_loss']:.3f}" for record in every if record["eval_loss"] is not None}
    for study in STUDIES:
        for same in quality_report.by_row(quality_report.of_study(new_records, study)).values():
            means_at = rate_walk.best_rate(same)[2].values()
            known |= {f"{loss:.3f}" for loss in means_at}
    card = json.loads(read("hub_cards/llama-10m-pretrain-swan/card_data.json"))
    known |= {f"{run['evaluation'][0]['value']:.3f}" for run in (card, *card["beside"])}
    told = {name: set(re.findall(r"\b[3-9]\.\d{3}\b", text)) for name, text in parts.items()}
    assert len(told["page"]) > 40
    assert len(told["readme"]) > 9
    assert told["page"] | told["readme"] <= known


def test_wherever_sinkgd_without_state_is_shown_a_link_leads_to_what_it_costs(records):
    """In the same part of a page as any table, command or example of the pair; no recipe has it."""
    rows = quality_report.by_row(quality_report.of_study(records, "small"))
    ends = {
        row: f"{sum(best.values()) / len(best):.3f}" for row in rows for best in [rate_walk.best_rate(rows[row])[1]]
    }
    told = f"in pretraining it ended at {ends['sinkgd']} so, and at {ends['sinkgd, stateless embeddings']} with "
    told += f"`embeddings=stateless`, where AdamW ended at {ends['adamw']}."
    assert told in section("README.md", "Which name?")
    pair = re.compile(r"sinkgd.*embeddings=stateless|embeddings=stateless.*sinkgd", re.DOTALL)
    shown = [(page, title) for page in guides() for title, text in sections(page) if pair.search(text)]
    assert len(shown) >= 5
    silent = [where for where in shown if "README.md#which-name" not in dict(sections(where[0]))[where[1]]]
    assert silent == [("README.md", "Which name?")]
    recipes = [name for name in tracked_files() if name.endswith((".yaml", ".yml"))]
    assert recipes
    assert [name for name in recipes if pair.search(read(name))] == []


def test_swan_with_its_default_ends_below_adamw_at_the_largest_size_as_the_page_says(records):
    """The default with the schedule, against the best of AdamW with it and at a constant rate, on the first seed."""
    ends = {}
    for study in LARGEST:
        rows = quality_report.by_row([r for r in quality_report.of_study(records, study) if r["seed"] == 0])
        rate, *_ = rate_walk.best_rate(rows["adamw"])
        means = rate_walk.best_rate(rows["swan"])[2]
        (default,) = [loss for lr, loss in means.items() if lr == pytest.approx(PRESETS["swan"].lr_scale * rate)]
        baselines = [
            min(r["eval_loss"] for name in (row, f"{row}, constant rate") for r in rows.get(name, ()))
            for row in ("adamw", "adamw, rates apart")
        ]
        assert default < min(baselines)
        ends[study] = [default, *baselines]
    swan, adamw, apart = ([f"{ends[study][i]:.3f}" for study in LARGEST] for i in range(3))
    told = f"`swan` ends at {swan[0]} and {swan[1]} in the two largest studies: below plain AdamW ({adamw[0]} and "
    told += f"{adamw[1]}) and below AdamW with its own rate for matrices ({apart[0]} and {apart[1]}), "
    told += "each with its better schedule."
    assert page_with(told)


def test_the_summary_shows_both_schedules_and_what_is_missing():
    base = {**STUDIES["small"].values(), "seed": 0, "state_bytes": 80, "parameters": 10, "learning_rate": 1e-3}
    runs = [("swan", 2.0), ("swan, constant rate", 1.5), ("adamw", 3.0), ("muon", 2.5)]
    tables = quality_report.tables([{**base, "row": row, "eval_loss": loss} for row, loss in runs])
    schedule, constant = tables[quality_report.SCHEDULE], tables[quality_report.CONSTANT]
    assert schedule.splitlines()[0] == constant.splitlines()[0] == "| Optimizer | small |"
    assert "| AdamW | 3.000 |" in schedule
    assert "| swan | 2.000 |" in schedule
    assert "| AdamW | not run |" in constant
    assert "| swan | 1.500 |" in constant


def test_the_table_of_weight_formats_on_the_page_is_that_of_the_runs():
    records = json.loads((RESULTS / "weight-formats-cpu.json").read_text())["records"]
    assert page_with(weight_formats.table(records))


def test_the_table_of_rounding_feedback_on_the_page_is_that_of_the_runs():
    records = json.loads((RESULTS / "rounding-feedback-cpu.json").read_text())["records"]
    assert page_with(rounding_feedback.table(records))


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    base = {**STUDIES["small"].values(), "seed": 0, "state_bytes": 80, "parameters": 10, "weight_bytes": 40}
    record = {**base, "row": "swan", "learning_rate": 1e-3, "eval_loss": 2.0, "train_losses": [[1, 3.0]], "seconds": 1}
    quality_report.curves([record], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_studies_differ():
    assert len(set(STUDIES.values())) == len(STUDIES)
    assert quality_plan.Study().intermediate % 8 == 0

"""The tables of the fine-tuning benchmark: rates picked on one half of the pairs, losses of the other, fair means."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset

from hf_stateless.trainer.optim_args import parse_options


pytest.importorskip("trl")
pytest.importorskip("peft")

import finetuning
import finetuning_report
import reasoning_pairs


def runs(losses, row="sinkgd", **more):
    """Records of a row: `losses` has (loss to pick by, loss to report) by rate and seed."""
    study = {"data": "words", "tuning": "all", "lora_r": None, "layers": None, "row": row, **more}
    return [
        {**study, "learning_rate": lr, "seed": seed, "pick_loss": pick, "eval_loss": reported}
        for (lr, seed), (pick, reported) in losses.items()
    ]


@pytest.mark.parametrize(
    ("losses", "best", "reported"),
    [
        ({(1, 0): (2.0, 3.0), (2, 0): (2.1, 1.0)}, 1, {0: 3.0}),  # the half that is reported does not pick
        ({(1, 0): (2.0, 3.0), (2, 0): (1.9, 3.1), (2, 1): (2.5, 3.2)}, 2, {0: 3.1, 1: 3.2}),  # most seeds
        ({(1, 0): (1.0, 3.0), (2, 0): (1.9, 3.1), (2, 1): (2.5, 3.2)}, 2, {0: 3.1, 1: 3.2}),  # though lower at 1
    ],
    ids=["halves", "seeds", "lucky seed"],
)
def test_a_rate_is_picked_on_one_half_and_its_loss_is_that_of_the_other(losses, best, reported):
    row = finetuning_report.Row(runs(losses))
    assert (row.best, row.losses) == (best, reported)


def test_differences_are_between_equal_seeds():
    adamw = finetuning_report.Row(runs({(1, 0): (2.0, 2.0), (1, 1): (5.0, 5.0)}))
    sinkgd = finetuning_report.Row(runs({(1, 0): (2.5, 2.5), (2, 0): (2.1, 2.1), (2, 1): (5.1, 5.3), (8, 2): (9, 9)}))
    assert sinkgd.over(adamw) == pytest.approx((0.1 + 0.3) / 2)
    assert sinkgd.over(adamw, 1) == pytest.approx(0.5)  # seed 0 alone, not 2.5 - 3.5
    assert sinkgd.over(sinkgd, 1) == pytest.approx(0.4)
    assert sinkgd.over(adamw, 8) is None
    assert sinkgd.over(adamw, 4) is None


def test_a_table_says_what_was_not_run_and_puts_the_lowest_loss_first():
    adamw = runs({(1e-4, 0): (2.0, 2.0), (2e-4, 0): (2.2, 2.2), (5e-5, 0): (2.1, 2.1)}, row="adamw")
    sinkgd = runs({(2e-4, 0): (1.9, 1.9), (1e-4, 0): (1.95, 2.01)})
    swan = runs({(4e-4, 0): (2.5, 2.5)}, row="swan")
    other = runs({(4e-4, 0): (2.5, 2.5)}, row="adamw", tuning="lora", lora_r=8, layers=6)
    studies = finetuning_report.studies([*adamw, *sinkgd, *swan, *other])
    assert list(studies) == ["words, all", "words, lora of rank 8, last 6 layers"]
    *head, first, second, third = finetuning_report.table(studies["words, all"]).splitlines()
    assert len(head) == 2
    assert first == "| `sinkgd` | 1.900 | 1.900 | -0.100 | 2.0e-04 | +0.110, not run | +0.010 |"
    assert second == "| `adamw` | 2.000 | 2.000 | +0.000 | 1.0e-04 | +0.100, +0.200 | +0.000 |"
    assert third == "| `swan` | 2.500 | 2.500 | +0.500 | 4.0e-04 | not run, not run | not run |"


def test_a_seed_that_is_easy_for_everybody_puts_no_row_first():
    adamw = runs({(1, 0): (2.0, 2.0), (1, 1): (1.0, 1.0)}, row="adamw")
    rows = finetuning_report.studies([*adamw, *runs({(1, 1): (1.2, 1.2)})])["words, all"]
    first, second = finetuning_report.table(rows).splitlines()[2:]
    assert first.startswith("| `adamw` | 1.500 |")
    assert second.startswith("| `sinkgd` | 1.200 | 1.200 | +0.200 |")


@pytest.mark.parametrize("count", [2, 5, 8])
def test_the_two_halves_share_no_pair_and_are_as_long_as_each_other(count, monkeypatch):
    rows = [{"prompt": "p" * n, "completion": "c" * (n % 3)} for n in range(count, 0, -1)]
    monkeypatch.setattr(finetuning, "load_data", lambda *args: Dataset.from_list(rows))
    halves = finetuning.held_out(SimpleNamespace(data=None, test_pairs=count))
    assert sorted(len(row["prompt"]) for half in halves.values() for row in half) == list(range(1, count + 1))
    sizes = {name: [len(row["prompt"] + row["completion"]) for row in half] for name, half in halves.items()}
    assert all(found == sorted(found) for found in sizes.values())
    assert 0 <= len(sizes["pick"]) - len(sizes["report"]) <= 1


OWN_ROWS = [row for row, (optim, _) in finetuning.ROWS.items() if not optim.startswith("adamw")]


@pytest.mark.parametrize("row", OWN_ROWS)
def test_a_row_is_a_name_with_options_that_a_user_may_type(row):
    optim, text = finetuning.ROWS[row]
    given = dict(part.split("=") for part in (text or "").split(",") if part)
    assert row.startswith(optim)
    assert parse_options(optim, given).embeddings == given.get("embeddings", parse_options(optim, {}).embeddings)


class Gym:
    """A task with as many questions as there are numbers, in place of reasoning-gym."""

    def __init__(self, seed, size):
        self.entries = [{"question": f" What is {n} + 1? ", "answer": str(n + 1)} for n in range(size)]

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        return self.entries[index]


@pytest.mark.parametrize(("train", "test"), [(5, 3), (40, 8), (1, 2)])
def test_pairs_of_a_task_are_answered_and_on_one_side_only(train, test, tmp_path, monkeypatch):
    monkeypatch.setattr("reasoning_tasks.make_task", lambda text, seed, size: Gym(seed, size))
    assert reasoning_pairs.write(tmp_path / "sums", "sums", train, test) == {"train": train, "test": test}
    sides = {
        name: [json.loads(line) for line in (tmp_path / "sums" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    assert {name: len(rows) for name, rows in sides.items()} == {"train": train, "test": test}
    for row in (row for rows in sides.values() for row in rows):
        number = int(row["completion"]) - 1
        assert row["prompt"] == f"What is {number} + 1?\n"
    assert not {row["prompt"] for row in sides["train"]} & {row["prompt"] for row in sides["test"]}

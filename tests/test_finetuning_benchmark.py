"""The fine-tuning benchmark: WordNet's format, the walk over learning rates, and the tables on the pages."""

import argparse
import json
import math
from statistics import mean

import pytest
import torch
from documents import ROOT, page_with, section


pytest.importorskip("trl")
pytest.importorskip("peft")

import finetuning
import wordnet_pairs


RESULTS = ROOT / "recipes" / "benchmarks" / "results" / "finetuning-cpu.json"
LICENCE = "  1 This is the licence.  \n"
NOUN = (
    '00001740 03 n 02 small_room 0 cell 1 000 | a room of little size ; "he slept in a cell"; "it was bare"  \n'
    "00001741 03 n 01 Paris 0 000 | the capital and largest city of France  \n"
)
ADJECTIVE = "00001742 00 a 01 able(p) 0 000 | having the means to do something  \n"


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for kind, text in {"noun": NOUN, "verb": "", "adj": ADJECTIVE, "adv": ""}.items():
        (folder / f"data.{kind}").write_text(LICENCE + text, encoding="latin-1")
    return folder


def test_pairs_are_made_of_definitions_examples_and_synonyms(wordnet, tmp_path):
    counts = wordnet_pairs.write(tmp_path / "pairs", wordnet)
    rows = [json.loads(line) for file in (tmp_path / "pairs").iterdir() for line in file.read_text().splitlines()]
    assert sum(counts.values()) == len(rows) == 4  # the proper name is left out
    answers = {row["prompt"]: row["completion"] for row in rows}
    word = next(word for word in ("small room", "cell") if f'Use the noun "{word}" in a sentence.\n' in answers)
    other = {"small room": "cell", "cell": "small room"}[word]
    assert answers[f'Use the noun "{word}" in a sentence.\n'] == "He slept in a cell"
    assert answers[f'What is a synonym of the noun "{word}"?\n'] == other
    assert answers[f'What does the noun "{word}" mean?\n'] == f'As a noun, "{word}" means: a room of little size.'
    assert answers['What does the adjective "able" mean?\n'].startswith('As an adjective, "able" means: having')


@pytest.mark.parametrize("best", [-3, 0, 1, 4])
def test_the_walk_ends_with_a_worse_rate_on_both_sides(best, monkeypatch):
    tried = []

    def loss(row, lr, seed, args):
        tried.append((seed, lr))
        return abs(math.log2(lr) - best)

    monkeypatch.setattr(finetuning, "cached", loss)
    finetuning.sweep("adamw", argparse.Namespace(lr=None, start=1.0, rates=4, repeat=3, seeds=[0, 1]))
    first = {lr for seed, lr in tried if seed == 0}
    assert {2.0 ** (best - 1), 2.0**best, 2.0 ** (best + 1)} <= first
    assert len(first) >= 4
    assert {lr for seed, lr in tried if seed == 1} == {2.0 ** (best - 1), 2.0**best, 2.0 ** (best + 1)}


def test_one_rate_is_run_with_every_seed_and_no_other(monkeypatch):
    tried = []
    monkeypatch.setattr(finetuning, "cached", lambda *run: tried.append(run[:3]))
    finetuning.sweep("sinkgd, int8", argparse.Namespace(lr=0.5, seeds=[0, 2]))
    assert tried == [("sinkgd, int8", 0.5, 0), ("sinkgd, int8", 0.5, 2)]


@pytest.mark.parametrize(("row", "kinds"), [("sinkgd, int8 nearest", {"Int8Weight"}), ("sinkgd, bf16", {"Parameter"})])
def test_the_last_layers_are_trained_as_the_row_stores_them(row, kinds, make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    args = argparse.Namespace(model=tmp_path, tuning="layers", layers=1)
    model = finetuning.load_model(row, args, seed=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"1"}
    assert {type(p).__name__ for name, p in trained.items() if "_proj" in name} == kinds
    assert {p.dtype for p in trained.values()} == {torch.bfloat16}


def test_a_rate_counts_only_when_every_seed_was_run_with_it():
    losses = {(1e-3, 0): 2.0, (1e-3, 1): 3.0, (2e-3, 0): 1.0}
    records = [{"learning_rate": lr, "seed": seed, "eval_loss": loss} for (lr, seed), loss in losses.items()]
    assert finetuning.best_of(records) == (1e-3, [2.0, 3.0], {1e-3: 2.5})


@pytest.mark.parametrize("tuning", ["layers", "lora"])
def test_the_tables_of_the_pages_are_the_results(tuning):
    assert page_with(finetuning.table(of_the_results(), tuning))


def of_the_results(tuning=None, row=None):
    records = json.loads(RESULTS.read_text())["records"]
    return [r for r in records if tuning in (None, r["tuning"]) and row in (None, r["row"])]


def test_the_losses_that_the_readme_tells_are_the_results():
    ends = {
        tuning: [
            f"{mean(finetuning.best_of(of_the_results(tuning, row))[1]):.3f}" for row in ("swan", "sinkgd", "adamw")
        ]
        for tuning in ("layers", "lora")
    }
    swan, sinkgd, adamw = ends["layers"]
    told = f"`swan` ended at {swan}, `sinkgd` at {sinkgd} and AdamW at {adamw}; "
    told += "with LoRA at {}, {} and {}.".format(*ends["lora"])
    assert told in section("README.md", "Is it as good as AdamW?")

"""The fine-tuning benchmark: WordNet's format, the walk over learning rates, and the tables on the pages."""

import argparse
import json
import math
import re

import pytest
import torch
from documents import ROOT, page_with, section

from hf_stateless import PRESETS
from hf_stateless.trainer.optim_args import parse_options


pytest.importorskip("trl")
pytest.importorskip("peft")

import finetuning
import finetuning_report
import wordnet_pairs


RESULTS = ROOT / "recipes" / "benchmarks" / "results"
ALL, SIX = "finetuning-cpu.json", "finetuning-six-layers-cpu.json"
TITLES = {
    (ALL, "wordnet, all"): "SFT, all weights, words",
    (ALL, "reversal, all"): "SFT, all weights, lists",
    (ALL, "wordnet, lora of rank 8"): "SFT, LoRA of rank 8 on all layers",
    (ALL, "wordnet, lora of rank 32"): "SFT, LoRA of rank 32 on all layers",
    (ALL, "reversal, lora of rank 8"): "SFT, LoRA of rank 8 on all layers, lists",
    (ALL, "reversal, lora of rank 32"): "SFT, LoRA of rank 32 on all layers, lists",
    (SIX, "wordnet, layers, last 6 layers"): "SFT, weights of six layers",
    (SIX, "wordnet, lora of rank 8, last 6 layers"): "SFT, LoRA of rank 8 on six layers",
}
TOLD = "What to expect of fine-tuning"
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


def test_rates_that_are_given_are_run_with_every_seed_and_no_others(monkeypatch):
    tried = []
    monkeypatch.setattr(finetuning, "cached", lambda *run: tried.append(run[:3]))
    finetuning.sweep("sinkgd, int8", argparse.Namespace(lr=[0.5, 1.0], seeds=[0, 2]))
    assert tried == [("sinkgd, int8", lr, seed) for seed in (0, 2) for lr in (0.5, 1.0)]


@pytest.mark.parametrize(("row", "kinds"), [("sinkgd, int8 nearest", {"Int8Weight"}), ("sinkgd, bf16", {"Parameter"})])
def test_the_last_layers_are_trained_as_the_row_stores_them(row, kinds, make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    args = argparse.Namespace(model=tmp_path, tuning="layers", layers=1)
    model = finetuning.load_model(row, args, seed=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"1"}
    assert {type(p).__name__ for name, p in trained.items() if "_proj" in name} == kinds
    assert {p.dtype for p in trained.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("file", "study"), TITLES, ids=TITLES.values())
def test_the_tables_of_the_pages_are_the_results(file, study):
    assert finetuning_report.table(of_the_results(file)[study]) in section("recipes/README.md", TOLD)


@pytest.mark.parametrize("file", [ALL, SIX])
def test_every_study_has_a_table(file):
    assert of_the_results(file).keys() == {study for name, study in TITLES if name == file}


def of_the_results(file):
    return finetuning_report.studies(json.loads((RESULTS / file).read_text())["records"])


def written(rate):
    """A learning rate as the pages write it: 0.0016 is 1.6e-3."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def of_the_first_seed(row):
    lora = of_the_results(SIX)["wordnet, lora of rank 8, last 6 layers"][row]
    return {lr: f"{losses[0]:.3f}" for lr, losses in lora.by_rate.items() if 0 in losses}


def at_the_default_scale(rows, name):
    """The rate that gives matrices the same step, with the default `lr_scale`, as the best one of the widest sweep."""
    swept = {row: runs for row, runs in rows.items() if re.fullmatch(rf"{name}, lr_scale=[\d.]+", row)}
    if not swept:
        return "not run"
    row, runs = max(swept.items(), key=lambda item: len(item[1].by_rate))
    return written(runs.best * float(row.partition("=")[2]) / PRESETS[name].lr_scale)


@pytest.mark.parametrize(("file", "study"), TITLES, ids=TITLES.values())
def test_the_best_rates_on_the_page_are_those_of_the_sweeps(file, study):
    rows = of_the_results(file)[study]
    cells = [written(rows["adamw"].best), *(at_the_default_scale(rows, name) for name in ("sinkgd", "swan"))]
    assert page_with(f"| {TITLES[file, study]} | {' | '.join(cells)} |")


def test_the_rate_of_lora_product_on_the_page_is_that_of_the_sweep():
    assert parse_options("swan", {"lora": "product"}).lr_scale_beside == 0.2
    rows = of_the_results(SIX)["wordnet, lora of rank 8, last 6 layers"]
    product, adamw = rows["swan, product, lr_scale=0.2"], rows["adamw"]
    assert page_with(f"| the same with `lora=product` | | not run | {written(product.best)} |")
    assert abs(adamw.over(adamw, 4e-3)) < 0.005


def test_what_the_page_says_of_lora_is_the_first_seed_of_the_sweeps():
    product, adamw = of_the_first_seed("swan, product, lr_scale=0.2"), of_the_first_seed("adamw")
    rows = [
        f"| {written(lr)} | {product.get(lr, 'not run')} | {adamw.get(lr, 'not run')} |"
        for lr in sorted(product.keys() | adamw.keys())
    ]
    page = page_with("\n".join(rows))
    separate = of_the_first_seed("swan, lr_scale=0.2")
    assert max(separate) / min(separate) == max(product) / min(product) == 8
    told = f"it ended between {min(separate.values())} and {max(separate.values())}, "
    assert told + f"`product` between {min(product.values())} and {max(product.values())}." in section(page, "LoRA")


def test_what_the_recipe_of_lora_says_of_its_rate_is_the_first_seed_of_the_sweep():
    recipe = re.sub(r"\n# *", " ", (ROOT / "recipes/smollm2-135m/sft-lora/swan.yaml").read_text())
    rate = float(re.search(r"learning_rate: (\S+)", recipe)[1])
    product = of_the_first_seed("swan, product, lr_scale=0.2")
    once, twice, fourfold = (product[factor * rate] for factor in (1, 2, 4))
    assert f"it ended at {once}; twice and four times this rate ended lower, at {twice} and {fourfold}." in recipe


def test_the_losses_that_the_readme_tells_are_the_results():
    studies = of_the_results(SIX)
    names = ("swan, lr_scale=0.2", "sinkgd, lr_scale=0.2", "adamw")
    layers, lora = ([f"{rows[name].loss:.3f}" for name in names] for rows in studies.values())
    told = "`swan` ended at {}, `sinkgd` at {} and AdamW at {}; ".format(*layers)
    told += "with LoRA at {}, {} and {}.".format(*lora)
    assert told in section("README.md", "Is it as good as AdamW?")

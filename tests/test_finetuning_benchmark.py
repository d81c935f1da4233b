"""The fine-tuning benchmark: WordNet's format, the walk over learning rates, and the tables on the pages."""

import argparse
import json
import math
import re
from statistics import mean

import pytest
import torch
from documents import ROOT, page_with, section

from hf_stateless import PRESETS
from hf_stateless.trainer.optim_args import parse_options


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


def written(rate):
    """A learning rate as the pages write it: 0.0016 is 1.6e-3."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def of_the_first_seed(row, tuning="lora"):
    return {r["learning_rate"]: f"{r['eval_loss']:.3f}" for r in of_the_results(tuning, row) if r["seed"] == 0}


def test_the_best_rates_on_the_page_are_those_of_the_sweeps_in_steps_of_the_default_scale():
    swept = 0.2
    assert all(f"lr_scale={swept}" in finetuning.ROWS[row][1] for row in ("sinkgd", "swan", "swan, product"))
    scales = {"adamw": swept, **{name: PRESETS[name].lr_scale for name in ("sinkgd", "swan")}}
    for title, tuning in {"SFT, weights of six layers": "layers", "SFT, LoRA of rank 8": "lora"}.items():
        best = {row: finetuning.best_of(of_the_results(tuning, row))[0] * swept / scales[row] for row in scales}
        assert page_with(f"| {title} | {' | '.join(map(written, best.values()))} |")
    assert parse_options("swan", {"lora": "product"}).lr_scale_beside == swept
    product = finetuning.best_of(of_the_results("lora", "swan, product"))[0]
    assert page_with(f"| the same with `lora=product` | | not run | {written(product)} |")
    level = finetuning.best_of(of_the_results("lora", "adamw"))[2]
    assert abs(level[4e-3] - level[8e-3]) < 0.005


def test_what_the_page_says_of_lora_is_the_first_seed_of_the_sweeps():
    product, adamw = of_the_first_seed("swan, product"), of_the_first_seed("adamw")
    rows = [
        f"| {written(lr)} | {product.get(lr, 'not run')} | {adamw.get(lr, 'not run')} |"
        for lr in sorted(product.keys() | adamw.keys())
    ]
    page = page_with("\n".join(rows))
    separate = of_the_first_seed("swan")
    assert max(separate) / min(separate) == max(product) / min(product) == 8
    told = f"it ended between {min(separate.values())} and {max(separate.values())}, "
    assert told + f"`product` between {min(product.values())} and {max(product.values())}." in section(page, "LoRA")


def test_a_rate_that_one_seed_was_run_with_is_told_below_the_table_and_in_the_recipe():
    told = section("recipes/README.md", "What to expect of fine-tuning")
    for tuning in ("layers", "lora"):
        for row in {r["row"] for r in of_the_results(tuning)}:
            first = of_the_first_seed(row, tuning)
            best, _, means = finetuning.best_of(of_the_results(tuning, row))
            alone = [lr for lr in (best / 2, best * 2) if lr in first and lr not in means]
            each = " and ".join(f"at {first[lr]} with {written(lr)}" for lr in alone)
            assert not alone or f"`{row}` ended {each}, beside {first[best]} with {written(best)}." in told
    recipe = re.sub(r"\n# *", " ", (ROOT / "recipes/smollm2-135m/sft-lora/swan.yaml").read_text())
    rate = float(re.search(r"learning_rate: (\S+)", recipe)[1])
    once, twice, fourfold = (of_the_first_seed("swan, product")[factor * rate] for factor in (1, 2, 4))
    assert f"it ended at {once}; twice and four times this rate ended lower, at {twice} and {fourfold}." in recipe


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

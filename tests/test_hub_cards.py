"""The committed cards are what the committed JSON files render to, and tell nothing private."""

import json
import re
from pathlib import Path

import pytest
from documents import ROOT, read, tracked_files
from huggingface_hub import ModelCard

from hf_stateless.reports.card.curves import CURVES_FILE
from hf_stateless.reports.card.facts import CARD_FILE, DATA_FILE, CardFacts
from hf_stateless.reports.card.render import render_folder
from hf_stateless.reports.card.table import cards_table
from hf_stateless.reports.measured.schema import PICTURE_FILE, REPORT_FILE, MemoryReport


CARDS = sorted({name.split("/")[1] for name in tracked_files() if re.match(r"hub_cards/[^/]+/", name)})


def test_there_is_a_card_for_each_kind_of_training():
    optimizers = {CardFacts.load(ROOT / "hub_cards" / card).optimizer for card in CARDS}
    assert {"sinkgd", "swan"} <= optimizers


@pytest.mark.parametrize("card", CARDS)
def test_a_card_is_what_its_json_files_render_to(card):
    folder = ROOT / "hub_cards" / card
    pictures = {PICTURE_FILE, CURVES_FILE}
    assert {file.name for file in folder.iterdir()} == {CARD_FILE, DATA_FILE, REPORT_FILE, *pictures}
    assert (folder / CARD_FILE).read_text(encoding="utf-8") == render_folder(folder)


@pytest.mark.parametrize("card", CARDS)
def test_json_files_are_written_as_the_package_writes_them(card, tmp_path):
    folder = ROOT / "hub_cards" / card
    CardFacts.load(folder).save(tmp_path)
    MemoryReport.load(folder).save(tmp_path)
    for name in (DATA_FILE, REPORT_FILE):
        assert (folder / name).read_text(encoding="utf-8") == (tmp_path / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("card", CARDS)
def test_a_card_is_of_a_whole_run_and_adds_up(card):
    report = MemoryReport.load(ROOT / "hub_cards" / card)
    assert report.complete
    counted, left = report.counted, report.residual
    held = counted.weights + counted.gradients + counted.optimizer_state + left.before_training
    assert held + left.activations_and_temporaries == report.measured.peak.max
    assert sum(group.state_bytes for group in report.groups) == counted.optimizer_state
    assert sum(group.parameters for group in report.groups) == report.setup.trainable_parameters


@pytest.mark.parametrize("card", CARDS)
def test_metadata_is_valid_and_nothing_is_left_open(card):
    path = ROOT / "hub_cards" / card / CARD_FILE
    loaded = ModelCard.load(path)
    assert loaded.data.library_name in ("transformers", "peft")
    assert {"hf_stateless", CardFacts.load(path.parent).optimizer.removesuffix("_layerwise")} <= set(loaded.data.tags)
    assert loaded.data.eval_results
    assert "more information needed" not in loaded.text.lower()
    assert loaded.text.count("## Memory report") == 1


@pytest.mark.parametrize("card", CARDS)
def test_a_picture_is_small_and_has_a_text_alternative(card):
    folder = ROOT / "hub_cards" / card
    assert (folder / PICTURE_FILE).stat().st_size < 100_000
    alternative = re.search(rf"!\[(.*)\]\({PICTURE_FILE}\)", read(f"hub_cards/{card}/{CARD_FILE}")).group(1)
    assert "GiB at the peak (measured)" in alternative
    assert "(predicted)" in alternative


@pytest.mark.parametrize("card", CARDS)
def test_nothing_private_is_told(card):
    for file in (ROOT / "hub_cards" / card).iterdir():
        data = file.read_bytes()
        assert not re.search(rb"hf_[A-Za-z0-9]{20,}", data)
        assert not re.search(rb"""["'\s(=](/|[A-Z]:\\)[\w.-]+[/\\]""", data if file.suffix != ".png" else b"")


def test_the_table_is_made_from_the_json_files():
    assert cards_table([ROOT / "hub_cards" / card for card in CARDS]) in read("hub_cards/README.md")


def test_pretraining_has_adamw_beside_it_that_was_measured():
    facts = CardFacts.load(ROOT / "hub_cards" / "llama-10m-pretrain-swan")
    (other,) = facts.beside
    assert (other["optimizer"], other["parameters"], other["data"]) == ("adamw_torch", facts.parameters, facts.data)
    assert other["hyperparameters"]["steps"] == facts.hyperparameters["steps"] > 500
    assert facts.evaluation[0]["value"] < other["evaluation"][0]["value"], "or the page has to say so"


@pytest.mark.parametrize("card", CARDS)
def test_the_readme_says_how_a_card_was_made(card):
    command = json.loads(read(f"hub_cards/{card}/{REPORT_FILE}"))["provenance"]["command"]
    text = read("hub_cards/README.md")
    assert f"({card}/README.md)" in text
    assert command.removeprefix("python ") in text
    assert Path(ROOT, "hub_cards", card, CARD_FILE).is_file()

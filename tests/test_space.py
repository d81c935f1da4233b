"""The page that answers whether a run fits: its figures, what is copied from it, its links and its errors."""

import json
import re
from dataclasses import replace
from urllib.parse import parse_qsl

import pytest
import space_prediction
from documents import read
from space_bars import PARTS, answer, batch_line, error_line
from space_choice import METHODS, Choice
from space_models import write_shallow
from space_prediction import LISTED, config_file, largest_batch, predict, search_batch
from space_recipe import memory_command, recipe, train_command

from hf_stateless.reports.files import GIB
from hf_stateless.reports.predicted import main


RUNS = [
    {},
    {"layerwise": False, "checkpointing": False, "gpu": 80.0},
    {"dtype": "int8", "gpu": 16.0},
    {"lora": 8, "layerwise": False},
    {"gpus": 4, "method": "adamw_bnb_8bit"},
    {"dtype": "fp32", "batch": 3, "method": "galore_adamw"},
]


@pytest.fixture(autouse=True)
def shallow(monkeypatch, tmp_path_factory):
    """Answers about shallow models."""
    folder = write_shallow(tmp_path_factory.mktemp("models"))
    monkeypatch.setattr(space_prediction, "_listed_folder", lambda: folder)


@pytest.mark.parametrize(("model", "run"), list(zip(LISTED, RUNS * 2, strict=True)))
def test_the_page_has_the_numbers_of_the_command(model, run, capsys):
    choice = Choice(model=model, seq=64, **run)
    page = predict(choice)
    assert main([config_file(model), *choice.arguments(), "--json"]) == 0
    command = json.loads(capsys.readouterr().out)
    assert page["estimates"] == command["estimates"]
    assert [row["optimizer"].removesuffix("_layerwise") for row in page["estimates"]] == choice.optimizers()
    html = answer(page, choice)
    for row in command["estimates"]:
        mark = "fits" if choice.gpu in row["fits_gib"] else "does not fit"
        assert f"{row['peak'] / GIB:.2f} GiB, <span" in html
        assert f">{mark}</span>" in html
        assert set(row["at_peak"]) <= set(PARTS)


def test_the_widths_of_a_bar_add_up_to_its_peak_on_the_scale_of_the_card():
    choice = Choice(model="Qwen/Qwen2.5-0.5B", seq=64)
    page = predict(choice)
    html = answer(page, choice)
    line = float(re.search(r'<i style="left:([\d.]+)%"', html)[1])
    usable = 0.9 * choice.gpu - 1
    for row, bar in zip(page["estimates"], html.split('<div class="track">')[1:], strict=True):
        width = sum(map(float, re.findall(r'<b class="\w+" style="width:([\d.]+)%', bar)))
        assert width / line == pytest.approx(row["peak"] / GIB / usable, abs=1e-3)


@pytest.mark.parametrize("model", ["HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-2-7b-hf"])
def test_the_largest_batch_fits_and_one_more_does_not(model):
    choice = Choice(model=model, gpu=8.0, seq=512, method="adamw_torch_fused", checkpointing=False)
    batch = largest_batch(choice)
    fitting = [
        8 in predict(replace(choice, batch=number), None, (choice.method,))["estimates"][0]["fits_gib"]
        for number in (batch, batch + 1)
    ]
    assert fitting == [True, False]


@pytest.mark.parametrize(
    ("peak", "expected"),
    [
        (lambda batch: 10 * batch, 100),
        (lambda batch: max(900, 7 * batch), 142),
        (lambda batch: 500 + batch**2, 22),
        (lambda batch: 1001, 0),
        (lambda batch: 5, 65536),
        (lambda batch: 1000 * batch, 1),
    ],
)
@pytest.mark.parametrize("start", [1, 8, 4096])
def test_the_search_finds_the_last_batch_that_fits_in_few_looks(peak, expected, start):
    looks = []
    found = search_batch(lambda batch: looks.append(batch) or peak(batch), lambda size: size <= 1000, 1000, start)
    assert found == expected
    assert len(looks) == len(set(looks)) < 30


CHOICES = [Choice(), Choice(gpu=141.0, method="sinkgd_polar", layerwise=False), Choice(dtype="int8", lora=3, gpus=2)]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_link_restores_the_choice(choice):
    assert Choice.read(dict(parse_qsl(choice.query()))) == choice


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"batch": "0"}, "batch=0: expected a whole number from 1"),
        ({"seq": "²"}, "seq=²: expected"),
        ({"gpu": "nan"}, "gpu=nan: expected one of 8, 12"),
        ({"method": "<b>"}, "method=<b>: expected one of"),
        ({"model": ""}, "model=nothing: expected the id"),
        ({"layerwise": "yes"}, "layerwise=yes: expected 1 or 0"),
        ({"lora": None}, "lora=nothing: expected"),
        ({"gpus": "9" * 5000}, "gpus=999"),
    ],
)
def test_a_value_that_is_none_is_one_line(query, said):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        Choice.read(query)
    assert len(str(caught.value)) < 200
    assert "<b>" not in error_line(caught.value)


@pytest.mark.parametrize(
    "text", ["no json", "{}", "[]", '{"model_type": "nothing"}', '{"model_type": "llama", "hidden_size": -4}']
)
def test_an_uploaded_file_that_is_no_model_is_one_line_without_a_path(text, tmp_path):
    path = tmp_path / f"{'long' * 50}.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r".") as caught:
        predict(Choice(), str(path))
    assert "\n" not in str(caught.value)
    assert "uploaded config.json" in str(caught.value) or "of this config" in str(caught.value)
    assert str(space_prediction._listed_folder()) not in str(caught.value)


@pytest.mark.parametrize(
    "model", ["/etc", "recipes/configs", "../x/y", "a b", "a/b/c", "~/x", "C:\\x", "no-one/no-such-model"]
)
def test_a_name_that_is_no_model_is_one_line_and_never_a_folder(model):
    with pytest.raises(ValueError, match=r"is no id of a model|can be read from the Hub") as caught:
        predict(Choice(model=model))
    assert "\n" not in str(caught.value)


def test_methods_that_cannot_train_8_bits_are_refused_and_left_out():
    with pytest.raises(ValueError, match="cannot train 8-bit weights"):
        predict(Choice(dtype="int8", method="adamw_torch_fused"))
    assert Choice(dtype="int8").optimizers() == ["swan", "sinkgd", "sinkgd_polar"]


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_copied_names_the_run(choice):
    assert memory_command(choice).startswith(f"hf-stateless memory {choice.model} --optim ")
    assert f"optim: {choice.optim()}\n" in recipe(choice)
    assert f"per_device_train_batch_size: {choice.batch}\n" in recipe(choice)
    assert ("fsdp2.yaml" in train_command(choice)) == (choice.gpus > 1)
    known = {line.split(":")[0] for name in ("llama-7b/sft-int8/sinkgd", "smollm2-135m/sft-lora/swan")
             for line in read(f"recipes/{name}.yaml").splitlines()}  # fmt: skip
    keys = {line.split(":")[0] for line in recipe(choice).splitlines()}
    assert keys <= known | {"packing", "optim_target_modules"}


def test_the_sentence_about_the_batch():
    assert "Not even one sequence" in batch_line(Choice(), 0)
    assert "7 x 2,048 tokens" in batch_line(Choice(), 7)
    assert "each of 4 cards" in batch_line(Choice(gpus=4), 7)


def test_what_a_space_installs_is_what_the_package_needs():
    needed = set(
        re.findall(r'^    "([a-z_0-9]+>=[\d.]+)",$', read("pyproject.toml").split("[project.optional")[0], re.M)
    )
    assert needed <= set(read("recipes/space/requirements.txt").split())
    assert "sdk: gradio" in read("recipes/space/README.md").split("---")[1]
    assert len(LISTED) == 12
    assert len(METHODS) == 6

"""`hf-stateless memory`: its JSON, table, picture and errors."""

import json
import re
import sys
import time

import pytest
from documents import read
from memory_models import LLAMA_7B, small_llama
from transformers import TrainingArguments

from hf_stateless.reports.files import GIB
from hf_stateless.reports.measured.build import COMPARED
from hf_stateless.reports.predicted import Settings, main
from hf_stateless.reports.predicted.table import GPUS, SCHEMA_VERSION, Estimate, as_json, as_table


@pytest.fixture
def config_file(tmp_path):
    """A folder with the config of the small model."""
    folder = tmp_path / "secret-user" / "small"
    small_llama(max_position_embeddings=128).save_pretrained(folder)
    return folder / "config.json"


def test_the_json_has_a_version_and_every_number_its_origin(config_file, capsys):
    assert main([str(config_file.parent), "--json", "--optim", "sinkgd,adamw_torch", "--gpus", "24,1e-3"]) == 0
    text = capsys.readouterr().out
    report = json.loads(text)
    assert (report["schema"], report["version"]) == ("hf_stateless.memory_estimate", SCHEMA_VERSION)
    assert report["unit"] == "bytes"
    assert report["model"] == "small"
    assert "secret-user" not in text
    assert report["settings"]["seq"] == 128
    assert set(report["versions"]) == {"python", "hf_stateless", "torch", "transformers"}
    assert [row["optimizer"] for row in report["estimates"]] == ["sinkgd", "adamw_torch"]
    for row in report["estimates"]:
        assert set(row["origin"].values()) <= {"counted", "predicted"}
        assert all(isinstance(row[key], int) for key in row["origin"])
        assert row["fits_gib"] == [24]
        assert sum(row["at_peak"].values()) == row["peak"]


def test_a_file_and_its_folder_are_the_same_model(config_file, capsys):
    outputs = []
    for source in (config_file, config_file.parent):
        assert main([str(source)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_the_table_shows_each_optimizer_with_its_numbers_and_gpus():
    sizes = {"weights": 12, "gradients": 11, "optimizer_state": 3, "activations": 2, "temporary": 1, "gathered": 0}
    rows = [
        Estimate("sinkgd", **{k: v * GIB for k, v in sizes.items()}, peak=30 * GIB, moment="step"),
        Estimate("adamw_torch", **{k: v * GIB for k, v in sizes.items()}, peak=999 * GIB, moment="step"),
    ]
    facts = {"model": "m", "model_class": "C", "has_tokens": True, "parameters": 5, "trained_parameters": 4}
    table = as_table(as_json({**facts, "notes": ["A note."]}, Settings(), rows, sorted(GPUS)))
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    assert re.split(r" {2,}", lines["sinkgd"])[1:7] == ["12.00", "11.00", "3.00", "2.00", "1.00", "30.00"]
    assert "40 GiB and up" in lines["sinkgd"]
    assert GPUS[40] in lines["sinkgd"]
    assert "more than 141 GiB" in lines["adamw_torch"]
    assert {"counted", "predicted"} <= set(table.split())
    assert "gathered" not in table
    assert table.endswith("A note.")


def test_the_plot_is_a_picture(config_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "memory.png"
    assert main([str(config_file), "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "sinkgd" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder/at/all"], "expected a folder with a config.json"),
        (["CONFIG", "--optim", "sinkgd,adam"], "Unknown optimizer 'adam'. Known: swan, sinkgd"),
        (["CONFIG", "--optim", ""], "Unknown optimizer ''"),
        (["CONFIG", "--gpus", "24,big"], "--gpus '24,big': expected sizes in GiB"),
        (["CONFIG", "--gpus", "-1"], "expected sizes in GiB"),
        (["CONFIG", "--dtype", "int8", "--optim", "adamw_torch"], "adamw_torch cannot train 8-bit weights"),
        (["CONFIG", "--dtype", "fp8"], "expected bf16 or fp32 or int8"),
        (["CONFIG", "--batch", "0"], "expected an integer of at least 1, got '0'"),
        (["CONFIG", "--seq", "129"], "type --seq 128"),
        (["CONFIG", "--optim-args", "num_iterations"], "expected key=value"),
        (["CONFIG", "--optim-args", "num_iteration=3"], "Did you mean 'num_iterations'?"),
        (["CONFIG", "--optim", "sgd", "--optim-args", "num_iterations=3"], "does not change its memory"),
        (["CONFIG", "--optim", "galore_adamw", "--optim-args", "rank=x"], "rank='x' is no integer"),
        (["CONFIG", "--plot", "no/such/folder/memory.png"], "cannot be written: No such file or directory\n"),
        (["CONFIG", "--colour"], "unrecognized arguments: --colour"),
        ([], "required: MODEL"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, config_file, capsys):
    arguments = [str(config_file) if argument == "CONFIG" else argument for argument in arguments]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid|not a valid|not valid"),
        ("{}", "model_type"),
        ('{"model_type": "wav2vec2"}', "cannot be built|takes"),
    ],
)
def test_a_config_that_is_none_gets_one_line(content, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_a_picture_without_matplotlib_says_what_to_install(config_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(config_file), "--plot", "memory.png"]) == 2
    assert 'pip install "hf_stateless[plot]"' in capsys.readouterr().err


LAYERWISE, PLAIN = ["sinkgd_layerwise", "swan_layerwise"], ["sinkgd", "swan"]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", [*LAYERWISE, *PLAIN, "adamw_bnb_8bit", "adamw_torch_fused"]),
        ("--layerwise", [*LAYERWISE, "adamw_bnb_8bit", "adamw_torch_fused"]),
        ("--dtype int8", [*LAYERWISE, *PLAIN]),
        ("--zero 2 --ranks 8", [*PLAIN, "adamw_torch_fused"]),
        ("--optim-args release=all", [*LAYERWISE, "adamw_bnb_8bit", "adamw_torch_fused"]),
        ("--optim-args min_signal=0.1", [*PLAIN, "adamw_bnb_8bit", "adamw_torch_fused"]),
        ("--optim-args ns_dtype=float32", ["swan_layerwise", "swan", "adamw_bnb_8bit", "adamw_torch_fused"]),
    ],
)
def test_without_optim_the_usual_names_are_shown_that_go_with_the_other_flags(flags, names, config_file, capsys):
    assert main([str(config_file), "--json", *flags.split()]) == 0
    assert [row["optimizer"] for row in json.loads(capsys.readouterr().out)["estimates"]] == names


def test_what_was_typed_is_not_left_out(config_file, capsys):
    assert main([str(config_file), "--layerwise", "--zero", "2", "--ranks", "8"]) == 2
    assert "leave out --layerwise" in capsys.readouterr().err


def test_layerwise_is_applied_to_ours_only(config_file, capsys):
    assert main([str(config_file), "--layerwise", "--json", "--optim", "sinkgd,sgd,sinkgd_layerwise"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["optimizer"] for row in report["estimates"]] == ["sinkgd_layerwise", "sgd"]
    assert [row["origin"]["gradients"] for row in report["estimates"]] == ["predicted", "counted"]


@pytest.mark.parametrize("flags", [[], ["--checkpointing", "--layerwise"], ["--fsdp", "4"], ["--device", "cpu"]])
def test_adamw_is_the_default_of_transformers_and_the_other_one_takes_more(flags, config_file, tmp_path, capsys):
    assert main([str(config_file), "--json", *flags]) == 0
    default = {row["optimizer"]: row for row in json.loads(capsys.readouterr().out)["estimates"]}
    fused = TrainingArguments(str(tmp_path)).optim
    assert list(default)[-2:] == ["adamw_bnb_8bit", fused] == list(reversed(COMPARED))
    assert main([str(config_file), "--json", "--optim", "adamw_torch", *flags]) == 0
    (foreach,) = json.loads(capsys.readouterr().out)["estimates"]
    same = ("weights", "gradients", "optimizer_state", "activations", "gathered")
    assert [foreach[part] for part in same] == [default[fused][part] for part in same]
    assert default[fused]["temporary"] == 0 < foreach["temporary"]
    if "cpu" not in flags:
        assert foreach["temporary"] == foreach["gradients"]
        assert foreach["peak"] >= default[fused]["peak"]


def test_the_table_on_the_page_is_what_is_predicted(tmp_path, capsys):
    page = read("hf_stateless/reports/README.md")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    names = ["adamw_bnb_8bit", "adamw_torch_fused", "adamw_torch"]
    assert main([str(tmp_path), "--json", "--checkpointing", "--optim", ",".join(names)]) == 0
    *rows, foreach = json.loads(capsys.readouterr().out)["estimates"]
    keys = ("weights", "gradients", "optimizer_state", "activations", "temporary", "peak")
    for row in rows:
        told = re.search(rf"^{row['optimizer']} +([\d. ]+) ", page, re.MULTILINE)[1].split()[:6]
        assert [float(size) for size in told] == pytest.approx([row[key] / GIB for key in keys], rel=0.02, abs=0.005)
    told = re.search(r"one more copy of the weights as a temporary on a GPU: ([\d.]+) GiB here", page)[1]
    assert float(told) == pytest.approx(foreach["peak"] / GIB, rel=0.02)


@pytest.mark.parametrize("options", [[], ["--checkpointing", "--layerwise"], ["--lora", "16"], ["--fsdp", "8"]])
def test_a_7b_config_takes_less_than_30_seconds_of_processor_time(options, tmp_path, capsys):
    if "--lora" in options:
        pytest.importorskip("peft")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    start = time.process_time()
    assert main([str(tmp_path), "--json", *options]) == 0
    assert time.process_time() - start < 30
    report = json.loads(capsys.readouterr().out)
    # The 6.74 billion parameters of LLaMA-7B.
    assert report["parameters"] == pytest.approx(6.74e9, rel=0.01)

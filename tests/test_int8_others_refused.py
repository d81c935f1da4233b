"""Folders in the layout of `compressed-tensors` that cannot be trained on: refused in one line, by exports too."""

import copy
import re

import pytest
import torch
from conftest import TINY_MODELS
from int8_folders import load_int8_folder
from safetensors.torch import load_file, save_file
from test_int8_from_others import WEIGHTS, change_config, round_to_nearest, small, write
from transformers import AutoModelForCausalLM

from hf_stateless import Int8TrainingConfig, quantize
from hf_stateless.run.command import main
from hf_stateless.weights.int8.packed import pack


def weights_of(**changes):
    return lambda c: {**c, "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**WEIGHTS, **changes}}}}


def group_of(**changes):
    group = {"targets": ["Linear"], "weights": WEIGHTS, **changes}
    return lambda c: {**c, "config_groups": {"group_0": group}}


def with_values(**changes):
    return lambda c: {**c, **changes}


REFUSED = {
    "asymmetric": (weights_of(symmetric=False), "symmetric is False"),
    "4 bits": (weights_of(num_bits=4), "weights is 4 bits, int"),
    "fp8": (weights_of(type="float"), "weights is 8 bits, float"),
    "one scale": (weights_of(strategy="tensor", group_size=None), "strategy is tensor"),
    "no strategy": (weights_of(strategy=None, group_size=None), "strategy is tensor"),
    "blocks": (weights_of(strategy="block", group_size=None, block_structure=[128, 128]), "strategy is block"),
    "no group": (weights_of(group_size=0), "strategy is group, group_size 0"),
    "a group in words": (weights_of(group_size="64"), "group_size 64"),
    "groups of 48": (weights_of(group_size=48), "no whole number of groups of 48"),
    "dynamic": (weights_of(dynamic=True), "dynamic is True"),
    "reordered": (weights_of(actorder="group"), "actorder is group"),
    "reordered, too": (weights_of(actorder=True), "actorder is True"),
    "activations": (group_of(input_activations={"num_bits": 8, "dynamic": True}), "input_activations is quantised"),
    "outputs": (group_of(output_activations={"num_bits": 8}), "output_activations is quantised"),
    "no weights": (group_of(weights=None), "config_groups is no weights"),
    "weights as text": (group_of(weights="int8"), "weights is int8"),
    "no targets": (group_of(targets=[]), r"targets is \[\]"),
    "targets as text": (group_of(targets="Linear"), "targets is Linear"),
    "other targets": (group_of(targets=["Conv2d"]), "none of its targets is a linear layer"),
    "no expression": (group_of(targets=["re:(("]), r"re:\(\( is no regular expression"),
    "embeddings": (group_of(targets=["Linear", "Embedding"]), "embed_tokens is an embedding"),
    "a group's format": (group_of(format="float-quantized"), "format is float-quantized"),
    "a cache": (with_values(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is"),
    "rotations": (with_values(transform_config={"config_groups": {"u": {}}}), "transform_config is"),
    "sparsity": (with_values(sparsity_config={"format": "sparse-24"}), "sparsity_config is"),
    "calibrated only": (with_values(quantization_status="frozen"), "quantization_status is frozen"),
    "no status": (with_values(quantization_status=None), "quantization_status is None"),
    "floats": (with_values(format="float-quantized"), "format is float-quantized"),
    "nvfp4": (with_values(format="nvfp4-pack-quantized"), "format is nvfp4-pack-quantized"),
    "several formats": (with_values(format="mixed-precision"), "format is mixed-precision"),
    "no groups": (with_values(config_groups={}), r"config_groups is \{\}"),
    "groups as a list": (with_values(config_groups=[1]), r"config_groups is \[1\]"),
    "a preset": (with_values(config_groups={"W8A16": ["Linear"]}), "W8A16 is"),
    "ignore as text": (with_values(ignore="lm_head"), "ignore is lm_head"),
    "ignored layers": (
        with_values(ignore=["re:.*q_proj"]),
        "q_proj is stored in 8 bits, but config.json",
    ),
    "other groups": (weights_of(group_size=32), "do not fit group_size=32"),
    "whole rows": (weights_of(group_size=None, strategy="channel"), "do not fit group_size=None"),
    "not packed": (with_values(format="int-quantized"), "has codes of I32"),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs") / "model"
    write(small(), folder)
    return folder


@pytest.fixture
def changed(theirs):
    """The folder, whose config is put back afterwards."""
    before = (theirs / "config.json").read_text()
    yield theirs
    (theirs / "config.json").write_text(before)


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_on_is_refused_in_one_line(change, message, changed, tmp_path, capfd):
    change_config(changed, lambda stored: change(copy.deepcopy(stored)))
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        load_int8_folder(changed)
    assert re.search(message, str(error.value))
    capfd.readouterr()
    assert main(["export", str(changed), str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert said.startswith("hf-stateless export: ")
    assert said.count("\n") == 1
    assert re.search(message, said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("zero points", {"weight_zero_point": torch.zeros(128, 2, dtype=torch.int32)}, "weight_zero_point is there"),
        ("an order", {"weight_g_idx": torch.zeros(128, dtype=torch.int32)}, "weight_g_idx is there"),
        ("no shape", {"weight_shape": None}, "weight_shape is missing"),
        ("another shape", {"weight_shape": torch.tensor([128, 127])}, r"weight_shape is \[128, 127\]"),
        ("no scales", {"weight_scale": None}, "without their scales"),
        ("no codes", {"weight_packed": None}, "is missing beside its scales"),
        ("fewer rows", {"weight_packed": torch.zeros(64, 32, dtype=torch.int32)}, "is stored as"),
        ("turned", {"weight_packed": torch.zeros(32, 128, dtype=torch.int32)}, "do not fit"),
        ("floats", {"weight_packed": torch.zeros(128, 32)}, "codes of F32"),
        ("scales of ints", {"weight_scale": torch.ones(128, 2, dtype=torch.int32)}, "scales of I32"),
        ("a scale a row", {"weight_scale": torch.ones(128, 1)}, "do not fit group_size=64"),
        ("nan", {"weight_scale": torch.full((128, 2), float("nan"))}, "a scale is NaN"),
        ("negative", {"weight_scale": torch.full((128, 2), -1.0)}, "or negative"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(kind, change, message, tmp_path):
    write(small(), tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    weights = load_file(file)
    for name, tensor in change.items():
        key = f"model.layers.0.self_attn.q_proj.{name}"
        if tensor is None:
            del weights[key]
        else:
            weights[key] = tensor
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        load_int8_folder(tmp_path / "theirs")
    assert re.search(message, str(error.value))


def test_experts_that_are_packed_one_by_one_are_refused(tmp_path):
    model = TINY_MODELS["qwen3_moe"]().to(torch.bfloat16)
    quantize(model, Int8TrainingConfig(16, modules_to_not_convert=["experts"])).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if ".experts." in name)
    codes, scale = round_to_nearest(weights.pop(name), 8, torch.bfloat16)
    weights |= {f"{name}_packed": pack(codes), f"{name}_scale": scale, f"{name}_shape": torch.tensor(codes.shape)}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"experts[^\n]* is stored in 8 bits, and [^\n]*stacks of experts"):
        load_int8_folder(tmp_path)


@pytest.mark.parametrize("method", ["bitsandbytes_8bit", "gptq", "fp8"])
def test_other_methods_are_refused_by_transformers(method, tmp_path):
    small().save_pretrained(tmp_path)
    stored = {"bitsandbytes_8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    stored |= {"gptq": {"quant_method": "gptq", "bits": 8}, "fp8": {"quant_method": "fp8"}}
    change_config(tmp_path, lambda _: stored[method])
    with pytest.raises(ValueError, match="but you are passing a Int8TrainingConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Int8TrainingConfig())

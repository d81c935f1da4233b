"""Exports of 8-bit models: the same weights in a folder that other programs load, whole or not there."""

import json
import os

import pytest
import torch
from conftest import tiny_inputs
from int8_folders import load_int8_folder
from push_worker import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_stateless
from hf_stateless import Int8TrainingConfig, dequantize, export_model, quantize
from hf_stateless.run.command import main


@pytest.fixture
def int8(make_model, tmp_path):
    """The folder of a tiny 8-bit model with a tokenizer, a chat template and a generation config."""
    model = quantize(make_model("llama").to(torch.bfloat16), Int8TrainingConfig(16))
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(tmp_path / "int8")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model(**tiny_inputs("llama")).logits.float()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_bf16_export_is_the_dequantised_model(int8, tmp_path, capsys):
    assert main(["export", str(int8), str(tmp_path / "out" / "plain")]) == 0
    out = tmp_path / "out" / "plain"
    expected, actual = dequantize(load_int8_folder(int8)).state_dict(), load(out).state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], t) and actual[name].dtype == t.dtype for name, t in expected.items())
    assert "quantization_config" not in config_of(out)
    assert config_of(out)["architectures"] == ["LlamaForCausalLM"]  # by which convert_hf_to_gguf.py knows the model
    assert "convert_hf_to_gguf.py" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plain"]


@pytest.mark.parametrize("format", ["bf16", "bitsandbytes"])
def test_tokenizer_template_and_generation_config_come_along(format, int8, tmp_path):
    if format == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    out = export_model(int8, tmp_path / "out", format)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (int8 / name).read_bytes()
    assert AutoTokenizer.from_pretrained(out)("w1 w2").input_ids == [5, 6]
    assert GenerationConfig.from_pretrained(out).max_new_tokens == 7
    assert not any("scale" in name for name in load(out).state_dict())


def test_a_bitsandbytes_export_has_8_bit_layers_and_nearly_the_same_output(int8, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    out = export_model(int8, tmp_path / "out", "bitsandbytes")
    assert config_of(out)["quantization_config"]["load_in_8bit"] is True
    model, ours = load(out), load_int8_folder(int8)
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear8bitLt)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    expected = logits(ours)
    assert (logits(model) - expected).norm() < 0.03 * expected.norm()
    assert torch.equal(logits(model), logits(load(out)))


def test_a_model_in_memory_is_exported_and_stays_trainable(make_model, tmp_path):
    model = quantize(make_model("llama"), Int8TrainingConfig(16))
    optimizer = hf_stateless.create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    (tmp_path / "out").mkdir()
    export_model(model, tmp_path / "out", "bf16")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model(**tiny_inputs("llama")).loss.backward()
    optimizer.step()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.state_dict()[name], before[name])
    assert load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["t5", "bert"])
def test_a_folder_loads_as_the_class_it_was_saved_as(architecture, make_model, tmp_path):
    model = quantize(make_model(architecture), Int8TrainingConfig(None))
    model.save_pretrained(tmp_path / "int8")
    out = export_model(tmp_path / "int8", tmp_path / "out", "bf16")
    assert set(type(model).from_pretrained(out).state_dict()) == {
        name for name in model.state_dict() if not name.endswith("weight_scale")
    }


def test_a_failed_export_leaves_nothing(int8, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fail)
    assert main(["export", str(int8), str(tmp_path / "out")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8"]


def _plain(int8, tmp_path):
    dequantize(load_int8_folder(int8)).save_pretrained(tmp_path / "plain")
    return [tmp_path / "plain", tmp_path / "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda int8, tmp: [int8, int8], "is there already"),
        (lambda int8, tmp: [int8, int8 / "config.json"], "is there already"),
        (lambda int8, tmp: ["no/such/model", tmp / "out"], "no/such/model: no such folder"),
        (lambda int8, tmp: [os.path.dirname(int8), tmp / "out"], "no config.json"),
        (_plain, "it needs no export"),
        (lambda int8, tmp: [int8, tmp / "out", "--format", "gguf"], "type hf-stateless export --help"),
        (lambda int8, tmp: [int8], "type hf-stateless export --help"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(arguments, message, int8, tmp_path, capsys):
    command = [*map(str, arguments(int8, tmp_path))]
    capsys.readouterr()
    assert main(["export", *command]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-stateless export: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config",
    [
        *("null", "", "{", "5", "[]", '"llama"', "[" * 100_000, '{"model_type": ["llama"]}', '{"model_type": null}'),
        *('{"model_type": "llama", "hidden_size": null}', '{"model_type": "llama", "quantization_config": 5}'),
    ],
    ids=lambda config: config[:40],
)
def test_a_config_that_is_none_gets_one_line(config, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(config)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hf-stateless export: {tmp_path / 'model'}: ")
    assert error.count("\n") == 1
    assert len(error) < 500
    assert not (tmp_path / "out").exists()


def test_a_missing_bitsandbytes_and_an_unknown_format_are_told(int8, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_stateless.weights.int8.export.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        export_model(int8, tmp_path / "out", "bitsandbytes")
    with pytest.raises(ValueError, match="A GGUF file is made from bf16"):
        export_model(int8, tmp_path / "out", "gguf-ready")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dequantised_peft_model_merges_its_adapters(dtype, make_model):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(quantize(make_model("llama").to(dtype)), lora).eval()
    expected = logits(adapted)
    merged = dequantize(adapted, torch.float32).merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)

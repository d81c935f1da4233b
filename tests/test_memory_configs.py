"""`hf-stateless memory` on the configs of others: kinds of models, images beside text, and files that lead nowhere."""

import contextlib
import json
import threading
import time

import pytest

from hf_stateless.reports.predicted import limits, main


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
WRONG = [None, "64", -1, 0, 1.5, [64], {}, 10**9, 10**18, 10**30, float("nan")]
HOSTILE = {
    **{f"{key}={value!r}": {key: value} for key in (*SIZES, "vocab_size") for value in WRONG},
    **{f"architectures={names!r}": {"architectures": names} for names in (5, [5], {"a": 1}, ["Trainer"], ["utils"])},
    **{f"model_type={name!r}": {"model_type": name} for name in (None, 5, ["llama"], "no_such", "a\nb\x1b[31m")},
    "model_type of 10000 characters": {"model_type": "x" * 10_000},
    "remote code": {"model_type": "mine", "auto_map": {"AutoConfig": "config.Mine"}},
    "auto_map": {"auto_map": 5},
    "rope": {"rope_parameters": {"rope_type": "no_such", "rope_theta": 1e4}},
    "activation": {"hidden_act": "no_such"},
    "dtype": {"dtype": "no_such"},
    "quantization": {"quantization_config": 5},
    "padding": {"pad_token_id": 10**9},
    "classes": {"num_labels": 10**12},
    "head_dim": {"head_dim": 0},
    "layer_types": {"layer_types": ["no_such"]},
    "text in text": {"model_type": "llava", "text_config": {**LLAMA, "num_hidden_layers": 10**9}},
}
FILES = [b"", b"{", b"\0\xff\xfe", b"[1, 2]", b"null", b"5", b'"llama"', b'{"a":' * 100_000, b"[" * 100_000]


def answer(content, folder, capsys, *flags):
    """Status, output and errors; errors are one short line that a terminal shows as it is, and say nothing else."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "config.json").write_bytes(data)
    capsys.readouterr()
    status = main([str(folder), "--optim", "sinkgd,adamw_torch", *flags])
    captured = capsys.readouterr()
    if status:
        assert (status, captured.out, captured.err.count("\n")) == (2, "", 1)
        assert captured.err.strip().isprintable()
        assert len(captured.err) < 700
    return status, captured.out, captured.err


@pytest.mark.parametrize("change", HOSTILE.values(), ids=[ascii(name)[:60] for name in HOSTILE])
def test_hostile_configs_get_one_line_in_no_time(change, tmp_path, capsys):
    start = time.process_time()
    status, _, error = answer({**LLAMA, **change}, tmp_path, capsys, "--seq", "16")
    assert time.process_time() - start < 10
    assert status == 0 or error.startswith("hf-stateless memory: ")


@pytest.mark.parametrize("content", FILES, ids=lambda content: ascii(content[:8]))
def test_files_that_are_no_config_get_one_line(content, tmp_path, capsys):
    assert "expected a folder with a config.json" in answer(content, tmp_path, capsys)[2]


def test_a_config_that_may_not_be_read_gets_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", refuse)
    assert "Permission denied" in answer(LLAMA, tmp_path, capsys)[2]


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "encoder_layers", "depth", "num_blocks"])
def test_a_billion_layers_are_refused_whatever_they_are_called(key):
    with pytest.raises(ValueError, match=f"{key}' is 1000000000, expected at most 2,000"):
        limits.check_config({"text_config": {key: 10**9}})
    limits.check_config({key: 126, "layer_norm_eps": 1, "rope_theta": 10**9, "block_size": 4096})


def _loop():
    while True:
        pass


def _hoard():
    held = []
    while True:
        held.append(bytes(10**6))


def _swallow():
    while True:
        with contextlib.suppress(Exception):
            _loop()


@pytest.mark.parametrize("run", [_loop, _hoard, _swallow])
def test_what_runs_without_end_is_ended(run, monkeypatch):
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.5)
    monkeypatch.setattr(limits, "MOST_BYTES", 100 << 20)
    with pytest.raises(ValueError, match=r"^stopped after .* seconds and .* GiB"), limits.bounded():
        run()
    with limits.bounded():
        pass
    assert threading.active_count() < 20


# ---- Kinds of models


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 96, "model_type": "t5"}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
TEXT = {**LLAMA, "num_hidden_layers": 1}
BERT = {**{key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"}, "model_type": "bert"}
EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
EYES |= {"image_size": 16, "patch_size": 8}
WHISPER = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
WHISPER |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 96, "pad_token_id": 0}
WHISPER |= {"max_source_positions": 32, "max_target_positions": 24, "model_type": "whisper"}
CLIP = {"model_type": "clip", "projection_dim": 16, "text_config": TEXT | {"model_type": "clip_text_model"}}
CLIP |= {"vision_config": EYES}
MAMBA = {"model_type": "mamba", "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 96}
KINDS = {
    "T5": (T5, ["T5ForConditionalGeneration"], "T5ForConditionalGeneration"),
    "T5 of old": (T5, ["T5WithLMHeadModel"], "T5ForConditionalGeneration"),
    "T5 unnamed": (T5, None, "T5ForConditionalGeneration"),
    "T5 encoder": (T5, ["T5EncoderModel"], "T5EncoderModel"),
    "T5 without a head": (T5, ["T5Model"], "T5Model"),
    "CLIP": (CLIP, ["CLIPModel"], "CLIPModel"),
    "CLIP unnamed": (CLIP, None, "CLIPModel"),
    "Whisper": (WHISPER, ["WhisperForConditionalGeneration"], "WhisperForConditionalGeneration"),
    "Whisper unnamed": (WHISPER, None, "WhisperForConditionalGeneration"),
    "ViT": ({**EYES, "model_type": "vit"}, ["ViTForImageClassification"], "ViTForImageClassification"),
    "ViT without a head": ({**EYES, "model_type": "vit"}, ["ViTModel"], "ViTModel"),
    "BERT": (BERT, ["BertForMaskedLM"], "BertForMaskedLM"),
    "BERT of classes": (BERT, ["BertForSequenceClassification"], "BertForSequenceClassification"),
    "BERT of token classes": (BERT, ["BertForTokenClassification"], "BertForTokenClassification"),
    "BERT without a head": (BERT, ["BertModel"], "BertModel"),
    "Mamba": (MAMBA, ["MambaForCausalLM"], "MambaForCausalLM"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_models_of_every_kind_are_predicted(name, tmp_path, capsys):
    config, architectures, model_class = KINDS[name]
    status, out, error = answer({**config, "architectures": architectures}, tmp_path, capsys, "--json", "--seq", "16")
    assert status == 0, error
    report = json.loads(out)
    assert report["model_class"] == model_class
    assert all(row["activations"] > 0 for row in report["estimates"])
    assert any("no loss of its own" in note for note in report["notes"]) == model_class.endswith(("Model",)) - (
        model_class == "CLIPModel"
    )


QWEN_EYES = {"depth": 1, "hidden_size": 64, "out_hidden_size": 64, "num_heads": 4, "intermediate_size": 48}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
VISION = {
    "llava": ("LlavaForConditionalGeneration", {**EYES, "model_type": "clip_vision_model"}, TEXT),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", QWEN_EYES, TEXT | ROPE | {"model_type": "qwen2_5_vl_text"}),
    "internvl": ("InternVLForConditionalGeneration", EYES | {"image_size": [16, 16], "patch_size": [8, 8]}, TEXT),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", VISION)
def test_the_layers_that_look_at_an_image_are_counted(kind, tmp_path, capsys):
    architecture, eyes, text = VISION[kind]
    depth = "depth" if "depth" in eyes else "num_hidden_layers"
    held = []
    for layers in (2, 6):
        config = {"model_type": kind, "architectures": [architecture], "text_config": text}
        config["vision_config"] = {**eyes, depth: layers}
        status, out, error = answer(config, tmp_path, capsys, "--json", "--seq", "16")
        assert status == 0, error
        report = json.loads(out)
        held.append(report["estimates"][0]["activations"])
        assert any("with one image of" in note for note in report["notes"])
    assert held[1] > 1.1 * held[0]


@pytest.mark.filterwarnings("ignore")
def test_images_that_cannot_be_traced_are_said_to_be_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_stateless.reports.predicted.batch._forms_of_image", lambda *_: iter(()))
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": TEXT}
    config["vision_config"] = VISION["llava"][1]
    status, out, error = answer(config, tmp_path, capsys, "--seq", "16")
    assert status == 0, error
    assert "Images are not counted" in out

"""Folders in the layout of `compressed-tensors`: read by others to the same logits, and by us to the same bytes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import TINY_MODELS, tiny_inputs
from int8_folders import load_int8_folder, save_in_own_layout
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_stateless import Int8TrainingConfig, create_optimizer, dequantize, quantize
from hf_stateless.run.command import main
from hf_stateless.weights.int8.codes import quantize_matrix
from hf_stateless.weights.int8.convert import int8_layers
from hf_stateless.weights.int8.packed import pack, unpack


# Rows of 576 and 96 weights, which 128 does not divide.
WIDE = {"hidden_size": 96, "intermediate_size": 576, "num_attention_heads": 2, "num_key_value_heads": 1}
KINDS = {
    "llama": (lambda: TINY_MODELS["llama"](), {"group_size": 16}),
    "llama_tied": (lambda: TINY_MODELS["llama_tied"](), {"group_size": None}),
    "some layers in float": (lambda: TINY_MODELS["llama"](), {"modules_to_not_convert": ["layers.0.mlp", "v_proj"]}),
    "several groups": (
        lambda: LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=2, **WIDE)),
        {"group_size": 128},
    ),
    "t5": (lambda: TINY_MODELS["t5"](), {"group_size": 16}),
    "bert": (lambda: TINY_MODELS["bert"](), {"group_size": 16}),
    "vit": (lambda: TINY_MODELS["vit"](), {"group_size": 16}),
    "qwen3_moe": (lambda: TINY_MODELS["qwen3_moe"](), {"group_size": 16}),
    "gpt2": (lambda: TINY_MODELS["gpt2"](), {"group_size": 128}),
}
# What transformers cannot read alone, and what it raises: packed layers that its `_init_weights` wants a `weight` of,
# and models with stacks of experts or with `Conv1D`, which are not packed and have our own layout.
REFUSED = {"t5": "AttributeError", "qwen3_moe": "RuntimeError", "gpt2": "RuntimeError"}
FOREIGN = """
import sys, torch, transformers
for pair in filter(None, sys.argv[1].split("|")):
    folder, error = pair.split("=")
    try:
        transformers.AutoModel.from_pretrained(folder)
    except Exception as raised:
        assert type(raised).__name__ == error, raised
    else:
        raise SystemExit(f"{folder} was loaded")
for folder in sys.argv[2:]:
    name, batch = torch.load(folder + "/batch.pt")
    model = getattr(transformers, name).from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(**batch).logits, folder + "/logits.pt")
    torch.save(model.state_dict(), folder + "/theirs.pt")
assert "hf_stateless" not in sys.modules
"""


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(states, others):
    assert states.keys() == others.keys()
    for name, tensor in states.items():
        assert torch.equal(tensor, others[name]), name


def trained(model, kind):
    """The model after a step, so that its bytes are not those of rounding to nearest."""
    if "labels" in kind:
        optimizer = create_optimizer(model, "sinkgd", lr=1e-2)
        model(**kind).loss.backward()
        optimizer.step()
    return model.eval()


def batch_of(name):
    batch = tiny_inputs(name if name in TINY_MODELS else "llama")
    return {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a trained model of each kind."""
    made = {}
    for name, (make, options) in KINDS.items():
        torch.manual_seed(0)
        model = quantize(make().to(torch.bfloat16), Int8TrainingConfig(**options))
        trained(model, batch_of(name))
        made[name] = tmp_path_factory.mktemp("int8") / name.replace(" ", "-")
        model.save_pretrained(made[name])
        with torch.no_grad():
            logits = model(**batch_of(name)).logits
        torch.save((type(model).__name__, batch_of(name)), made[name] / "batch.pt")
        torch.save(logits, made[name] / "ours.pt")
        torch.save(state_of(model), made[name] / "state.pt")
        torch.save(state_of(dequantize(model)), made[name] / "float.pt")
    return made


def test_a_process_without_this_package_computes_the_same_logits(folders):
    pytest.importorskip("compressed_tensors")
    read = {name: folder for name, folder in folders.items() if name not in REFUSED}
    refused = "|".join(f"{folders[name]}={error}" for name, error in REFUSED.items())
    command = [sys.executable, "-c", FOREIGN, refused, *map(str, read.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, folder in read.items():
        ours, theirs = torch.load(folder / "ours.pt"), torch.load(folder / "logits.pt")
        assert theirs.dtype == torch.bfloat16
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2**-7 * float(ours.abs().max()), msg=name)
        ours, theirs = torch.load(folder / "float.pt"), torch.load(folder / "theirs.pt")
        assert_equal(ours, {weight: theirs[weight] for weight in ours})


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_is_trained_on_with_the_same_bytes(name, folders, tmp_path):
    kind, folder = type(KINDS[name][0]()), folders[name]
    model = load_int8_folder(folder, kind)
    assert_equal(torch.load(folder / "state.pt"), state_of(model))
    model.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes(), file
    before = state_of(model)
    trained(model, batch_of(name))
    layer = next(n for n, _ in int8_layers(model))
    assert not torch.equal(model.state_dict()[f"{layer}.weight"], before[f"{layer}.weight"])


def test_names_shapes_and_dtypes_are_those_that_vllm_reads(folders):
    """As `CompressedTensorsWNA16` of vLLM 0.33 makes them."""
    weights = load_file(folders["several groups"] / "model.safetensors")
    for layer, rows, columns, groups in (("mlp.down_proj", 96, 576, 9), ("self_attn.k_proj", 48, 96, 1)):
        tensors = {n.rpartition(".")[2]: t for n, t in weights.items() if n.startswith(f"model.layers.1.{layer}.")}
        assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
            "weight_packed": (torch.int32, (rows, columns // 4)),
            "weight_scale": (torch.bfloat16, (rows, groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        assert tensors["weight_shape"].tolist() == [rows, columns]
    config = json.loads((folders["several groups"] / "config.json").read_text())["quantization_config"]
    assert (config["format"], config["quantization_status"]) == ("pack-quantized", "compressed")
    strategies = [(g["weights"]["strategy"], g["weights"]["group_size"]) for g in config["config_groups"].values()]
    assert strategies == [("channel", None), ("group", 64)]


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 8, 127, 128])
def test_packed_codes_are_those_of_compressed_tensors(columns):
    codes = torch.randint(-128, 128, (7, columns), dtype=torch.int8)
    assert torch.equal(unpack(pack(codes), columns), codes)
    expected = [sum((int(c) + 128) << 8 * i for i, c in enumerate(row[:4])) for row in codes]
    assert (pack(codes)[:, 0].long() & 0xFFFFFFFF).tolist() == expected
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    assert torch.equal(pack(codes), helpers.pack_to_int32(codes, 8))


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_another_class_takes_the_layers_it_has(kind, folders):
    model = load_int8_folder(folders["llama"], kind)
    layers = dict(int8_layers(model))
    assert len(layers) == 14
    expected = load_int8_folder(folders["llama"]).model.layers[0].self_attn.q_proj.weight.codes
    assert torch.equal(next(iter(layers.values())).weight.codes, expected)
    heads = [m for n, m in model.named_modules() if n == "score"]
    assert all(type(head) is torch.nn.Linear and head.weight.isfinite().all() for head in heads)


def test_a_layer_that_another_class_has_and_the_folder_lacks_is_new_and_in_float(tmp_path):
    quantize(BertForMaskedLM(TINY_MODELS["bert"]().config), Int8TrainingConfig(16)).save_pretrained(tmp_path)
    pooler = load_int8_folder(tmp_path, AutoModel).pooler.dense
    assert type(pooler) is torch.nn.Linear
    assert 0 < pooler.weight.std() < 1


def test_the_config_of_the_folder_decides_and_what_contradicts_it_is_told(folders, tmp_path):
    folder = folders["several groups"]
    given = Int8TrainingConfig(128)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=given)
    assert {layer.length for _, layer in int8_layers(model)} == {96, 64}
    assert given.to_dict()["quant_method"] == "hf_stateless_int8"  # the user's object is not written into
    given = {"quant_method": "hf_stateless_int8"}
    assert any(True for _ in int8_layers(AutoModelForCausalLM.from_pretrained(folder, quantization_config=given)))
    with pytest.raises(ValueError, match=r"got group_size=32, and .* for \d+ weights: leave group_size out\.$"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8TrainingConfig(32))
    chosen = Int8TrainingConfig(modules_to_not_convert=["down_proj"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=chosen)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    model.save_pretrained(tmp_path)
    assert_equal(state_of(load_int8_folder(tmp_path)), state_of(model))


def test_what_transformers_loads_to_run_is_not_trained_by_mistake(folders):
    pytest.importorskip("compressed_tensors")
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    assert not any(True for _ in int8_layers(model))
    with pytest.raises(ValueError, match=r"quantization_config=hf_stateless\.Int8TrainingConfig\(\)"):
        create_optimizer(model, "sinkgd", lr=1e-3)


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_folders_in_our_own_layout_train_on_and_are_written_in_that_of_compressed_tensors(shards, tmp_path):
    for name in ("llama", "several groups"):
        model = quantize(KINDS[name][0]().to(torch.bfloat16), Int8TrainingConfig(**KINDS[name][1]))
        options = {"max_shard_size": shards} if shards else {}
        old = save_in_own_layout(model, tmp_path / f"{name}-own", **options)
        assert json.loads((old / "config.json").read_text())["quantization_config"]["quant_method"].startswith("hf_")
        if name == "llama":
            again = AutoModelForCausalLM.from_pretrained(old)
            assert_equal(state_of(model), state_of(again))
            again.save_pretrained(tmp_path / "new", **options)
            assert_equal(state_of(load_int8_folder(tmp_path / "new")), state_of(model))


def in_uneven_groups(model):
    """The state of a model in which rows of 576 weights have groups of 96, the nearest divisor."""
    state = state_of(model)
    for name, layer in int8_layers(model):
        if layer.in_features == 576:
            codes, scale = quantize_matrix(layer.weight.dequantize(torch.float32), 96)
            state[f"{name}.weight"], state[f"{name}.weight_scale"] = codes.view(*scale.shape, -1), scale
    return state


def test_a_state_dict_with_groups_of_another_length_is_taken_over(tmp_path):
    make, options = KINDS["several groups"]
    model = quantize(make().to(torch.bfloat16), Int8TrainingConfig(**options))
    state = in_uneven_groups(model)
    model.load_state_dict(state)
    assert_equal(state_of(model), state)
    assert model.model.layers[0].mlp.down_proj.length == 96
    assert model.model.layers[0].mlp.down_proj.weight.scale.shape == (96, 6)
    trained(model, batch_of("llama"))
    old = save_in_own_layout(model, tmp_path / "old")
    assert_equal(state_of(AutoModelForCausalLM.from_pretrained(old)), state_of(model))
    model.save_pretrained(tmp_path / "new")
    assert_equal(state_of(load_int8_folder(tmp_path / "new")), state_of(model))


def test_vllm_reads_the_folder_as_it_is(folders, tmp_path, capsys):
    folder = folders["several groups"]
    assert main(["export", str(folder), str(tmp_path / "out"), "--format", "vllm"]) == 2
    error = capsys.readouterr().err
    assert error == f"hf-stateless export: {folder} already loads as it is, nothing was written: vllm serve {folder}\n"
    assert main(["export", str(folders["llama"]), str(tmp_path / "out"), "--format", "vllm"]) == 2
    assert "got groups of 16: type --format bf16." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    model = load_int8_folder(folders["llama_tied"])
    old = save_in_own_layout(model, tmp_path / "old")
    assert main(["export", str(old), str(tmp_path / "out"), "--format", "vllm"]) == 0
    assert f"vllm serve {tmp_path / 'out'}" in capsys.readouterr().out
    assert_equal(state_of(load_int8_folder(tmp_path / "out")), state_of(model))


LAYER = "model.layers.0.self_attn.q_proj.weight"


def codes(change):
    return lambda weights: weights.update({f"{LAYER}_packed": pack(change(unpack(weights[f"{LAYER}_packed"], 32)))})


def scales(change):
    return lambda weights: weights.update({f"{LAYER}_scale": change(weights[f"{LAYER}_scale"])})


def without(*kinds):
    return lambda weights: [weights.pop(LAYER + kind) for kind in kinds]


def in_float(weights):
    without("_packed", "_scale", "_shape")(weights)
    weights[LAYER] = torch.randn(32, 32).bfloat16()


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "zero codes": (codes(torch.zeros_like), "do not fit their scales"),
        "transposed codes": (codes(lambda t: t.T.contiguous()), "do not fit their scales"),
        "a code that is never written": (codes(lambda t: t.masked_fill(t == -127, -128)), "do not fit their scales"),
        "nan": (scales(lambda t: t * float("nan")), "a scale is NaN"),
        "zero scales": (scales(torch.zeros_like), "zero or negative"),
        "float32 scales": (scales(torch.Tensor.float), "scales of F32"),
        "fewer scales": (scales(lambda t: t[:, :1].clone()), "do not fit group_size=16"),
        "no scales": (without("_scale"), "without their scales"),
        "no shape": (without("_shape"), "weight_shape is missing"),
        "no layer": (without("_packed", "_scale", "_shape"), "13 layers are stored in 8 bits, and config.json"),
        "a float layer": (in_float, "13 layers are stored in 8 bits"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_damaged_folder_is_neither_loaded_nor_exported(change, message, folders, tmp_path, capfd):
    shutil.copytree(folders["llama"], tmp_path / "int8")
    file = tmp_path / "int8" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        load_int8_folder(tmp_path / "int8")
    assert message in str(error.value)
    capfd.readouterr()
    assert main(["export", str(tmp_path / "int8"), str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "out").exists()


def test_a_state_dict_as_it_is_saved_is_loaded_into_a_model_in_memory(folders):
    """As a Trainer resumes."""
    model = quantize(TINY_MODELS["llama"]().to(torch.bfloat16), Int8TrainingConfig(16))
    weights = load_file(folders["llama"] / "model.safetensors")
    model.load_state_dict(weights)
    assert f"{LAYER}_packed" in weights  # what was passed is left as it was
    assert_equal(state_of(model), torch.load(folders["llama"] / "state.pt"))
    for change in (codes(torch.zeros_like), scales(torch.Tensor.float), without("_scale"), without("_packed")):
        damaged = dict(weights)
        change(damaged)
        with pytest.raises(RuntimeError, match=LAYER):
            model.load_state_dict(damaged)


def test_a_model_whose_weights_transformers_converts_is_not_packed(folders, tmp_path, capsys, recwarn, monkeypatch):
    """Stacks of experts would be left out without an error by transformers 5.17, and random."""
    folder = folders["qwen3_moe"]
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["layout"]["format"]) == ("hf_stateless_int8", "int-quantized")
    assert not any("packed" in name for name in load_file(folder / "model.safetensors"))
    for model in (load_int8_folder(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert_equal(state_of(model), torch.load(folder / "state.pt"))
    assert not [w for w in recwarn if "quantization_config" in str(w.message)]
    assert main(["export", str(folder), str(tmp_path / "out"), "--format", "vllm"]) == 2
    assert "Qwen3MoeForCausalLM cannot be written for vLLM in 8 bits" in capsys.readouterr().err
    monkeypatch.setattr("hf_stateless.weights.int8.config.can_be_packed", lambda model: False)
    load_int8_folder(folders["several groups"]).save_pretrained(tmp_path / "wide")
    assert {layer.length for _, layer in int8_layers(load_int8_folder(tmp_path / "wide"))} == {96, 64}

"""Folders in our own layout: what is damaged is refused in one line, by from_pretrained and by an export."""

import json
import os
import shutil

import pytest
import torch
from conftest import TINY_MODELS, tiny_inputs
from int8_folders import save_in_own_layout
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_stateless import Int8TrainingConfig, export_model, quantize
from hf_stateless.run.command import main


LAYER = "model.layers.0.self_attn.q_proj"  # a square matrix: only its codes tell that it was transposed
CODES, SCALE = f"{LAYER}.weight", f"{LAYER}.weight_scale"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny 8-bit model."""
    folder = tmp_path_factory.mktemp("saved") / "int8"
    return save_in_own_layout(quantize(TINY_MODELS["llama"]().to(torch.bfloat16), Int8TrainingConfig(16)), folder)


@pytest.fixture
def int8(saved, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "int8")


def load(folder, kind=AutoModelForCausalLM, **kwargs):
    return kind.from_pretrained(folder, **kwargs)


def tensors(change):
    """Damage the tensors of a folder: by a function of all, which returns new ones or changes them."""

    def damage(folder):
        path = folder / "model.safetensors"
        weights = load_file(path)
        weights = change(weights) or weights
        save_file({name: t.contiguous() for name, t in weights.items()}, path, metadata={"format": "pt"})

    return damage


def scale_of(value):
    def change(weights):
        weights[SCALE][3, 1] = value

    return tensors(change)


def codes(change):
    return tensors(lambda weights: weights.update({CODES: change(weights[CODES])}))


def drop(*names):
    return tensors(lambda weights: {name: t for name, t in weights.items() if name not in names})


def as_matrices(weights):
    """Codes as matrices, without groups."""
    return {name: t.flatten(1) if t.dtype == torch.int8 else t for name, t in weights.items()}


def transposed_matrices(weights):
    return {name: t.T if t.dtype == torch.int8 else t for name, t in as_matrices(weights).items()}


def float_weight(weights):
    weights[CODES] = torch.randn(weights[CODES].flatten(1).shape).to(torch.bfloat16)
    del weights[SCALE]


def cut(size):
    """Keep so many of the first bytes, or leave out so many of the last."""
    return lambda folder: (path := folder / "model.safetensors").write_bytes(path.read_bytes()[:size])


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text)


def config(**changes):
    return model_config(quantization_config=changes)


def model_config(**changes):
    def damage(folder):
        path = folder / "config.json"
        values = json.loads(path.read_text())
        changed = changes.get("quantization_config", {})
        values.update({name: value for name, value in changes.items() if name != "quantization_config"})
        values["quantization_config"].update(changed)
        path.write_text(json.dumps(values))

    return damage


def sharded(change=lambda index, folder: None):
    def damage(folder):
        save_in_own_layout(load(folder), folder.parent / "shards", max_shard_size="10KB")
        shutil.rmtree(folder)
        (folder.parent / "shards").rename(folder)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        assert len(set(index["weight_map"].values())) > 1
        path.write_text(json.dumps(change(index, folder) or index))

    return damage


def without_a_shard(index, folder):
    (folder / index["weight_map"][CODES]).unlink()


def shard_outside(index, folder):
    (folder.parent / "other").mkdir()
    moved = index["weight_map"][CODES]
    (folder / moved).rename(folder.parent / "other" / moved)
    for name, file in index["weight_map"].items():
        index["weight_map"][name] = f"../other/{moved}" if file == moved else file


DAMAGES = {
    "missing codes": (drop(CODES), "is missing beside its scales"),
    "missing scales": (drop(SCALE), "without their scales"),
    "missing layer": (drop(CODES, SCALE), "13 layers are stored in 8 bits, and config.json speaks of 14"),
    "nan scale": (scale_of(float("nan")), "a scale is NaN"),
    "infinite scale": (scale_of(float("inf")), "a scale is NaN, infinite"),
    "negative scale": (scale_of(-0.01), "zero or negative"),
    "zero scale": (scale_of(0.0), "zero or negative"),
    "transposed codes": (codes(lambda t: t.flatten(1).T.contiguous().view(t.shape)), "do not fit their scales"),
    "transposed groups": (codes(lambda t: t.transpose(0, 1)), "group_size=16"),
    "transposed matrices": (tensors(transposed_matrices), "group_size=16"),
    "zero codes": (codes(torch.zeros_like), "do not fit their scales"),
    "a code that is never written": (codes(lambda t: t.masked_fill(t == -127, -128)), "do not fit their scales"),
    "uint8 codes": (codes(lambda t: t.view(torch.uint8)), "codes of U8"),
    "int16 codes": (codes(lambda t: t.to(torch.int16)), "codes of I16"),
    "float codes": (codes(lambda t: t.to(torch.float16)), "codes of F16"),
    "float8 codes": (codes(lambda t: t.float().to(torch.float8_e4m3fn)), "codes of F8_E4M3"),
    "float scales": (tensors(lambda w: w.update({SCALE: w[SCALE].float()})), "scales of F32"),
    "a scale per row": (tensors(lambda w: w.update({SCALE: w[SCALE][:, :1]})), "group_size=16"),
    "a float layer": (tensors(float_weight), "13 layers are stored in 8 bits"),
    "cut in the header": (cut(100), "damaged or cut off"),
    "cut in the data": (cut(-1), "damaged or cut off"),
    "empty file": (cut(0), "damaged or cut off"),
    "no safetensors": (write("model.safetensors", b"<html>404</html>"), "damaged or cut off"),
    "missing shard": (sharded(without_a_shard), "is missing: copy"),
    "shard outside": (sharded(shard_outside), "not in the folder"),
    "other group size": (config(group_size=8), "group_size=8"),
    "no group size": (config(group_size=None), "group_size=None"),
    "group size in words": (config(group_size="many"), "positive integer"),
    "unknown option": (config(bits=4), "has no option 'bits'"),
    "fewer layers": (config(modules_to_not_convert=["q_proj"]), "modules_to_not_convert"),
    "a large vocabulary": (model_config(vocab_size=10**12), "weights, and config.json speaks of"),
    "wide layers": (model_config(intermediate_size=10**12), "weights, and config.json speaks of"),
    "another width": (model_config(intermediate_size=80), "weights, and config.json speaks of"),
    "modules as a string": (config(modules_to_not_convert="q_proj"), "list of names"),
}
# What is met before a quantizer is asked, or concerns a copy alone.
ONLY_EXPORTS = {
    "config cut": (write("config.json", b'{"model_type": "lla'), "is no JSON"),
    "config null": (write("config.json", b"null"), "holds no object but NoneType"),
    "config list": (write("config.json", b"[1]"), "holds no object but list"),
    "config binary": (write("config.json", b"\xff\xfe\x00"), "is no JSON"),
    "config deep": (write("config.json", b'{"a":' * 100_000), "is no JSON"),
    "config of nothing": (write("config.json", b"{}"), "it needs no export"),
    "quantization null": (write("config.json", b'{"quantization_config": null}'), "it needs no export"),
    "a billion layers": (model_config(num_hidden_layers=10**9), "35 tensors in all"),
    "layers in words": (model_config(num_hidden_layers="two"), "cannot be loaded"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "no index": (sharded(lambda index, folder: {"weight_map": None}), "names no files"),
    "index without a tensor": (sharded(lambda i, f: i["weight_map"].update(ghost=i["weight_map"][CODES])), "ghost"),
    "extra tensor": (tensors(lambda w: w.update(extra=torch.ones(2))), "1 unexpected tensors, such as extra"),
    "missing norm": (drop("model.norm.weight"), "1 missing tensors, such as model.norm.weight"),
    "other vocabulary": (
        tensors(lambda w: w.update({"lm_head.weight": w["lm_head.weight"][:-1].clone()})),
        "1 mismatched tensors",
    ),
}


def linked(name):
    def damage(folder):
        secret = folder.parent / "secret"
        if (folder / name).exists():
            (folder / name).rename(secret)
        elif name != "tokenizer.model":  # and this one leads to nothing
            secret.write_text("secret")
        (folder / name).symlink_to(secret)

    return damage


LINKS = [
    "config.json",
    "model.safetensors",
    "generation_config.json",
    "tokenizer.json",
    "vocab.txt",
    "tokenizer.model",
]
ONLY_EXPORTS |= {f"link {name}": (linked(name), "leads out of its folder") for name in LINKS}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_not_loaded(damage, message, int8):
    damage(int8)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        load(int8)
    assert message in str(error.value)


@pytest.mark.parametrize(("damage", "message"), (DAMAGES | ONLY_EXPORTS).values(), ids=DAMAGES | ONLY_EXPORTS)
def test_an_export_of_a_damaged_folder_is_one_line_and_writes_nothing(damage, message, int8, tmp_path, capfd):
    damage(int8)
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    assert main(["export", str(int8), str(tmp_path / "new" / "out")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("hf-stateless export: ")
    assert error.count("\n") == 1
    assert message.replace("not in the folder", "leads out of its folder") in error
    assert sorted(tmp_path.rglob("*")) == before


def same_weights(model, other):
    states = model.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("change", [tensors(as_matrices), sharded()], ids=["matrices", "shards"])
def test_older_and_sharded_folders_load_to_the_same_bytes_and_are_exported(change, saved, int8, tmp_path):
    change(int8)
    same_weights(load(saved), load(int8))
    same_weights(load(export_model(saved, tmp_path / "a", "bf16")), load(export_model(int8, tmp_path / "b", "bf16")))


def test_a_snapshot_of_the_hub_is_exported_through_its_links(saved, tmp_path):
    snapshot = shutil.copytree(saved, tmp_path / "models--a--b" / "snapshots" / "0123")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(os.path.join("..", "..", "blobs", path.name))
    same_weights(load(saved).dequantize(), load(export_model(snapshot, tmp_path / "out", "bf16")))


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_another_class_takes_the_layers_it_has(kind, saved):
    layer = load(saved, kind).get_submodule(LAYER.removeprefix("" if "For" in kind.__name__ else "model."))
    assert torch.equal(layer.weight.codes, load(saved).get_submodule(LAYER).weight.codes)


def test_a_layer_that_another_class_has_and_the_folder_lacks_is_new(tmp_path):
    save_in_own_layout(quantize(TINY_MODELS["bert"](), Int8TrainingConfig(16)), tmp_path / "int8")
    model = load(tmp_path / "int8", AutoModel)
    assert model.pooler.dense.weight.dequantize().isfinite().all()
    assert model.pooler.dense.weight.codes.abs().max() == 127


def test_a_loaded_state_dict_is_looked_at_too(saved):
    model = load(saved)
    expected = load(saved)(**tiny_inputs("llama")).logits
    for change in (scale_of(float("nan")), codes(lambda t: t.view(torch.uint8)), codes(torch.zeros_like)):
        folder = saved.parent / "changed"
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        change(folder)
        with pytest.raises(RuntimeError, match=CODES):
            model.load_state_dict(load_file(folder / "model.safetensors"))
    model.load_state_dict(load_file(saved / "model.safetensors"))
    assert torch.equal(model(**tiny_inputs("llama")).logits, expected)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification, AutoModelForCausalLM])
@pytest.mark.parametrize("lost", ["layers.0.self_attn.q_proj", "layers.1.", "mlp."])
def test_a_folder_that_lacks_layers_is_loaded_as_no_class(make_model, tmp_path, kind, lost):
    folder = tmp_path / "int8"
    save_in_own_layout(quantize(make_model("llama")), folder)
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if lost not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing|stored in 8 bits"):
        kind.from_pretrained(folder)

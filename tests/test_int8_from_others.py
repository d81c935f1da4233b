"""Folders that another program wrote in the layout of `compressed-tensors`: trained on with their bytes."""

import json

import pytest
import torch
from conftest import tiny_inputs
from int8_folders import load_int8_folder
from safetensors.torch import load_file, save_file
from test_int8_training import fit
from transformers import LlamaConfig, LlamaForCausalLM

from hf_stateless import create_optimizer
from hf_stateless.weights.int8.convert import int8_layers
from hf_stateless.weights.int8.packed import pack


WEIGHTS = {
    **{"num_bits": 8, "type": "int", "symmetric": True, "group_size": 64, "strategy": "group", "dynamic": False},
    **{"block_structure": None, "actorder": None, "scale_dtype": None, "zp_dtype": "torch.int8"},
    **{"observer": "minmax", "observer_kwargs": {}},
}
CONFIG = {
    **{"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"},
    **{"ignore": ["lm_head"], "kv_cache_scheme": None, "global_compression_ratio": None, "version": "0.12.2"},
    **{"sparsity_config": {}, "transform_config": {}},
}


def small(tied=False, **sizes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, **sizes}
    config = LlamaConfig(
        vocab_size=96, num_hidden_layers=2, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, **sizes
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def round_to_nearest(weight, size, dtype):
    """Codes from -128 to 127 as llm-compressor makes them: a scale is the largest magnitude over 127.5."""
    grouped = weight.float().view(weight.shape[0], -1, size or weight.shape[1])
    scale = (grouped.abs().amax(-1) / 127.5).to(dtype)
    codes = (grouped / scale.float().unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8).flatten(1)
    return codes, scale


def write(model, folder, *, size=64, packed=True, dtype=torch.bfloat16, left_out=("lm_head",), config=None, **kwargs):
    """Save a model as another program would; return what its layers are stored as."""
    model.save_pretrained(folder, **kwargs)
    stored = {}
    for file in folder.glob("*.safetensors"):
        weights = {}
        for name, tensor in load_file(file).items():
            layer = name.removesuffix(".weight")
            linear = dict(model.named_modules()).get(layer)
            if not isinstance(linear, torch.nn.Linear) or layer in left_out or not name.endswith("weight"):
                weights[name] = tensor
                continue
            codes, scale = stored[layer] = round_to_nearest(tensor, size, dtype)
            weights[f"{name}_scale"] = scale
            weights |= (
                {f"{name}_packed": pack(codes), f"{name}_shape": torch.tensor(codes.shape)}
                if packed
                else {name: codes}
            )
        save_file(weights, file, metadata={"format": "pt"})
    if (index := folder / "model.safetensors.index.json").exists():
        weight_map = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    weights = {**WEIGHTS, "group_size": size, "strategy": "group" if size else "channel"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    ours = {**CONFIG, "config_groups": {"group_0": group}, "ignore": list(left_out)}
    ours["format"] = "pack-quantized" if packed else "int-quantized"
    change_config(folder, lambda stored: {**ours, **(config or {})})
    return stored


def change_config(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] = change(values.get("quantization_config"))
    path.write_text(json.dumps(values))


def float_of(codes, scale):
    grouped = codes.double().view(*scale.shape, -1) * scale.double().unsqueeze(-1)
    return grouped.flatten(1)


def assert_stored(model, stored):
    layers = dict(int8_layers(model))
    assert set(layers) == set(stored)
    for name, (codes, scale) in stored.items():
        assert torch.equal(layers[name].weight.codes, codes), name
        assert torch.equal(layers[name].weight_scale, scale), name


def step(model):
    optimizer = create_optimizer(model, "sinkgd", lr=1e-2)
    batch = tiny_inputs("llama")
    before = model(**batch).loss
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(**batch).loss < before


@pytest.mark.parametrize("packed", [True, False], ids=["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("size", [32, 64, 128, None])
def test_folders_of_others_are_trained_on_with_their_bytes(size, packed, tmp_path):
    stored = write(small(), tmp_path / "theirs", size=size, packed=packed)
    assert any(int(codes.min()) == -128 for codes, _ in stored.values())
    model = load_int8_folder(tmp_path / "theirs")
    assert_stored(model, stored)
    model.save_pretrained(tmp_path / "ours")
    assert_stored(load_int8_folder(tmp_path / "ours"), stored)
    step(model)
    model.save_pretrained(tmp_path / "trained")
    again = load_int8_folder(tmp_path / "trained")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("kind", ["ignored by expression", "targets by name", "tied", "shards", "a head"])
def test_other_ways_to_say_which_layers_are_stored(kind, tmp_path):
    model, options = small(tied=kind == "tied"), {}
    layers = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    if kind == "ignored by expression":
        out = tuple(name for name in layers if "down_proj" in name or "layers.1.self" in name)
        options = {"left_out": ("lm_head", *out)}
        options["config"] = {"ignore": ["re:.*lm_head", "re:.*down_proj$", r"re:model\.layers\.1\.self_attn\..*"]}
    elif kind == "targets by name":
        group = {"targets": ["re:.*(up|gate|down)_proj$", *(n for n in layers if "self_attn" in n)]}
        options["config"] = {"ignore": [], "config_groups": {"g": {**group, "weights": WEIGHTS}}}
    elif kind == "shards":
        options["max_shard_size"] = "50KB"
    elif kind == "a head":
        options["left_out"] = ()
    stored = write(model, tmp_path / "theirs", **options)
    model = load_int8_folder(tmp_path / "theirs")
    if kind == "a head":
        codes, scale = stored.pop("lm_head")
        assert torch.equal(model.lm_head.weight, float_of(codes, scale).bfloat16())
    assert_stored(model, stored)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")
    step(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_that_are_no_bfloat16_become_some(dtype, tmp_path):
    stored = write(small(), tmp_path / "theirs", dtype=dtype)
    for name, layer in int8_layers(load_int8_folder(tmp_path / "theirs")):
        codes, scale = stored[name]
        off = (layer.weight.dequantize(torch.float32).double() - float_of(codes, scale)).view(*scale.shape, -1)
        assert (off.abs() <= 0.51 * layer.weight_scale.double().unsqueeze(-1)).all()
        assert layer.weight.codes.min() >= -127
    step(load_int8_folder(tmp_path / "theirs"))


def test_a_run_on_a_folder_of_others_resumes_to_the_bit_with_frozen_layers_too(tmp_path):
    """Frozen groups keep codes that this package never writes."""
    write(small(), tmp_path / "theirs")

    def frozen():
        model = load_int8_folder(tmp_path / "theirs")
        model.model.layers[0].requires_grad_(False)
        return model

    options = {"optim": "sinkgd_layerwise", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = fit(frozen(), tmp_path / "run", **options).model
    resumed = fit(frozen(), tmp_path / "run", str(tmp_path / "run" / "checkpoint-2"), **options).model
    assert all(torch.equal(t, resumed.state_dict()[n]) for n, t in whole.state_dict().items())
    final = load_int8_folder(tmp_path / "run" / "checkpoint-4")
    assert all(torch.equal(t, final.state_dict()[n]) for n, t in whole.state_dict().items())


def test_what_compressed_tensors_itself_writes_is_trained_on(tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config

    model = small()
    weights = {name: WEIGHTS[name] for name in ("num_bits", "type", "symmetric", "group_size", "strategy")}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    expected = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            codes, scale = expected[name] = round_to_nearest(module.weight, 64, torch.bfloat16)
            module.weight_scale.data = scale
            module.weight.data = float_of(codes, scale).bfloat16()
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    model = load_int8_folder(tmp_path)
    assert set(dict(int8_layers(model))) == set(expected)
    for name, layer in int8_layers(model):
        codes, scale = expected[name]
        assert torch.equal(layer.weight_scale, scale)
        assert (layer.weight.codes.int() - codes.int()).abs().max() <= 1  # of weights that were rounded to bf16
    step(model)


def test_a_group_of_zeros_and_a_scale_of_zero_are_zeros(tmp_path):
    model = small()
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0
    stored = write(model, tmp_path / "theirs")
    assert not stored["model.layers.0.mlp.up_proj"][1][3].any()
    layer = load_int8_folder(tmp_path / "theirs").model.layers[0].mlp.up_proj
    assert not layer.weight.dequantize()[3].any()
    assert layer.weight.dequantize().isfinite().all()

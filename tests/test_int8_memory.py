"""What 8-bit training takes: bytes counted, and `hf-stateless memory --dtype int8` against a real step."""

import copy

import pytest
import torch
from conftest import tiny_inputs
from int8_folders import load_int8_folder
from memory_models import measured_peak, small_llama
from transformers import AutoModelForCausalLM

from hf_stateless import Int8TrainingConfig, create_optimizer, quantize
from hf_stateless.reports.predicted import Settings, build_model, estimate
from hf_stateless.reports.predicted.model import weight_bytes_of_rank
from hf_stateless.weights.int8.convert import int8_layers


def int8_model(**sizes):
    torch.manual_seed(0)
    return quantize(AutoModelForCausalLM.from_config(small_llama(**sizes), dtype=torch.bfloat16)).train()


@pytest.mark.parametrize(("group_size", "expected"), [(64, 1.03125), (128, 1.015625), (None, 1 + 2 / 256)])
def test_a_weight_takes_a_byte_and_its_share_of_a_scale(group_size, expected):
    model = AutoModelForCausalLM.from_config(
        small_llama(hidden_size=256, intermediate_size=256, num_attention_heads=8, num_key_value_heads=8)
    )
    tensors = [layer.state_dict() for _, layer in int8_layers(quantize(model, Int8TrainingConfig(group_size)))]
    total = sum(tensor.nbytes for state in tensors for tensor in state.values())
    assert total == expected * sum(state["weight"].numel() for state in tensors)


def test_weights_are_counted_as_they_are_stored():
    real, predicted = int8_model(), build_model(small_llama(), Settings(dtype="int8"))
    stored = sum(tensor.nbytes for tensor in real.state_dict().values()) + sum(b.nbytes for b in real.buffers())
    assert weight_bytes_of_rank(predicted) == weight_bytes_of_rank(real) == stored


@pytest.mark.parametrize("group_size", [16, 64, None])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "t5", "bert", "vit"])
def test_transformers_counts_bytes_as_stored_and_no_scales(name, group_size, make_model, tmp_path):
    plain = make_model(name).to(torch.bfloat16)
    plain.get_input_embeddings().requires_grad_(False)
    kinds = [{}, {"only_trainable": True}, {"exclude_embeddings": True}]
    kinds.append({"only_trainable": True, "exclude_embeddings": True})
    expected = [plain.num_parameters(**kind) for kind in kinds]
    saved = sum(p.numel() for p in plain.parameters())
    model = quantize(plain, Int8TrainingConfig(group_size))
    layers = [layer for _, layer in int8_layers(model)]
    fewer = sum(layer.weight.nelement() - layer.weight_scale.nbytes for layer in layers)
    for counted in (model, copy.deepcopy(model)):
        assert [counted.num_parameters(**kind) for kind in kinds] == expected
        assert sum(p.numel() for p in counted.parameters()) == saved
        assert counted.get_memory_footprint(return_buffers=False) == 2 * saved - fewer
    model.save_pretrained(tmp_path)
    again = load_int8_folder(tmp_path, type(model))
    assert again.num_parameters() == expected[0]
    assert again.get_memory_footprint(False) == model.get_memory_footprint(False)


@pytest.mark.parametrize("optim", ["sinkgd", "swan", "sinkgd_layerwise"])
def test_counts_stay_in_training_and_under_adapters(optim, make_model):
    model = quantize(make_model("llama").to(torch.bfloat16))
    before = model.num_parameters(), model.num_parameters(only_trainable=True), model.get_memory_footprint()
    assert before[0] == before[1] == make_model("llama").num_parameters()
    optimizer = create_optimizer(model, optim, lr=1e-2)
    for _ in range(2):
        model(**tiny_inputs("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model.num_parameters(), model.num_parameters(only_trainable=True), model.get_memory_footprint()) == before
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    added = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert adapted.get_nb_trainable_parameters() == (added, before[0] + added)
    assert adapted.base_model.model.num_parameters(only_trainable=True) == added
    assert adapted.base_model.model.get_memory_footprint() == before[2] + sum(
        p.nbytes for name, p in adapted.named_parameters() if "lora_" in name
    )


@pytest.mark.parametrize("optim", ["sinkgd", "swan", "sinkgd_layerwise", "swan_layerwise"])
def test_the_predicted_peak_is_what_is_alive_in_a_real_step(optim):
    settings = Settings(dtype="int8", batch=2, seq=64, device="cpu")
    tokens = torch.randint(3, 300, (2, 64))
    measured = measured_peak(int8_model(), {"input_ids": tokens, "labels": tokens}, optim)
    predicted = estimate(build_model(small_llama(), settings), [optim], settings)[0].peak
    assert predicted == pytest.approx(measured, rel=0.1 if optim.endswith("layerwise") else 0.03)

"""What 8-bit training takes: bytes counted, and `hf-stateless memory --dtype int8` against a real step."""

import pytest
import torch
from memory_models import measured_peak, small_llama
from transformers import AutoModelForCausalLM

from hf_stateless import Int8TrainingConfig, quantize
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


@pytest.mark.parametrize("optim", ["sinkgd", "swan", "sinkgd_layerwise", "swan_layerwise"])
def test_the_predicted_peak_is_what_is_alive_in_a_real_step(optim):
    settings = Settings(dtype="int8", batch=2, seq=64, device="cpu")
    tokens = torch.randint(3, 300, (2, 64))
    measured = measured_peak(int8_model(), {"input_ids": tokens, "labels": tokens}, optim)
    predicted = estimate(build_model(small_llama(), settings), [optim], settings)[0].peak
    assert predicted == pytest.approx(measured, rel=0.1 if optim.endswith("layerwise") else 0.03)

"""What stacks of experts take in 8 bits: bytes counted, and the prediction against a real step."""

import re

import pytest
import torch
from documents import read
from memory_models import measured_peak
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, GPT2Config, GptOssConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from hf_stateless import Int8TrainingConfig, quantize
from hf_stateless.reports.predicted import Settings, build_model, estimate
from hf_stateless.reports.predicted.model import weight_bytes_of_rank
from hf_stateless.reports.predicted.trace import LiveBytes
from hf_stateless.weights.int8.weight import Int8Weight


SIZES = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
SIZES |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "intermediate_size": 256}
CONFIGS = {
    "qwen3_moe": lambda **more: Qwen3MoeConfig(**{**SIZES, **more}, num_experts=8, moe_intermediate_size=128),
    "gpt_oss": lambda **more: GptOssConfig(**{**SIZES, **more}, num_local_experts=8),
    "mixtral": lambda **more: MixtralConfig(**{**SIZES, **more}, num_local_experts=4),
}
# Published models, with so many of their layers.
PUBLISHED = {
    "Qwen3-30B-A3B": lambda layers=48: Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        moe_intermediate_size=768, num_experts=128,
    ),
    "GPT-OSS-20B": lambda layers=24: GptOssConfig(num_hidden_layers=layers, num_local_experts=32),
    "Mixtral-8x7B": lambda layers=32: MixtralConfig(num_hidden_layers=layers),
    "Llama-2-7B": lambda layers=32: LlamaConfig(num_hidden_layers=layers),
    "GPT-2": lambda layers=12: GPT2Config(n_layer=layers),
}  # fmt: skip
EXPERTS = [name for name in PUBLISHED if name not in ("Llama-2-7B", "GPT-2")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_weight_takes_a_byte_and_its_share_of_a_scale(name):
    model = build_model(PUBLISHED[name](2), Settings(dtype="int8"))
    weights = [p for p in model.parameters() if isinstance(p, Int8Weight)]
    stored = sum(tensor.nbytes for weight in weights for tensor in weight.stored)
    assert stored / sum(weight.numel() for weight in weights) < 1.032
    inside = [p for p in model.base_model.parameters() if p.ndim > 1 and p.numel()]
    others = sum(p.numel() for p in inside if not isinstance(p, Int8Weight))
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    assert others - tables < 0.002 * sum(p.numel() for p in inside)  # routers, biases of experts


@pytest.mark.parametrize("name", EXPERTS)
def test_the_weights_on_the_page_are_those_of_the_whole_models(name):
    sizes = [
        weight_bytes_of_rank(build_model(PUBLISHED[name](), Settings(dtype=dtype))) / 2**30
        for dtype in ("bf16", "int8")
    ]
    told = re.search(rf"\| {name} \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", read("hf_stateless/weights/README.md"))
    adamw, *weights = (float(size) for size in told.groups())
    assert weights == pytest.approx(sizes, rel=0.01)
    # The step of `adamw_torch_fused`: weights, gradients and two moments, and no temporary.
    assert adamw == pytest.approx(4 * sizes[0], rel=0.01)


@pytest.mark.slow
def test_the_peak_on_the_page_is_predicted():
    settings, options = Settings(dtype="int8", checkpointing=True), {"embeddings": "row_moment", "release": "all"}
    name = "GPT-OSS-20B"
    (found,) = estimate(build_model(PUBLISHED[name](), settings), ["sinkgd_layerwise"], settings, options)
    told = re.search(rf"\| {name} \|.* ([\d.]+) \|\n", read("hf_stateless/weights/README.md"))[1]
    assert found.peak / 2**30 == pytest.approx(float(told), rel=0.03)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_counted_as_they_are_stored(name):
    torch.manual_seed(0)
    real = quantize(AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.bfloat16))
    predicted = build_model(CONFIGS[name](), Settings(dtype="int8"))
    stored = sum(tensor.nbytes for tensor in real.state_dict().values()) + sum(b.nbytes for b in real.buffers())
    assert weight_bytes_of_rank(predicted) == weight_bytes_of_rank(real) == stored


@pytest.mark.parametrize("optim", ["sinkgd", "swan", "sinkgd_layerwise"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=str)
def test_the_predicted_peak_is_what_is_alive_in_a_real_step(name, optim, checkpointing):
    torch.manual_seed(0)
    settings = Settings(dtype="int8", batch=2, seq=64, device="cpu", checkpointing=checkpointing)
    model = quantize(AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.bfloat16)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    tokens = torch.randint(3, 300, (2, 64))
    measured = measured_peak(model, {"input_ids": tokens, "labels": tokens}, optim)
    predicted = estimate(build_model(CONFIGS[name](), settings), [optim], settings)[0].peak
    assert predicted == pytest.approx(measured, rel=0.1)


class RealBytes(LiveBytes):
    """Counts no tensors on the meta device, where a model is made before it is loaded."""

    def _see(self, tensors, made_here):
        real = [t for t in tree_iter(tensors) if isinstance(t, torch.Tensor) and not t.is_meta]
        super()._see(real, made_here)


@pytest.mark.parametrize("name", CONFIGS)
def test_loading_never_holds_the_model_in_float(name, tmp_path):
    config = CONFIGS[name](num_hidden_layers=12)
    float_model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    float_model.save_pretrained(tmp_path)
    in_float = sum(p.nbytes for p in float_model.parameters())
    largest = max(p.nbytes for p in float_model.parameters())
    del float_model
    with RealBytes() as live:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, quantization_config=Int8TrainingConfig()
        )
    stored = weight_bytes_of_rank(model)
    # One stack is read, put together of its experts, and quantised.
    assert live.peak.total < stored + 4 * largest < 0.9 * in_float

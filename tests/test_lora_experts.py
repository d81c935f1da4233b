"""LoRA on stacks of experts: PEFT keeps the factors of all of them in one pair of parameters."""

import peft
import pytest
import torch
from lora_pairs import adapted
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from hf_stateless import create_optimizer
from hf_stateless.trainer.adapters import lora_pairs
from hf_stateless.trainer.partition import partition_parameters
from hf_stateless.update.layout import layout_of


# PEFT 0.21 reads a name that transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 1}
MODELS = {
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 6, "moe_intermediate_size": 24}),  # (experts, out, in)
    "gpt_oss": (GptOssConfig, {"num_local_experts": 3}),  # (experts, in, out), said so
    "mixtral": (MixtralConfig, {"num_local_experts": 5}),
}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "swan": ("swan", {}),
    "sinkgd": ("sinkgd", {}),
    "layer-wise": ("swan_layerwise", {}),
    "all released": ("sinkgd_layerwise", {"release": "all"}),
    "momentum": ("swan", {"momentum": 0.9}),
    "product": ("swan", {"lora": "product"}),
    "sinkgd product": ("sinkgd", {"lora": "product"}),
    "min_signal": ("sinkgd", {"min_signal": 0.1}),
    "width": ("swan", {"width_rule": "spectral"}),
}


def model_of(name, dtype=torch.float32, parameters=PARAMETERS, rank=3):
    torch.manual_seed(0)
    config, sizes = MODELS[name]
    adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj"], target_parameters=parameters)
    model = peft.get_peft_model(AutoModelForCausalLM.from_config(config(**SIZES, **sizes)), adapters)
    for part, p in model.named_parameters():
        if "lora_B" in part:
            torch.nn.init.normal_(p, std=0.05)
    return model.to(dtype)


def of_experts(model):
    """(layer, factor A or B) by name: PEFT's own description of what belongs to which expert."""
    return {
        f"{name}.{letter}": (layer, getattr(layer, f"lora_{letter}")["default"].weight)
        for name, layer in model.named_modules()
        if getattr(layer, "num_experts", 1) > 1 and hasattr(layer, "lora_A")
        for letter in "AB"
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_layout_is_that_of_pefts_product(name):
    """Without the factor of one expert, the change of its weight is zero and that of the others is as it was."""
    model = model_of(name)
    layouts = {id(e.parameter): layout_of(e.layout) for e in partition_parameters(model)}
    factors = of_experts(model)
    assert len(factors) == 8
    for layer, factor in factors.values():
        before, kept = layer.get_delta_weight("default").clone(), factor.detach().clone()
        with torch.no_grad():
            layouts[id(factor)].as_matrix(factor)[1] = 0
            after = layer.get_delta_weight("default")
            factor.copy_(kept)
        assert layouts[id(factor)].blocks == len(before) == layer.num_experts
        assert not after[1].any()
        assert before[1].any()
        assert torch.equal(after[2:], before[2:])
        assert torch.equal(after[0], before[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_an_expert_without_a_token_keeps_its_factors_and_the_others_take_whole_steps(case, dtype):
    name, options = CASES[case]
    model = model_of("qwen3_moe", dtype)
    factors = of_experts(model)
    optimizer = create_optimizer(model, name, lr=1e-2, weight_decay=0.1, **options)
    layouts = {id(e.parameter): layout_of(e.layout) for e in partition_parameters(model)}
    before = {key: factor.detach().clone() for key, (_, factor) in factors.items()}
    seen = {}
    for key, (_, factor) in factors.items():
        found = layouts[id(factor)]
        factor.register_hook(lambda g, key=key, found=found: seen.update({key: found.norms(g.detach())}))
    tokens = torch.tensor([[5, 9, 17]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert seen.keys() == factors.keys()
    moved = []
    for key, (_, factor) in factors.items():
        found = layouts[id(factor)]
        change = found.as_matrix(factor.detach() - before[key]).float()
        has_token = seen[key] > 0
        assert 0 < has_token.sum() < 6
        assert not change[~has_token].any()
        moved += change[has_token].square().mean((1, 2)).sqrt().tolist()
    assert min(moved) > 0
    if "product" not in case and case != "width":
        assert max(moved) < 1.1 * min(moved)  # not one step for all: 0.0036 beside 0.0395 it was


@pytest.mark.parametrize("name", MODELS)
def test_each_experts_factors_are_a_pair(name):
    model = model_of(name)
    pairs = [pair for pair in lora_pairs(model) if pair.experts > 1]
    assert len(pairs) == 4
    assert {pair.experts for pair in pairs} == {layer.num_experts for layer, _ in of_experts(model).values()}


def test_one_parameter_of_the_experts_and_rank_one_are_like_others():
    model = model_of("qwen3_moe", parameters=["experts.down_proj"], rank=1)
    layouts = {e.name: e.layout for e in partition_parameters(model) if "experts" in e.name}
    assert len(layouts) == 4
    assert set(layouts.values()) == {"out_in*6", "out_in/6"}


def test_a_router_that_is_a_parameter_is_one_matrix():
    """What PEFT adapts of two dimensions has one pair of factors, as a linear layer has."""
    model = model_of("qwen3_moe", parameters=["mlp.gate.weight"])
    layouts = {e.name: e.layout for e in partition_parameters(model) if "gate" in e.name}
    assert len(layouts) == 4
    assert set(layouts.values()) == {"out_in"}


def test_alpha_of_some_experts_makes_a_group_of_their_own(make_model):
    parameters = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = adapted(make_model, "qwen3_moe", target_modules=[], alpha_pattern={"mlp.experts": 16}, **parameters)
    groups = create_optimizer(model, "swan", lr=1e-2, lora="product").param_groups
    assert {group["algorithm"] for group in groups} == {"lora_product"}
    assert sum(len(group["params"]) for group in groups) == 8
    assert all(len(group["layouts"].split()) == len(group["params"]) for group in groups)

"""Tiny models with stacks of experts, one of each way in which transformers stores them."""

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    JetMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)


SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
HEADS = {**SIZES, "head_dim": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**HEADS, num_experts=6, moe_intermediate_size=24),
    "mixtral": lambda: MixtralConfig(**HEADS, num_local_experts=5),
    # (experts, in, out), with biases, gate and up in turn
    "gpt_oss": lambda: GptOssConfig(**HEADS, num_local_experts=3),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SIZES,
        **LATENT,
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "shared expert": lambda: Qwen2MoeConfig(
        **HEADS, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=16
    ),
    "llama4": lambda: Llama4TextConfig(
        **HEADS, num_local_experts=4, intermediate_size_mlp=24, interleave_moe_layer_step=1
    ),
    "jetmoe": lambda: JetMoeConfig(**HEADS, num_local_experts=4, kv_channels=8),  # one stack in a module, `weight`
    "granite": lambda: GraniteMoeConfig(**HEADS, num_local_experts=4),
    "one expert": lambda: MixtralConfig(**{**HEADS, "num_experts_per_tok": 1}, num_local_experts=1),
    "odd": lambda: MixtralConfig(**{**HEADS, "intermediate_size": 131}, num_local_experts=3),
}


def expert_model(kind, dtype=torch.bfloat16, **sizes):
    """Return a model of a kind, the same at each call; experts are computed one by one, which all sizes allow."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.update(sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    return model.train()

"""Tiny models of every architecture with the role of each of their parameters, and checks of a partition."""

import pytest
import torch
import transformers
from conftest import BLOCK, SMALL

from hf_stateless.trainer.partition import ROLES, partition_parameters


HEADS = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
TEXT = {**SMALL, **BLOCK, **HEADS}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {"q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
VISION = {**BLOCK, "image_size": 16, "patch_size": 8, "num_channels": 3}
ENCODERS = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
DECODERS = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
LLAMA_ROLES = {
    "model.embed_tokens.weight": "embedding",
    "layers.0.self_attn.q_proj.weight": "matrix out_in",
    "layers.1.mlp.down_proj.weight": "matrix out_in",
    "layers.0.input_layernorm.weight": "rest",
    "model.norm.weight": "rest",
}
BERT_ROLES = {
    "bert.embeddings.word_embeddings.weight": "embedding",
    "bert.embeddings.position_embeddings.weight": "embedding",
    "bert.embeddings.LayerNorm.weight": "rest",
    "encoder.layer.0.attention.self.query.weight": "matrix out_in",
    "encoder.layer.0.attention.self.query.bias": "rest",
}
# Model class, what its config is made from, and the role (and layout) of parameters found by the end of their name.
ARCHITECTURES = [
    ("LlamaForCausalLM", TEXT, {**LLAMA_ROLES, "lm_head.weight": "head"}),
    ("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True}, LLAMA_ROLES),
    ("LlamaForSequenceClassification", TEXT, {**LLAMA_ROLES, "score.weight": "head"}),
    ("LlamaModel", TEXT, {"embed_tokens.weight": "embedding", "layers.0.mlp.up_proj.weight": "matrix out_in"}),
    ("MistralForCausalLM", TEXT, {**LLAMA_ROLES, "lm_head.weight": "head"}),
    ("Qwen3ForCausalLM", TEXT, {**LLAMA_ROLES, "self_attn.q_norm.weight": "rest", "lm_head.weight": "head"}),
    (
        "GPT2LMHeadModel",
        {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {
            "wte.weight": "embedding",
            "wpe.weight": "embedding",
            "h.0.attn.c_attn.weight": "matrix in_out",
            "h.0.mlp.c_fc.weight": "matrix in_out",
            "h.0.mlp.c_fc.bias": "rest",
            "ln_f.weight": "rest",
        },
    ),
    (
        "MixtralForCausalLM",
        {**TEXT, **EXPERTS},
        {
            **LLAMA_ROLES,
            "layers.1.mlp.down_proj.weight": None,
            "mlp.experts.gate_up_proj": "matrix out_in",
            "mlp.experts.down_proj": "matrix out_in",
            "mlp.gate.weight": "rest",
            "lm_head.weight": "head",
        },
    ),
    (
        "Qwen3MoeForCausalLM",
        {**TEXT, **EXPERTS},
        {"mlp.experts.gate_up_proj": "matrix out_in", "mlp.experts.down_proj": "matrix out_in", "gate.weight": "rest"},
    ),
    (
        "GptOssForCausalLM",
        {**TEXT, **EXPERTS},
        {
            "mlp.experts.gate_up_proj": "matrix in_out",
            "mlp.experts.down_proj": "matrix in_out",
            "mlp.experts.gate_up_proj_bias": "rest",
            "mlp.experts.down_proj_bias": "rest",
            "mlp.router.weight": "rest",
            "self_attn.sinks": "rest",
        },
    ),
    (
        "Llama4ForCausalLM",
        {**TEXT, **EXPERTS, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 1},
        {
            "feed_forward.experts.gate_up_proj": "matrix in_out",
            "feed_forward.experts.down_proj": "matrix in_out",
            "feed_forward.shared_expert.up_proj.weight": "matrix out_in",
            "feed_forward.router.weight": "rest",
        },
    ),
    (
        "PhimoeForCausalLM",
        {**TEXT, **EXPERTS},
        {"mlp.router.weight": "rest", "mlp.experts.down_proj": "matrix out_in"},
    ),
    (
        "HunYuanMoEV1ForCausalLM",
        {**TEXT, **EXPERTS},
        {"mlp.gate.wg.weight": "rest", "mlp.experts.down_proj": "matrix out_in"},
    ),
    (
        "JetMoeForCausalLM",
        {**TEXT, **EXPERTS},
        {"mlp.router.layer.weight": "rest", "mlp.output_linear.weight": "matrix out_in"},
    ),
    (
        "DeepseekV3ForCausalLM",
        {**TEXT, **EXPERTS, **MLA, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        {
            "layers.0.self_attn.kv_a_proj_with_mqa.weight": "matrix out_in",
            "layers.0.mlp.up_proj.weight": "matrix out_in",
            "layers.1.mlp.experts.down_proj": "matrix out_in",
            "layers.1.mlp.shared_experts.up_proj.weight": "matrix out_in",
            "layers.1.mlp.gate.weight": "rest",
        },
    ),
    (
        "MambaForCausalLM",
        {"vocab_size": 96, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": 0},
        {
            "backbone.embeddings.weight": "embedding",
            "mixer.in_proj.weight": "matrix out_in",
            "mixer.A_log": "rest",
            "mixer.D": "rest",
            "mixer.conv1d.weight": "rest",
        },
    ),
    (
        "T5ForConditionalGeneration",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0},
        {
            "shared.weight": "embedding",
            "relative_attention_bias.weight": "embedding",
            "SelfAttention.q.weight": "matrix out_in",
            "EncDecAttention.o.weight": "matrix out_in",
            "final_layer_norm.weight": "rest",
        },
    ),
    (
        "WhisperForConditionalGeneration",
        {**ENCODERS, **DECODERS, "vocab_size": 96, "d_model": 32, "num_mel_bins": 8, "pad_token_id": 0},
        {
            "decoder.embed_tokens.weight": "embedding",
            "encoder.conv1.weight": "rest",
            "encoder.layers.0.fc1.weight": "matrix out_in",
            "encoder_attn.k_proj.weight": "matrix out_in",
        },
    ),
    (
        "WhisperForAudioClassification",
        {**ENCODERS, "vocab_size": 96, "d_model": 32, "num_mel_bins": 8, "num_labels": 3, "pad_token_id": 0},
        {"encoder.layers.0.fc1.weight": "matrix out_in", "classifier.weight": "head"},
    ),
    (
        "BertForMaskedLM",
        {"vocab_size": 96, **BLOCK},
        {**BERT_ROLES, "transform.dense.weight": "head", "predictions.bias": "head"},
    ),
    ("BertForSequenceClassification", {"vocab_size": 96, **BLOCK}, {**BERT_ROLES, "classifier.weight": "head"}),
    (
        "ViTForImageClassification",
        {**VISION, "num_labels": 3},
        {
            "embeddings.cls_token": "rest",
            "embeddings.position_embeddings": "rest",
            "patch_embeddings.projection.weight": "rest",
            "attention.q_proj.weight": "matrix out_in",
            "classifier.weight": "head",
        },
    ),
    (
        "CLIPModel",
        {"text_config": {**SMALL, **BLOCK}, "vision_config": VISION, "projection_dim": 20},
        {
            "vision_model.embeddings.patch_embedding.weight": "rest",
            "vision_model.embeddings.position_embedding.weight": "embedding",
            "text_model.embeddings.token_embedding.weight": "embedding",
            "vision_model.encoder.layers.0.mlp.fc1.weight": "matrix out_in",
            "visual_projection.weight": "matrix out_in",
            "logit_scale": "rest",
        },
    ),
    (
        "CLIPForImageClassification",
        {"text_config": {**SMALL, **BLOCK}, "vision_config": VISION, "num_labels": 3},
        {"patch_embedding.weight": "rest", "mlp.fc1.weight": "matrix out_in", "classifier.weight": "head"},
    ),
    (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": 5,
        },
        {
            "vision_tower.embeddings.patch_embedding.weight": "rest",
            "vision_tower.encoder.layers.0.self_attn.q_proj.weight": "matrix out_in",
            "multi_modal_projector.linear_1.weight": "matrix out_in",
            "language_model.embed_tokens.weight": "embedding",
            "language_model.layers.0.mlp.down_proj.weight": "matrix out_in",
            "lm_head.weight": "head",
        },
    ),
]
MODEL_IDS = [f"{name}{'-tied' * ('tie_word_embeddings' in sizes)}" for name, sizes, _ in ARCHITECTURES]


def build(name, sizes, device="meta"):
    model_class = getattr(transformers, name, None)
    if model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with torch.device(device):
        return model_class(model_class.config_class(**sizes))


def assert_exhaustive_and_disjoint(model, entries):
    assert [id(e.parameter) for e in entries] == list(dict.fromkeys(id(e.parameter) for e in entries))
    assert {id(e.parameter) for e in entries} == {id(p) for p in model.parameters() if p.requires_grad}
    names = dict(model.named_parameters())
    assert all(names[e.name] is e.parameter for e in entries)
    positions = [ROLES.index(e.role) for e in entries]
    assert positions == sorted(positions)
    assert entries[0].role in ("matrix", "adapter")


def role_of(entries, ending):
    """The role of all parameters with this end of name, with the layout of matrices; None if there are none."""
    found = {
        f"{e.role} {e.layout}" if e.role == "matrix" else e.role
        for e in entries
        if f".{e.name}".endswith(f".{ending}")
    }
    assert len(found) <= 1, f"{ending}: {found}"
    return found.pop() if found else None


def roles(model, **options):
    return {entry.name: entry.role for entry in partition_parameters(model, **options)}


def matrices(model, target_modules):
    """The ends of the names of what is a matrix; everything still has a role once."""
    entries = partition_parameters(model, target_modules)
    assert_exhaustive_and_disjoint(model, entries)
    return {e.name.removesuffix(".weight").rsplit(".", 1)[-1] for e in entries if e.role == "matrix"}

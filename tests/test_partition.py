"""Claims about who is a matrix: every trainable parameter once, by module and storage, over real architectures."""

import collections

import pytest
import torch
import transformers
from conftest import BLOCK, SMALL, TINY_MODELS, tiny_inputs
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from hf_stateless.trainer.partition import ROLES, describe, partition_parameters
from hf_stateless.update.layout import LAYOUTS


# PEFT 0.21 reads `is_gradient_checkpointing`, which transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

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


@pytest.mark.parametrize(("name", "sizes", "expected"), ARCHITECTURES, ids=MODEL_IDS)
def test_every_parameter_of_an_architecture_has_its_role_once(name, sizes, expected):
    model = build(name, sizes)
    entries = partition_parameters(model)
    assert_exhaustive_and_disjoint(model, entries)
    assert {ending: role_of(entries, ending) for ending in expected} == expected


@pytest.mark.parametrize(("name", "sizes"), [entry[:2] for entry in ARCHITECTURES], ids=MODEL_IDS)
def test_decay_is_what_the_trainer_decays(name, sizes):
    model = build(name, sizes)
    decayed = set(Trainer.get_decay_parameter_names(object.__new__(Trainer), model))
    entries = partition_parameters(model)
    assert {e.name for e in entries if e.decay} == {e.name for e in entries} & decayed


def test_nothing_is_stored_on_the_model(any_model):
    _, model = any_model
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    partition_parameters(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.slow
def test_every_causal_language_model_of_transformers_is_covered():
    sizes = {**TEXT, **EXPERTS, "n_routed_experts": 4, "d_model": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    covered, experts = [], []
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        model = tiny_on_meta(model_type, sizes)
        if model is None:
            continue
        entries = partition_parameters(model)
        assert_exhaustive_and_disjoint(model, entries)
        assert role_of(entries, "lm_head.weight") in ("head", "embedding", None), model_type
        covered.append(model_type)
        for entry in entries:
            if entry.role == "matrix" and entry.name.endswith("experts.down_proj"):
                hidden = model.get_input_embeddings().embedding_dim
                assert LAYOUTS[entry.layout].as_matrix(entry.parameter).shape[-2] == hidden, entry.name
                experts.append(model_type)
    assert len(covered) >= max(40, 0.75 * len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    assert len(set(experts)) >= 10


def tiny_on_meta(model_type, sizes):
    """A model of this type with small sizes where its config has them, or None if they do not fit together."""
    try:
        config_class = CONFIG_MAPPING[model_type]
        known = {k: v for k, v in sizes.items() if hasattr(config_class(), k)}
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config_class(**known))
    except Exception:  # as many reasons as there are architectures
        return None


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_layout_says_what_the_forward_pass_does(make_model, name):
    model = make_model(name)
    layouts = {id(e.parameter): e.layout for e in partition_parameters(model)}
    seen = []

    def check(module, args, output):
        out_features, in_features = LAYOUTS[layouts[id(module.weight)]].as_matrix(module.weight).shape
        assert (args[0].shape[-1], output.shape[-1]) == (in_features, out_features)
        seen.append(in_features != out_features)

    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_hook(check)
    model(**tiny_inputs(name))
    assert any(seen)


@pytest.mark.parametrize(
    "name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM"]
)
def test_expert_layout_says_what_the_forward_pass_does(name):
    sizes = next(sizes for other, sizes, _ in ARCHITECTURES if other == name)
    model = build(name, sizes, device="cpu")
    layouts = {e.name.rsplit(".", 1)[-1]: e.layout for e in partition_parameters(model) if ".experts." in e.name}
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    calls = []
    experts.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_() if p.ndim == 3 else p.zero_()
        model(torch.arange(3, 11).unsqueeze(0))
        (x, *others), kwargs = calls[0]
        original = experts(x, *others, **kwargs)

        # The rows of the last matrix are the output features: without row 1, output 1 is gone and no other changes.
        without_row = experts.down_proj.clone()
        LAYOUTS[layouts["down_proj"]].as_matrix(without_row)[:, 1] = 0
        experts.down_proj, kept = nn.Parameter(without_row), experts.down_proj
        expected = original.clone()
        expected[..., 1] = 0
        torch.testing.assert_close(experts(x, *others, **kwargs), expected, rtol=1e-4, atol=1e-4)
        assert original[..., 1].abs().max() > 1e-2
        experts.down_proj = kept

        # The columns of the first are the input features: without column 1 the input's feature 1 does not count.
        without_feature = x.clone()
        without_feature[..., 1] = 0
        expected = experts(without_feature, *others, **kwargs)
        LAYOUTS[layouts["gate_up_proj"]].as_matrix(experts.gate_up_proj)[..., 1] = 0
        torch.testing.assert_close(experts(x, *others, **kwargs), expected, rtol=1e-4, atol=1e-4)
        assert (expected - original).abs().max() > 1e-2


def test_tied_weight_is_one_embedding(make_model):
    model = make_model("llama_tied")
    assert [name for name, role in roles(model).items() if role in ("embedding", "head")] == [
        "model.embed_tokens.weight"
    ]


def test_two_parameters_over_one_storage_have_one_role(make_model):
    model = make_model("llama")
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    assert_exhaustive_and_disjoint(model, partition_parameters(model))
    assert roles(model)["lm_head.weight"] == roles(model)["model.embed_tokens.weight"] == "embedding"


def test_weight_shared_by_two_layers_appears_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert roles(model) == {"0.weight": "matrix", "0.bias": "rest", "2.bias": "rest"}


def test_plain_modules_have_matrices_too():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Conv1d(8, 2, 3))
    model.append(nn.Linear(8, 3, bias=False))
    found = roles(model)
    assert {name: role for name, role in found.items() if role != "rest"} == {
        "0.weight": "embedding",
        "1.weight": "matrix",
        "4.weight": "matrix",
    }
    assert len(found) == 8


class ValueHead(nn.Module):
    """A model inside another module, as TRL's value head."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Linear(32, 1)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "compiled": torch.compile,
    "DDP": nn.parallel.DistributedDataParallel,
    "compiled and DDP": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),
    "DataParallel": nn.DataParallel,
    "value head": ValueHead,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "bert"])
def test_wrapped_model_has_the_roles_of_the_model(make_model, process_group, name, wrapper):
    model = make_model(name)
    expected = {id(e.parameter): e.role for e in partition_parameters(model)}
    wrapped = WRAPPERS[wrapper](model)
    entries = partition_parameters(wrapped)
    assert_exhaustive_and_disjoint(wrapped, entries)
    assert {id(e.parameter): e.role for e in entries if "v_head" not in e.name} == expected
    decayed = set(Trainer.get_decay_parameter_names(object.__new__(Trainer), wrapped))
    assert {e.name for e in entries if e.decay} == {e.name for e in entries} & decayed


def test_sharded_model_has_the_roles_and_layouts_of_the_model(process_group):
    name, sizes, expected = next(entry for entry in ARCHITECTURES if entry[0] == "Llama4ForCausalLM")
    model = build(name, sizes, device="cpu")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for module in (*(m for m in model.modules() if type(m).__name__ == "Llama4TextExperts"), model):
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    entries = partition_parameters(model)
    assert_exhaustive_and_disjoint(model, entries)
    assert {ending: role_of(entries, ending) for ending in expected} == expected


def test_fsdp1_is_refused(make_model, process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(make_model("llama"), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^FSDP1 flattens parameters.*fsdp_version: 2.*TrainingArguments\.$"):
        partition_parameters(model)


# Options of LoraConfig, and the roles of what is trainable by a part of its name.
LORA = {
    "plain": ("llama", {"target_modules": "all-linear"}, {"lora_": "adapter"}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}, {"lora_": "adapter"}),
    "dora": (
        "llama",
        {"target_modules": ["q_proj"], "use_dora": True},
        {"lora_A": "adapter", "lora_B": "adapter", "lora_magnitude_vector": "rest"},
    ),
    "modules_to_save": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"lora_": "adapter", "lm_head.modules_to_save": "head", "embed_tokens.modules_to_save": "embedding"},
    ),
    "embedding": (
        "llama",
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"q_proj.lora_": "adapter", "lora_embedding_": "embedding"},
    ),
    "token_indices": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        {"q_proj.lora_": "adapter", "trainable_tokens_delta": "embedding"},
    ),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}, {"lora_": "adapter"}),
    "tied_head": ("llama_tied", {"target_modules": ["q_proj", "lm_head"]}, {"lora_": "adapter"}),
    "conv1d_layout": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, {"lora_": "adapter"}),
    "classifier": (
        "vit",
        {"target_modules": ["fc1", "projection"], "modules_to_save": ["classifier"]},
        {"fc1.lora_": "adapter", "projection.lora_": "rest", "classifier.modules_to_save": "head"},
    ),
    "experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"lora_": "adapter"},
    ),
}


@pytest.mark.parametrize("case", LORA)
def test_adapters_are_matrices_of_their_own_and_the_base_is_left_out(make_model, case):
    peft = pytest.importorskip("peft")
    name, options, expected = LORA[case]
    model = peft.get_peft_model(make_model(name), peft.LoraConfig(r=4, **options))
    entries = partition_parameters(model)
    assert_exhaustive_and_disjoint(model, entries)
    for part, role in expected.items():
        assert {e.role for e in entries if part in e.name} == {role}, part
    assert all(any(part in e.name for part in expected) for e in entries)
    assert {e.name for e in entries if e.layout != "out_in"} == {e.name for e in entries if "embedding_A" in e.name}


@pytest.mark.filterwarnings("ignore")
def test_int8_base_is_left_out_under_lora(make_model, tmp_path):
    peft = pytest.importorskip("peft")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    make_model("llama").save_pretrained(tmp_path)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )
    model = peft.get_peft_model(quantised, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert any(isinstance(m, bitsandbytes.nn.Linear8bitLt) for m in model.modules())
    entries = partition_parameters(model)
    assert_exhaustive_and_disjoint(model, entries)
    assert {e.role for e in entries} == {"adapter"}


def test_frozen_parameters_are_left_out(make_model):
    model = make_model("llama")
    model.model.layers[0].requires_grad_(False)
    entries = partition_parameters(model)
    assert_exhaustive_and_disjoint(model, entries)
    assert not any("layers.0." in e.name for e in entries)


def matrices(model, target_modules):
    """The ends of the names of what is a matrix; everything still has a role once."""
    entries = partition_parameters(model, target_modules)
    assert_exhaustive_and_disjoint(model, entries)
    return {e.name.removesuffix(".weight").rsplit(".", 1)[-1] for e in entries if e.role == "matrix"}


ALL_OF_LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TARGETS = [
    (None, ALL_OF_LLAMA),
    ("all-linear", ALL_OF_LLAMA),
    ("all_linear", ALL_OF_LLAMA),
    (["mlp"], {"gate_proj", "up_proj", "down_proj"}),
    (["q_proj", "k_proj"], {"q_proj", "k_proj"}),
    (("q_proj",), {"q_proj"}),
    (r".*\.layers\.1\.self_attn\.[qk]_proj", {"q_proj", "k_proj"}),
    ([r".*\.[ov]_proj"], {"o_proj", "v_proj"}),
    (["q_proj", "lm_head"], {"q_proj", "lm_head"}),
]


@pytest.mark.parametrize(("target_modules", "expected"), TARGETS, ids=[str(target) for target, _ in TARGETS])
def test_target_modules_choose_the_matrices(make_model, target_modules, expected):
    assert matrices(make_model("llama"), target_modules) == expected


def test_target_modules_choose_convolutions_routers_and_shared_layers(make_model):
    model = make_model("vit")
    layouts = {e.name: e.layout for e in partition_parameters(model, ["projection"]) if e.role == "matrix"}
    assert layouts == {"vit.embeddings.patch_embeddings.projection.weight": "conv"}
    phimoe = build("PhimoeForCausalLM", {**TEXT, **EXPERTS})
    assert matrices(phimoe, ["router"]) == {"router"}
    shared = nn.ModuleDict({"first": nn.Linear(2, 2)})
    shared["second"] = shared["first"]
    assert roles(shared, target_modules=["second"])["first.weight"] == "matrix"


LISTED = r"down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj\. Type a list of them"
REFUSED = [
    (["nothing"], LISTED),
    ([], LISTED),
    ("q_proj", LISTED),
    (["embed_tokens"], LISTED),
    ("*q_proj", r"is no regular expression.*such as \['q_proj'\]|type a list for substrings"),
]


@pytest.mark.parametrize(("target_modules", "message"), REFUSED, ids=[str(target) for target, _ in REFUSED])
def test_targets_without_a_matrix_are_refused_in_one_line_that_lists_the_layers(make_model, target_modules, message):
    with pytest.raises(ValueError, match=message) as error:
        partition_parameters(make_model("llama"), target_modules)
    assert "\n" not in str(error.value)


def test_layers_of_adapters_are_listed_by_the_name_that_selects_them(make_model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match=r": q_proj, v_proj\. Type .*optim_target_modules=\['q_proj'\]\.$"):
        partition_parameters(model, ["nothing"])
    assert {e.role for e in partition_parameters(model, ["q_proj"])} == {"adapter", "rest"}


def test_models_without_a_trainable_matrix_are_refused(make_model):
    frozen = make_model("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter: every requires_grad is False"):
        partition_parameters(frozen)
    frozen.model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"no trainable matrix.*Type optim=adamw_torch\.$"):
        partition_parameters(frozen)
    with pytest.raises(ValueError, match=r"Linear layers, convolutions and heads of this model: 0\. Type"):
        partition_parameters(nn.Sequential(nn.Conv2d(3, 4, 2)))


def test_description_counts_every_parameter_once(make_model):
    from hf_stateless.trainer.factory import parameter_groups
    from hf_stateless.trainer.options import parse_options

    model = make_model("qwen3_moe")
    table = describe(parameter_groups(model, parse_options("sinkgd", {}), lr=1e-3)).splitlines()
    counts = collections.Counter()
    for line in table[1:]:
        role, _, tensors, parameters, _ = line.split()
        counts["tensors"] += int(tensors)
        counts["parameters"] += int(parameters.replace(",", ""))
        assert role in ROLES
    assert counts["tensors"] == len(list(model.parameters()))
    assert counts["parameters"] == sum(p.numel() for p in model.parameters())


def test_tiny_models_are_exhaustive(any_model):
    name, model = any_model
    assert name in TINY_MODELS
    assert_exhaustive_and_disjoint(model, partition_parameters(model))

"""What stands before a backbone, or is looked up, is no head and ties nothing, whatever it is called."""

import pytest
import torch
from architectures import roles
from test_heads import SIZES
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel, LlamaConfig, LlamaModel, SamConfig, SamModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from hf_stateless import create_optimizer
from hf_stateless.trainer.partition import partition_parameters


PRETRAINING = {"rates": "pretraining", "lr": 1e-3}


class SpeechLlama(LlamaPreTrainedModel):
    """Somebody's own model: sound is projected into the width of a LLaMA."""

    def __init__(self, config):
        super().__init__(config)
        self.audio_proj = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 32))
        self.conv = nn.Conv1d(20, 20, 3)
        self.queries = nn.Parameter(torch.zeros(8, 32))
        self.model = LlamaModel(config)
        self.score_of_sound = nn.Linear(32, 5)
        self.post_init()


class LanguageModel(nn.Module):
    def __init__(self, first):
        super().__init__()
        if first:
            self.token_embed = nn.Embedding(96, 32)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(32, 2, 64) for _ in range(2)])
        if not first:
            self.token_embed = nn.Embedding(96, 32)
        self.lm_head = nn.Linear(32, 96)


def sam():
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    vision |= {"output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48}
    prompts = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    parts = {"vision_config": vision, "prompt_encoder_config": prompts}
    return SamModel(SamConfig(**parts, mask_decoder_config={**decoder, "attention_downsample_rate": 1}))


def scales_of(model):
    """The factor on the rate of each parameter with rates of pretraining."""
    groups = create_optimizer(model, "swan", **PRETRAINING).param_groups
    scale = {name: group.get(f"{group['role']}_lr_scale", 1) for group in groups for name in group["param_names"]}
    return scale


def test_what_stands_before_the_backbone_is_no_head():
    model = SpeechLlama(LlamaConfig(**SIZES, num_key_value_heads=2))
    found = roles(model)
    assert found["audio_proj.0.weight"] == found["audio_proj.2.weight"] == "matrix"
    assert found["conv.weight"] == found["queries"] == "rest"
    assert found["score_of_sound.weight"] == "head"
    groups = create_optimizer(model, "swan", lr=1e-3, embeddings="factored").param_groups
    assert "factored" in {group["algorithm"] for group in groups}


def test_a_table_inside_a_head_is_an_input():
    """As of classes that a head looks up: only what is multiplied by its weight can be one with it."""
    model = SpeechLlama(LlamaConfig(**SIZES, num_key_value_heads=2))
    model.speaker_out = nn.ModuleDict({"voices": nn.Embedding(5, 32), "mix": nn.Linear(32, 32)})
    assert roles(model)["speaker_out.voices.weight"] == "embedding"
    assert not any(entry.tied for entry in partition_parameters(model))
    assert roles(model)["speaker_out.mix.weight"] == "head"


def test_an_encoder_that_is_called_the_backbone_has_no_heads_around_it():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=32, patch_size=8, num_register_tokens=2))
    assert set(roles(model).values()) == {"matrix", "rest"}
    assert set(scales_of(model).values()) == {1, 16}
    assert create_optimizer(model, "swan", lr=1e-3, embeddings="row_moment").param_groups


@pytest.mark.parametrize("first", [True, False], ids=["declared first", "declared last"])
def test_a_table_of_tokens_is_an_input_wherever_it_is_declared(first):
    model = LanguageModel(first)
    assert not any(entry.tied for entry in partition_parameters(model))
    assert (roles(model)["token_embed.weight"], roles(model)["lm_head.weight"]) == ("embedding", "head")
    assert scales_of(model)["token_embed.weight"] == 48


def test_prompts_and_masks_that_are_read_are_no_heads():
    model = sam()
    found = roles(model)
    assert not any(entry.tied for entry in partition_parameters(model))
    assert "head" not in {role for name, role in found.items() if ".mask_embed." in name}
    assert found["prompt_encoder.no_mask_embed.weight"] == "embedding"
    assert create_optimizer(model, "swan", lr=1e-3, embeddings="row_moment").param_groups


def test_a_bag_of_embeddings_is_an_embedding():
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(96, 16), "fc1": nn.Linear(16, 32), "out": nn.Linear(32, 2)})
    assert roles(model)["bag.weight"] == "embedding"
    optimizer = create_optimizer(model, "swan", lr=1e-3, embeddings="row_moment")
    before = model["bag"].weight.detach().clone()
    ids = torch.tensor([[1, 2, 3], [3, 4, 5]])
    model["out"](model["fc1"](model["bag"](ids)).relu()).square().sum().backward()
    optimizer.step()
    moved = (model["bag"].weight != before).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [1, 2, 3, 4, 5]


def test_a_linear_layer_with_groups_is_one_matrix_for_each():
    deepseek = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    model = nn.ModuleDict({"o_a": deepseek.DeepseekV4GroupedLinear(64, 32, 4), "other": nn.Linear(32, 32)})
    layouts = {entry.name: entry.layout for entry in partition_parameters(model)}
    assert layouts["o_a.weight"] == "out_in*4"
    alone = nn.ModuleDict({"o_a": nn.Linear(64, 8, bias=False), "other": nn.Linear(32, 32)})
    grad, before = torch.randn(32, 64), model["o_a"].weight.detach().clone()
    alone["o_a"].weight.data.copy_(before[8:16])
    for module, own in ((model, grad), (alone, grad[8:16])):
        module["o_a"].weight.grad = own.clone()
        create_optimizer(module, "swan", lr=0.1).step()
    torch.testing.assert_close(model["o_a"].weight[8:16], alone["o_a"].weight, rtol=1e-3, atol=1e-3)

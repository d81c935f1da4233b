"""The layout that a partition gives a matrix is what its forward pass does."""

import pytest
import torch
from architectures import ARCHITECTURES, build
from conftest import tiny_inputs
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_stateless.trainer.partition import partition_parameters
from hf_stateless.update.layout import LAYOUTS


# PEFT 0.21 reads `is_gradient_checkpointing`, which transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


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

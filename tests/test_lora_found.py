"""`lora=product`: which pairs are found in a model, and what is refused."""

import peft
import pytest
from lora_pairs import adapted, grouped
from torch import nn

from hf_stateless import create_lora_optimizer, create_optimizer
from hf_stateless.optimizer.lora_product import product_chain
from hf_stateless.trainer.adapters import lora_pairs


# PEFT 0.21 reads a name that transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def assert_paired(names):
    assert names
    assert len(names) % 2 == 0
    for a, b in zip(names[::2], names[1::2], strict=True):
        assert a != b
        assert a.replace("_A.", "_B.") == b


# Options of LoraConfig, and the scaling that its layers have.
PAIRED = {
    "plain": ({"target_modules": "all-linear"}, 2.0),
    "rslora": ({"target_modules": ["q_proj"], "use_rslora": True}, 4.0),
    "dora": ({"target_modules": ["q_proj", "down_proj"], "use_dora": True}, 2.0),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, 2.0),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 2.0),
    "bias": ({"target_modules": ["q_proj"], "lora_bias": True}, 2.0),
}


@pytest.mark.parametrize("case", PAIRED)
def test_the_factors_of_each_layer_are_a_pair(case, make_model):
    options, scaling = PAIRED[case]
    [(algorithm, found, names)] = grouped(adapted(make_model, **options))
    assert (algorithm, found) == ("lora_product", scaling)
    assert_paired(names)


@pytest.mark.parametrize("name", ["swan", "sinkgd", "multinorm", "swan_layerwise"])
def test_every_name_takes_the_option_with_its_own_chain(name, make_model):
    model = adapted(make_model, target_modules=["q_proj"])
    optimizer = create_lora_optimizer(model, name, lr=1e-2, lora="product")
    [group] = optimizer.param_groups
    expected = ("row_l2", "col_l2") if name == "sinkgd" else ("spectral",)
    assert (group["algorithm"], group["norms"], group["num_iterations"]) == (
        "lora_product",
        expected,
        product_chain(expected, 5)[1],
    )


def test_separate_is_the_default_and_leaves_each_factor_on_its_own(make_model):
    model = adapted(make_model, target_modules="all-linear")
    optimizer = create_optimizer(model, "swan", lr=1e-2)
    [(algorithm, scaling, names)] = grouped(model, lora="separate")
    assert (algorithm, scaling) == ("multinorm", None)
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.param_groups[0]["algorithm"] == "multinorm"


def test_several_adapters_are_paired_by_name_and_grouped_by_scaling(make_model):
    model = adapted(make_model, target_modules=["q_proj", "v_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    found = {scaling: names for _, scaling, names in grouped(model)}
    assert found.keys() == {2.0, 3.0}
    for adapter, names in (("default", found[2.0]), ("other", found[3.0])):
        assert_paired(names)
        assert all(f".{adapter}." in name for name in names)
    model.base_model.set_adapter("other")
    assert [scaling for _, scaling, _ in grouped(model)] == [3.0]


def test_alpha_patterns_give_groups_of_their_own(make_model):
    model = adapted(make_model, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 16})
    groups = grouped(model)
    assert sorted(scaling for _, scaling, _ in groups) == [2.0, 4.0]
    for _, _, names in groups:
        assert_paired(names)


def test_gpt2_layers_that_are_stored_transposed_have_ordinary_pairs(make_model):
    model = adapted(make_model, "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    [(algorithm, _, names)] = grouped(model)
    assert algorithm == "lora_product"
    assert_paired(names)


def test_an_embedding_is_paired_only_where_nothing_may_hold_state(make_model):
    model = adapted(make_model, target_modules=["q_proj", "embed_tokens"])
    [(_, _, names)] = grouped(model)
    assert not any("embedding" in name for name in names)
    groups = create_optimizer(model, "swan", lr=1e-2, lora="product", embeddings="stateless").param_groups
    table = next(g for g in groups if g["role"] == "embedding")
    assert (table["algorithm"], table["layout"]) == ("lora_product", "in_out")
    assert_paired(table["param_names"])
    apart = create_optimizer(model, "swan", lr=1e-2, embeddings="stateless").param_groups
    layouts = {g["param_names"][0].split(".")[-2]: g["layout"] for g in apart if g["role"] == "embedding"}
    assert layouts == {"lora_embedding_A": "in_out", "lora_embedding_B": "out_in"}


def test_kernels_are_paired_where_they_are_asked_for_and_grouped_convolutions_are_not():
    for groups, algorithm in ((1, "lora_product"), (2, "multinorm")):
        model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.Flatten(), nn.Linear(8, 2))
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
        found = grouped(model, target_modules=["lora_A", "lora_B"])
        assert {a for a, _, _ in found} == {algorithm}


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}


def frozen(model, letter):
    for name, p in model.named_parameters():
        if f"lora_{letter}" in name:
            p.requires_grad_(False)
    return model


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_factor_whose_partner_is_frozen_is_normalised_alone_with_one_line(letter, make_model, caplog):
    model = frozen(adapted(make_model, target_modules=["q_proj"]), letter)
    assert [algorithm for algorithm, _, _ in grouped(model)] == ["multinorm"]
    assert caplog.text.count("normalised on their own, as by lora=separate") == 1


def test_adapters_of_experts_are_pairs_in_a_group_of_their_own(make_model, caplog):
    """As before they were pairs, so that older checkpoints fit."""
    for lora, algorithm, scaling in (("product", "lora_product", 2.0), ("separate", "multinorm", None)):
        (_, _, others), (found, of_experts, names) = grouped(adapted(make_model, "qwen3_moe", **EXPERTS), lora=lora)
        assert (found, of_experts) == (algorithm, scaling)
        assert all("q_proj" in name for name in others)
        assert all("experts" in name for name in names)
        assert_paired(names)
    assert caplog.text.count("normalised on their own") == 0


def test_a_factor_that_two_layers_share_is_in_no_pair(make_model):
    model = adapted(make_model, target_modules=["q_proj"])
    first, second = (layer.self_attn.q_proj for layer in model.base_model.model.model.layers)
    assert len(list(lora_pairs(model))) == 2
    second.lora_A["default"].weight = first.lora_A["default"].weight
    assert list(lora_pairs(model)) == []
    assert [algorithm for algorithm, _, _ in grouped(model)] == ["multinorm"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adalora_is_refused_in_one_line(make_model):
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"])
    model = peft.get_peft_model(make_model("llama"), config)
    with pytest.raises(ValueError, match="ADALORA") as error:
        create_optimizer(model, "swan", lr=1e-2, lora="product")
    assert "\n" not in str(error.value)


def test_a_model_without_adapters_is_refused_by_the_factory_for_them(make_model):
    with pytest.raises(ValueError, match=r"get_peft_model.*create_optimizer") as error:
        create_lora_optimizer(make_model("llama"), lr=1e-2)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"lora='both' is not separate \| product"):
        create_optimizer(make_model("llama"), "swan", lr=1e-2, lora="both")

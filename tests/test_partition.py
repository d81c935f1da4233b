"""Which parameter is a matrix, an embedding, a head or the rest: each has one role, on every architecture."""

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    EXPERTS,
    MODEL_IDS,
    TEXT,
    assert_exhaustive_and_disjoint,
    build,
    role_of,
    roles,
)
from conftest import TINY_MODELS
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_stateless.trainer.partition import partition_parameters
from hf_stateless.update.layout import LAYOUTS


# PEFT 0.21 reads `is_gradient_checkpointing`, which transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


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


def test_frozen_parameters_are_left_out(make_model):
    model = make_model("llama")
    model.model.layers[0].requires_grad_(False)
    entries = partition_parameters(model)
    assert_exhaustive_and_disjoint(model, entries)
    assert not any("layers.0." in e.name for e in entries)


def test_models_without_a_trainable_matrix_are_refused(make_model):
    frozen = make_model("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter: every requires_grad is False"):
        partition_parameters(frozen)
    frozen.model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"no trainable matrix.*Type optim=adamw_torch\.$"):
        partition_parameters(frozen)
    with pytest.raises(ValueError, match=r"no linear layer but 1 convolution, .*optim_target_modules='0'"):
        partition_parameters(nn.Sequential(nn.Conv2d(3, 4, 2)))


def test_layers_without_a_shape_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"^2\.weight has no shape yet: run a forward pass"):
        partition_parameters(model)
    model(torch.ones(1, 4))
    assert roles(model)["2.weight"] == "matrix"


def test_tiny_models_are_exhaustive(any_model):
    name, model = any_model
    assert name in TINY_MODELS
    assert_exhaustive_and_disjoint(model, partition_parameters(model))

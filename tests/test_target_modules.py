"""`optim_target_modules` chooses the matrices, or says in one line which names there are."""

import re
import shlex

import pytest
import torch
from architectures import EXPERTS, TEXT, build, matrices, roles
from torch import nn
from torch.nn.utils import prune
from transformers import HfArgumentParser, ResNetConfig, ResNetForImageClassification, TrainingArguments

from hf_stateless.trainer.partition import partition_parameters


# PEFT 0.21 reads `is_gradient_checkpointing`, which transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


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


LISTED = r"down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj\. Type "
WHOLE = "no module has such a name as a whole"
# What a user types for Llama, a part of the answer, and what the value matches that he is told to type.
REFUSED = [
    (["nothing"], LISTED, ALL_OF_LLAMA),
    ([], LISTED, ALL_OF_LLAMA),
    ("", LISTED, ALL_OF_LLAMA),
    ("q_proj", WHOLE, {"q_proj"}),
    ("q_porj", WHOLE, {"q_proj"}),
    ("q_proj,k_proj", WHOLE, {"q_proj", "k_proj"}),
    ("['q_proj', 'k_proj']", WHOLE, {"q_proj", "k_proj"}),
    ("q_proj k_proj", WHOLE, {"q_proj", "k_proj"}),
    ("model.layers.0.mlp", r"no linear layer and no convolution \(LlamaMLP\)", {"gate_proj", "up_proj", "down_proj"}),
    ("mlp", WHOLE, {"gate_proj", "up_proj", "down_proj"}),
    (["embed_tokens"], LISTED, ALL_OF_LLAMA),
    (".*norm", r"no linear layer and no convolution \(LlamaRMSNorm\)", ALL_OF_LLAMA),
    ("*q_proj", "is no regular expression", {"q_proj"}),
    (["*"], "is no regular expression", ALL_OF_LLAMA),
    ("(q_proj|v_proj", "is no regular expression", {"q_proj", "v_proj"}),
    ("[*norm", "is no regular expression", ALL_OF_LLAMA),
    ("a{99999999999}", "is no regular expression", ALL_OF_LLAMA),
    (5, "is no list of names, regular expression or 'all-linear'", ALL_OF_LLAMA),
    ([["q_proj"]], "is no list of names, regular expression or 'all-linear'", {"q_proj"}),
]


def advised(model, target_modules=None):
    """The message of the refusal, and the value of `optim_target_modules` that it ends with."""
    with pytest.raises(ValueError, match=r"\S") as error:
        partition_parameters(model, target_modules)
    message = str(error.value)
    assert "\n" not in message
    value = re.search(r"optim_target_modules='([^']*)' \(on a command line in the same quotes\)", message)
    return message, value and value.group(1)


def typed(value):
    """What the Trainer gets when a value is typed in a shell: the quotes go, `HfArgumentParser` does the rest."""
    words = shlex.split(f"--output_dir unused --use_cpu --optim_target_modules '{value}'")
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)
    return arguments.optim_target_modules


@pytest.mark.parametrize(("target_modules", "message", "expected"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_targets_without_a_matrix_are_refused_with_a_value_that_works(make_model, target_modules, message, expected):
    model = make_model("llama")
    said, value = advised(model, target_modules)
    assert re.search(message, said)
    assert matrices(model, typed(value)) == expected


def test_a_long_value_is_not_repeated_whole(make_model):
    said, _ = advised(make_model("llama"), "x" * 10_000)
    assert len(said) < 1000


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
    return ResNetForImageClassification(ResNetConfig(**sizes))


def probed(model, head):
    model.requires_grad_(False)
    getattr(model, head).requires_grad_(True)
    return model


def with_lora(model, *names):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(names)))


NUMBERED = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Sequential(nn.Conv1d(4, 4, 2), nn.BatchNorm1d(4)))
NAMED = nn.ModuleDict({"a b": nn.Conv2d(3, 4, 2), "stem+": nn.Conv2d(3, 4, 2)})
# Models whose weights are no matrices although nothing was typed, what is said of them, and the matrices then.
NOT_TYPED = {
    "resnet": (lambda make: resnet(), "trains no linear layer but 8 convolutions and a head", 8),
    "probing a decoder": (lambda make: probed(make("llama"), "lm_head"), r"writes the output .*\(lm_head\)", 1),
    "probing an encoder": (lambda make: probed(make("bert"), "classifier"), r"writes the output .*\(classifier\)", 1),
    "LoRA on convolutions": (lambda make: with_lora(resnet(), "convolution"), "adapters are on convolutions", 16),
    "numbered convolutions": (lambda make: NUMBERED, "no linear layer but 2 convolutions, which AdamW updates", 2),
    "names that are no words": (lambda make: NAMED, "no linear layer but 2 convolutions", 2),
}


@pytest.mark.parametrize("kind", NOT_TYPED)
def test_a_model_without_linear_layers_is_told_what_it_has_and_a_value_that_works(kind, make_model):
    make, message, count = NOT_TYPED[kind]
    model = make(make_model)
    said, value = advised(model)
    assert re.search(message, said)
    assert "optim_target_modules=None" not in said
    assert "Type optim=adamw_torch, or " in said
    chosen = [e for e in partition_parameters(model, typed(value)) if e.role in ("matrix", "adapter")]
    assert len(chosen) == count


PARAMETRIZED = {
    "weight_norm": (nn.utils.parametrizations.weight_norm, "WeightNorm"),
    "spectral_norm": (nn.utils.parametrizations.spectral_norm, "SpectralNorm"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, "Orthogonal"),
    "old weight_norm": (nn.utils.weight_norm, "weight_norm"),
    "old spectral_norm": (nn.utils.spectral_norm, "spectral_norm"),
    "pruning": (lambda layer: prune.identity(layer, "weight"), "pruning"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("target_modules", [None, ["0"], "0"], ids=str)
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_weights_under_a_parametrization_are_named_with_what_takes_it_off(kind, target_modules):
    wrap, name = PARAMETRIZED[kind]
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.LayerNorm(4))
    said, value = advised(model, target_modules)
    assert f"the weights of 1 layer (0) are computed by {name}: take it off by torch.nn.utils." in said
    assert "type optim=adamw_torch" in said
    assert value is None
    layer, fix = model[0], re.search(r"by (torch\.\S+)\((layer[^)]*)\)", said)
    exec(f"{fix.group(1)}({fix.group(2)})", {"torch": torch, "layer": layer})
    assert roles(model)["0.weight"] == "matrix"


def test_frozen_and_tied_layers_are_said_to_be_so(make_model):
    frozen = make_model("llama")
    frozen.model.layers[0].requires_grad_(False)
    assert "what it names (q_proj) is frozen" in advised(frozen, r".*layers.0.*q_proj")[0]
    assert "what it names (lm_head) is an embedding too" in advised(make_model("llama_tied"), ["lm_head"])[0]
    assert advised(make_model("llama_tied"), "(lm_head")[1] == "all-linear"
    norms = make_model("llama").requires_grad_(False)
    norms.model.norm.requires_grad_(True)
    assert "its 15 linear layers and convolutions are frozen, and what it trains (1 tensors" in advised(norms)[0]


def test_layers_of_adapters_are_listed_by_the_name_that_selects_them(make_model):
    model = with_lora(make_model("llama"), "q_proj", "v_proj")
    said, value = advised(model, ["nothing"])
    assert ": q_proj, v_proj. Type " in said
    assert typed(value) == "all-linear"
    said, value = advised(model, "v_proj")
    assert {e.name.split(".")[-4] for e in partition_parameters(model, typed(value)) if e.role == "adapter"} == {
        "v_proj"
    }

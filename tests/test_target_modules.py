"""`optim_target_modules` chooses the matrices, or says in one line which names there are."""

import pytest
from architectures import EXPERTS, TEXT, build, matrices, roles
from torch import nn

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

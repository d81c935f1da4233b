"""Which weights are matrices by their use: not gates, routers and tables of biases, but more than `nn.Linear`."""

import pytest
import torch
from architectures import BLOCK, SMALL, TEXT, build, role_of, roles
from torch import nn

from hf_stateless import create_optimizer
from hf_stateless.trainer.partition import partition_parameters
from hf_stateless.update.layout import layout_of


class Moe(nn.Module):
    """A mixture of experts of somebody's own, with as many experts as the width where that is asked for."""

    def __init__(self, experts=8, width=16, **gates):
        super().__init__()
        for name, gate in gates.items():
            self.register_module(name, gate)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(experts)])


NOT_MATRICES = {
    "a gate beside experts": (lambda: Moe(gate=nn.Linear(16, 8)), {"gate.weight"}),
    "as many experts as inputs": (lambda: Moe(experts=16, router=nn.Linear(16, 16)), {"router.weight"}),
    "a gate of one row": (lambda: Moe(shared_expert_gate=nn.Linear(16, 1)), {"shared_expert_gate.weight"}),
    "a gate for each of four": (lambda: Moe(moe_gate=nn.Linear(16, 4)), {"moe_gate.weight"}),
    "a router in a sequence": (
        lambda: Moe(router=nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))),
        {"router.0.weight", "router.1.weight"},
    ),
    "a column": (lambda: nn.Sequential(nn.Linear(1, 16), nn.Linear(16, 16)), {"0.weight"}),
    "a depthwise convolution of one point": (
        lambda: nn.Sequential(nn.Conv1d(8, 8, 1, groups=8), nn.Conv1d(8, 8, 1)),
        {"0.weight"},
    ),
    "biases of positions": (
        lambda: nn.ModuleDict({"q": nn.Linear(16, 16), "relative_position_bias_mlp": nn.Linear(2, 4)}),
        {"relative_position_bias_mlp.weight"},
    ),
}


@pytest.mark.parametrize("case", NOT_MATRICES)
def test_gates_routers_and_tables_are_no_matrices(case):
    make, expected = NOT_MATRICES[case]
    found = {name: role for name, role in roles(make()).items() if name.endswith("weight")}
    assert {name for name, role in found.items() if role != "matrix"} == expected
    assert {found[name] for name in expected} == {"rest"}


@pytest.mark.parametrize("name", ["gate_proj", "gate_up_proj", "forget_gate_proj", "output_gate", "gated_mlp"])
def test_the_gate_of_an_mlp_is_a_matrix(name):
    model = nn.ModuleDict({name: nn.Linear(64, 8), "down": nn.Linear(8, 64)})
    assert roles(model)[f"{name}.weight"] == "matrix"


@pytest.mark.parametrize(
    "name",
    [
        "gating_network",
        "gate_linear",
        "router_weights",
        "routing",
        "noisy_gate",
        "expert_selector",
        "w_g",
    ],
)
def test_what_scores_the_experts_beside_it_is_a_router_by_any_name(name):
    for router in (nn.Linear(16, 6), nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 6))):
        found = roles(Moe(experts=6, **{name: router, "up": nn.Linear(16, 16)}))
        assert {role for weight, role in found.items() if weight.startswith(name)} == {"rest"}
        assert found["up.weight"] == found["experts.0.weight"] == "matrix"


@pytest.mark.parametrize("width", [4, 8, 16])
def test_the_gate_inside_of_an_expert_is_a_matrix(width):
    def swiglu():
        return nn.ModuleDict({"gate": nn.Linear(32, width), "up": nn.Linear(32, width), "down": nn.Linear(width, 32)})

    experts = nn.ModuleList([swiglu() for _ in range(3)])
    model = nn.ModuleDict({"router": nn.Linear(32, 3), "shared": swiglu(), "experts": experts})
    found = roles(model)
    assert {found[f"experts.{i}.gate.weight"] for i in range(3)} == {found["shared.gate.weight"]} == {"matrix"}
    assert found["router.weight"] == "rest"


def test_a_wide_gate_without_experts_is_a_matrix():
    assert roles(nn.ModuleDict({"gate": nn.Linear(16, 16), "up": nn.Linear(16, 16)}))["gate.weight"] == "matrix"


def test_named_gates_become_matrices():
    model = Moe(gate=nn.Linear(16, 8), shared_gate=nn.Linear(16, 1))
    found = roles(model, target_modules=["gate", "experts"])
    assert found["gate.weight"] == found["shared_gate.weight"] == "matrix"


AS_STORED = {
    "attention of torch": (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight", "out_in*3", (3, 8, 8)),
    "attention with other keys": (
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
        "v_proj_weight",
        "out_in",
        (8, 6),
    ),
    "LSTM": (lambda: nn.LSTM(6, 8, bidirectional=True), "weight_hh_l0_reverse", "out_in*4", (4, 8, 8)),
    "LSTM with a projection": (lambda: nn.LSTM(6, 8, proj_size=4), "weight_hr_l0", "out_in", (4, 8)),
    "GRU": (lambda: nn.GRU(6, 8), "weight_ih_l0", "out_in*3", (3, 8, 6)),
    "a cell": (lambda: nn.RNNCell(6, 8), "weight_hh", "out_in", (8, 8)),
    "a convolution of one point": (lambda: nn.Conv1d(6, 8, 1), "weight", "conv", (8, 6)),
    "in two groups": (lambda: nn.Conv1d(6, 8, 1, groups=2), "weight", "conv*2", (2, 4, 3)),
}


@pytest.mark.parametrize("case", AS_STORED)
def test_weights_of_other_layers_are_matrices_as_they_are_stored(case):
    make, name, layout, shape = AS_STORED[case]
    (entry,) = [e for e in partition_parameters(make()) if e.name == name]
    assert (entry.role, entry.layout) == ("matrix", layout)
    assert tuple(layout_of(layout).as_matrix(entry.parameter).shape) == shape


RAW = [
    (
        "XLNetLMHeadModel",
        {**SMALL, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        {"rel_attn.q": "matrix in_outs", "rel_attn.o": "matrix conv", "rel_attn.r_w_bias": "rest"},
    ),
    (
        "FunnelModel",
        {**SMALL, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
        {"attention.r_kernel": "matrix in_outs", "attention.r_w_bias": "rest"},
    ),
    (
        "SqueezeBertForMaskedLM",
        {**SMALL, **BLOCK, "embedding_size": 32},
        {"attention.query.weight": "matrix conv*4", "post_attention.conv1d.weight": "matrix conv"},
    ),
    (
        "IBertForMaskedLM",
        {**SMALL, **BLOCK},
        {
            "self.query.weight": "matrix out_in",
            "word_embeddings.weight": "embedding",
            "lm_head.dense.weight": "head",
        },
    ),
    (
        "Qwen2MoeForCausalLM",
        {**TEXT, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
        {"shared_expert_gate.weight": "rest", "shared_expert.up_proj.weight": "matrix out_in"},
    ),
]


@pytest.mark.parametrize(("name", "sizes", "expected"), RAW, ids=[entry[0] for entry in RAW])
def test_weights_that_a_model_multiplies_by_itself_have_their_role(name, sizes, expected):
    entries = partition_parameters(build(name, sizes))
    assert {ending: role_of(entries, ending) for ending in expected} == expected


def test_convolutions_of_one_point_alone_are_left_out():
    images = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)]
    with pytest.raises(ValueError, match="no trainable matrix"):
        partition_parameters(nn.Sequential(*images))
    found = roles(nn.Sequential(*images, nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 4)))
    assert [name for name, role in found.items() if role == "matrix"] == [
        "2.weight",
        "3.weight",
        "5.weight",
        "6.weight",
    ]


@pytest.mark.parametrize("name", ["swan", "sinkgd", "swan_layerwise"])
@pytest.mark.parametrize("kind", ["MultiheadAttention", "LSTM", "Conv1d"])
def test_blocks_of_other_layers_are_updated_each_on_its_own(name, kind):
    torch.manual_seed(0)
    layers = {
        "MultiheadAttention": (nn.MultiheadAttention(8, 2), "in_proj_weight", 3),
        "LSTM": (nn.LSTM(8, 8), "weight_hh_l0", 4),
        "Conv1d": (nn.Conv1d(16, 16, 1, groups=2), "weight", 2),
    }
    layer, stored, blocks = layers[kind]
    model = nn.ModuleDict({"layer": layer, "beside": nn.Linear(4, 4)})
    optimizer = create_optimizer(model, name, lr=1e-2)
    weight = getattr(layer, stored)
    before = weight.detach().clone()
    # The first block has a gradient a thousand times as large and moves by the same; the last has none and stays.
    scale = torch.ones(blocks)
    scale[0], scale[-1] = 1e3, 0
    scale = scale.repeat_interleave(len(weight) // blocks).reshape(-1, *[1] * (weight.ndim - 1))
    (weight * torch.randn_like(weight) * scale).sum().backward()
    optimizer.step()
    moved = [block.square().mean().sqrt() for block in (weight.detach() - before).chunk(blocks)]
    assert moved[-1] == 0
    assert all(torch.isclose(m, moved[0], rtol=0.05) and m > 0 for m in moved[:-1])

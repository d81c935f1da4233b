"""Heads in modules of one's own: what writes tokens, classes or values is a head, a layer is a matrix anywhere."""

import itertools

import pytest
import torch
from architectures import roles
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PretrainedConfig, PreTrainedModel

from hf_stateless import create_optimizer
from hf_stateless.trainer.assumed import assumptions
from hf_stateless.trainer.factory import parameter_groups
from hf_stateless.trainer.optim_args import parse_options


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}


def bert():
    return BertModel(BertConfig(**SIZES))


def llama():
    return LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2))


class Block(nn.Module):
    def __init__(self, norm=True):
        super().__init__()
        self.norm = nn.LayerNorm(32) if norm else nn.Identity()
        self.qkv, self.fc, self.proj = nn.Linear(32, 96), nn.Linear(32, 64), nn.Linear(64, 32)


class HeadedAttention(nn.Module):
    """Attention whose own heads are layers called so."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.ModuleDict({"key": nn.Linear(32, 8), "query": nn.Linear(32, 8)})] * 2)


def gpt(block=Block, **parts):
    """Tokens through layers, with whatever else is given around them, in the order given."""
    model = nn.Module()
    for name, part in {"wte": nn.Embedding(96, 32), "h": nn.ModuleList([block(), block()]), **parts}.items():
        model.register_module(name, part)
    return model


def around(*, first=(), backbone=bert, then=()):
    model = nn.Module()
    for name, part in [*first, ("backbone", backbone()), *then]:
        model.register_module(name, part)
    return model


class Foreign(PreTrainedModel):
    """A model of somebody's own, as code on the Hub has it."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder, self.regress = bert(), nn.Linear(32, 5)
        self.post_init()


MLP = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
HEADS = {
    "classifier behind a backbone": (lambda: around(then=[("classifier", nn.Linear(32, 3))]), {"classifier"}),
    "a name that says nothing": (lambda: around(then=[("out", nn.Linear(32, 3))]), {"out"}),
    "registered before the backbone": (lambda: around(first=[("out", nn.Linear(32, 3))]), {"out"}),
    "value head before the backbone": (
        lambda: around(first=[("v_head", nn.Linear(32, 1))], backbone=llama),
        {"v_head"},
    ),
    "a head of two layers": (lambda: around(then=[("mlp", MLP)]), {"mlp.0", "mlp.2"}),
    "two heads": (
        lambda: around(then=[("start", nn.Linear(32, 2)), ("labels", nn.Linear(32, 9))]),
        {"start", "labels"},
    ),
    "a model of the Hub": (lambda: Foreign(PretrainedConfig()), {"regress"}),
    "untied lm_head": (lambda: gpt(lm_head=nn.Linear(32, 96)), {"lm_head"}),
    "as many outputs as tokens": (lambda: gpt(decode=nn.Linear(32, 96)), {"decode"}),
    "layers without norms": (lambda: gpt(lambda: Block(norm=False), out=nn.Linear(32, 7)), {"out"}),
    "attention whose heads are called so": (lambda: gpt(HeadedAttention, out=nn.Linear(32, 7)), {"out"}),
    "a recurrent network": (
        lambda: nn.ModuleDict({"lstm": nn.LSTM(8, 16), "fc": nn.Linear(16, 4)}),
        {"fc"},
    ),
    "torch's own transformer": (
        lambda: nn.ModuleDict(
            {
                "inp": nn.Linear(7, 32),
                "enc": nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
                "out": nn.Linear(32, 7),
            }
        ),
        {"out"},
    ),
    "an image model with fc": (
        lambda: nn.ModuleDict({"layer1": nn.Sequential(Block(), Block()), "fc": nn.Linear(32, 10)}),
        {"fc"},
    ),
    "distilled": (
        lambda: gpt(head=nn.Linear(32, 10), head_dist=nn.Linear(32, 10)),
        {"head", "head_dist"},
    ),
    "boxes for each layer": (
        lambda: gpt(class_embed=nn.ModuleList([nn.Linear(32, 5)] * 2), bbox_embed=nn.ModuleList([MLP, MLP])),
        {"class_embed.0", "bbox_embed.0.0", "bbox_embed.0.2"},
    ),
    "a projection between two models": (
        lambda: around(then=[("projector", nn.Linear(32, 32)), ("lm", llama()), ("value", nn.Linear(32, 1))]),
        {"value"},
    ),
    "a bridge registered last": (lambda: around(then=[("lm", llama()), ("connector", nn.Linear(32, 32))]), set()),
    "a decoder behind the backbone": (
        lambda: around(
            then=[
                ("to_decoder", nn.Linear(32, 32)),
                ("decoder", nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64), 2)),
                ("pixels", nn.Linear(32, 12)),
            ]
        ),
        {"pixels"},
    ),
    "a network of two layers": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), set()),
}


@pytest.mark.parametrize("case", HEADS)
def test_what_writes_the_output_is_a_head_and_layers_are_matrices(case):
    make, heads = HEADS[case]
    found = {name: role for name, role in roles(make()).items() if name.endswith("weight") or "weight_" in name}
    assert {name.removesuffix(".weight") for name, role in found.items() if role == "head"} == heads
    inner = {name for name in found if any(part in name for part in ("qkv", "layers.0.linear", "query", "lstm"))}
    assert {found[name] for name in inner} <= {"matrix"}
    assert any(role == "matrix" for role in found.values())


def lines(model):
    return list(assumptions(model, parameter_groups(model, parse_options("swan", {}), lr=1e-3)))


@pytest.mark.parametrize(
    "case", ["a name that says nothing", "a head of two layers", "a model of the Hub", "two heads"]
)
def test_an_assumed_head_is_told_with_a_value_that_makes_it_a_matrix(case):
    make, heads = HEADS[case]
    model = make()
    (line,) = lines(model)
    assert line.startswith("Taken for heads, since they stand behind the layers")
    assert all(head in line for head in heads)
    before = {name for name, role in roles(model).items() if role == "matrix"}
    typed = line.split("optim_target_modules='")[1].split("'")[0]
    after = {name for name, role in roles(model, target_modules=typed).items() if role == "matrix"}
    assert after == before | {f"{head}.weight" for head in heads}


@pytest.mark.parametrize("sizes", [(8, 16, 3), (8, 4, 4, 2), (5, 5, 1)])
def test_a_last_layer_that_nothing_tells_is_told_with_a_value_that_leaves_it_out(sizes):
    model = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(sizes)))
    if sizes[-1] == 1:
        model.append(nn.Linear(4, 4))
    (line,) = lines(model)
    last = str(len(model) - 1)
    assert f"the last linear layer, {last}," in line
    typed = line.split("optim_target_modules='")[1].split("'")[0]
    matrices = {name for name, role in roles(model).items() if role == "matrix"}
    left = {name for name, role in roles(model, target_modules=typed).items() if role == "matrix"}
    assert left == matrices - {f"{last}.weight"}


@pytest.mark.parametrize(
    "make", [bert, llama, lambda: nn.Sequential(nn.Linear(4, 4)), lambda: gpt(lm_head=nn.Linear(32, 96))]
)
def test_nothing_is_told_where_all_is_known(make):
    assert lines(make()) == []


def test_a_small_share_is_told_with_the_largest_of_the_rest():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(16, 16, 5), nn.Conv2d(3, 4, 3))
    (line,) = lines(model)
    assert line.startswith("Only 0% of the trained weights outside embeddings and heads are matrices")
    assert line.index("1.weight (16, 16, 5, 5)") < line.index("2.weight (4, 3, 3, 3)")
    model[1].requires_grad_(False)
    model[2].requires_grad_(False)
    assert lines(model) == []


def test_what_was_assumed_is_logged_once_and_not_where_the_user_chose(caplog):
    model = HEADS["a name that says nothing"][0]()
    create_optimizer(model, "sinkgd", lr=1e-3)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [f"optim=sinkgd: {lines(model)[0]}"]
    caplog.clear()
    create_optimizer(model, "sinkgd", lr=1e-3, target_modules="all-linear")
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_heads_of_a_compiled_and_of_a_sharded_class_are_the_same():
    model = HEADS["a model of the Hub"][0]()
    expected = roles(model)
    compiled = {name.replace("_orig_mod.", ""): role for name, role in roles(torch.compile(model)).items()}
    assert compiled == expected
    model.__class__ = type("FSDPForeign", (Foreign,), {})
    assert roles(model) == expected


class OneHead(nn.Module):
    """Attention with one head, as it is first taught."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 16)


def encoder(**parts):
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    return nn.ModuleDict({"layers": layers, **parts})


@pytest.mark.parametrize(
    "name", ["proj", "projection", "final_proj", "out_proj", "unembed", "embed_out", "vocab_proj"]
)
def test_a_last_layer_is_a_head_whatever_it_is_called(name):
    model = encoder(**{name: nn.Linear(32, 7)})
    assert roles(model)[f"{name}.weight"] == "head"
    assert name in lines(model)[0]


@pytest.mark.parametrize("name", ["decoder", "hidden2tag", "lin"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_what_follows_a_recurrent_layer_is_a_head(kind, name):
    model = nn.ModuleDict({"rnn": kind(8, 16), name: nn.Linear(16, 5)})
    assert roles(model)[f"{name}.weight"] == "head"
    assert name in lines(model)[0]


@pytest.mark.parametrize("name", ["out", "fc_out", "output"])
def test_an_output_declared_before_the_layers_is_a_head(name):
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    model = nn.ModuleDict({name: nn.Linear(32, 7), "layers": layers})
    assert roles(model)[f"{name}.weight"] == "head"


@pytest.mark.parametrize("name", ["token_embed", "class_embed", "mask_embed", "value_embed"])
def test_a_layer_that_reads_is_no_head(name):
    model = nn.ModuleDict({name: nn.Linear(7, 32), **dict(encoder(head=nn.Linear(32, 7)).items())})
    assert (roles(model)[f"{name}.weight"], roles(model)["head.weight"]) == ("matrix", "head")


def test_attention_that_is_called_a_head_is_made_of_matrices():
    model = nn.ModuleDict({"tok": nn.Embedding(96, 32), "sa_head": OneHead(), "lm_head": nn.Linear(16, 96)})
    found = roles(model)
    assert {found[f"sa_head.{name}.weight"] for name in ("key", "query", "value")} == {"matrix"}
    assert found["lm_head.weight"] == "head"


def test_a_bridge_behind_a_model_is_told_to_be_undecided():
    (line,) = lines(HEADS["a bridge registered last"][0]())
    assert line.startswith("Nothing tells whether the last linear layer, connector,")


def test_the_note_on_the_last_layer_names_the_last_one_that_is_a_matrix():
    model = nn.ModuleDict({"body": nn.Linear(4, 64), "actor": nn.Linear(64, 4), "critic": nn.Linear(64, 1)})
    assert "the last linear layer, actor," in lines(model)[0]


@pytest.mark.parametrize("names", [("a+b", "a(b", "c"), ("C++", "C#", "out"), ("x[0]", "y*", "z?")])
def test_a_note_survives_names_with_other_characters(names):
    model = nn.Module()
    for name in names:
        model.add_module(name, nn.Linear(8, 8))
    (line,) = lines(model)
    typed = line.split("optim_target_modules='")[1].split("'")[0]
    found = {name for name, role in roles(model, target_modules=typed).items() if role == "matrix"}
    assert found == {f"{name}.weight" for name in names[:2]}


def test_a_note_on_many_layers_stays_short():
    model = nn.Module()
    for i in range(60):
        model.add_module(f"{'abcdefghij'[i % 10]}{'klmnop'[i // 10]}_a_rather_long_name", nn.Linear(4, 4))
    assert len(lines(model)[0]) < 400

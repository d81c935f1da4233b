"""Claims about the way from a name and options to the optimizer, with and without a Trainer, and refused values."""

import io
import math

import numpy as np
import pytest
import torch
from factories import arguments, plain_environment, refusal  # noqa: F401
from transformers import Trainer, TrainingArguments

import hf_stateless
from hf_stateless import (
    PRESETS,
    MultiNormFactory,
    SinkGDFactory,
    SinkGDPolarFactory,
    StatelessOptimizer,
    SwanFactory,
    create_optimizer,
)
from hf_stateless.optimizer.options import embeddings
from hf_stateless.trainer.optim_args import optimizer_names
from hf_stateless.trainer.partition import partition_parameters


# TRL and PEFT read a name that transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

FACTORIES = {
    "swan": SwanFactory,
    "sinkgd": SinkGDFactory,
    "sinkgd_polar": SinkGDPolarFactory,
    "multinorm": MultiNormFactory,
}


def from_trainer(model, name, **options):
    """The optimizer as the Trainer makes it from arguments."""
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(name, **options), model)
    return cls(kwargs.pop("params"), **kwargs)


def groups_by_role(optimizer):
    return {group["role"]: group for group in optimizer.param_groups}


def options_of(group):
    return {key: value for key, value in group.items() if key != "params"}


def assert_same_groups(optimizer, expected):
    assert type(optimizer) is type(expected) is StatelessOptimizer
    assert [options_of(g) for g in optimizer.param_groups] == [options_of(g) for g in expected.param_groups]
    for group, other in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in other["params"]]


@pytest.mark.parametrize("name", PRESETS)
def test_optimizer_is_the_same_with_and_without_a_trainer(any_model, name):
    _, model = any_model
    given = {"lr_scale": 0.3, "adamw_lr": 2e-3, "adamw_beta2": 0.95, "seed": 3}
    text = ",".join(f"{key}={value}" for key, value in given.items())
    direct = create_optimizer(model, name, lr=1e-3, weight_decay=0.1, **given)
    assert_same_groups(from_trainer(model, name, optim_args=text, weight_decay=0.1), direct)
    assert_same_groups(FACTORIES[name]()(model, lr=1e-3, weight_decay=0.1, **given), direct)


@pytest.mark.parametrize("name", PRESETS)
def test_trainer_builds_the_optimizer_from_the_name_or_from_the_factory(make_model, name, tmp_path):
    model = make_model("llama")
    named = Trainer(model, arguments(name, output_dir=str(tmp_path), weight_decay=0.1)).create_optimizer()
    factory = (FACTORIES[name], {"lr": 1e-3, "weight_decay": 0.1})
    made = Trainer(model, arguments("sgd", output_dir=str(tmp_path)), optimizer_cls_and_kwargs=factory)
    assert_same_groups(made.create_optimizer(), named)


def test_matrices_come_first_so_that_their_learning_rate_is_the_logged_one(any_model):
    _, model = any_model
    optimizer = from_trainer(model, "sinkgd", optim_args="adamw_lr=5e-4")
    assert optimizer.param_groups[0]["role"] == "matrix"
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("embeddings", embeddings())
def test_groups_hold_every_trainable_parameter_once(any_model, embeddings):
    _, model = any_model
    optimizer = create_optimizer(model, "swan", lr=1e-3, weight_decay=0.1, embeddings=embeddings)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted({id(p) for p in model.parameters()})
    assert all(group["params"] for group in optimizer.param_groups)
    names = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert [id(names[name]) for name in group["param_names"]] == [id(p) for p in group["params"]]


@pytest.mark.parametrize("embeddings", embeddings())
def test_embeddings_option_chooses_the_rule_of_tables(make_model, embeddings):
    rules = {
        "adamw": {"embedding": "adamw", "head": "adamw", "rest": "adamw"},
        "adamw_8bit": {"embedding": "adamw_8bit", "head": "adamw_8bit", "rest": "adamw"},
        "sinkhorn_momentum": {"embedding": "sinkhorn_momentum", "head": "sinkhorn_momentum", "rest": "adamw"},
        **{rule: {"embedding": rule, "head": rule, "rest": "adamw"} for rule in ("row_moment", "column_moment")},
        "factored": {"embedding": "factored", "head": "factored", "rest": "adamw"},
        "stateless": {"embedding": "multinorm", "head": "multinorm", "rest": "multinorm"},
    }
    groups = create_optimizer(make_model("llama"), "sinkgd", lr=1e-3, embeddings=embeddings).param_groups
    assert {group["role"]: group["algorithm"] for group in groups} == {"matrix": "multinorm", **rules[embeddings]}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit"])
def test_weight_decay_falls_on_what_the_trainer_decays(make_model, name, tmp_path):
    model = make_model(name)
    built = {
        optim: Trainer(model, arguments(optim, output_dir=str(tmp_path), weight_decay=0.1)).create_optimizer()
        for optim in ("adamw_torch", "sinkgd")
    }
    decayed = {
        optim: {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        for optim, optimizer in built.items()
    }
    assert decayed["sinkgd"] == decayed["adamw_torch"]
    assert {group["weight_decay"] for group in built["sinkgd"].param_groups} == {0.0, 0.1}


class _DecaysHeads(Trainer):
    def get_decay_parameter_names(self, model):
        assert self.args.weight_decay
        return ["lm_head.weight"]


def test_a_trainer_that_overrides_what_decays_is_followed(make_model, tmp_path):
    model = make_model("llama")
    decayed = []
    for made in (arguments("sinkgd", output_dir=str(tmp_path), weight_decay=0.1), SwanFactory):
        by_name = isinstance(made, TrainingArguments)
        args = made if by_name else arguments("adamw_torch", output_dir=str(tmp_path), weight_decay=0.1)
        factory = None if by_name else (made, {"lr": 1e-3, "weight_decay": 0.1})
        groups = _DecaysHeads(model, args, optimizer_cls_and_kwargs=factory).create_optimizer().param_groups
        decayed.append([name for g in groups if g["weight_decay"] for name in g["param_names"]])
    assert decayed == [["lm_head.weight"]] * 2
    groups = create_optimizer(model, "sinkgd", lr=1e-3, weight_decay=0.1).param_groups
    assert {group["role"]: group["weight_decay"] for group in groups}["matrix"] == 0.1


def test_parameters_in_place_of_the_model_are_refused_with_what_to_type(make_model):
    model = make_model("llama")
    for given in (model.parameters(), list(model.named_parameters()), [{"params": [*model.parameters()]}]):
        for create in (create_optimizer, hf_stateless.create_lora_optimizer):
            with pytest.raises(ValueError, match=r"create_optimizer\(model, .*takes the model first.*: got a \w+\.$"):
                create(given, "swan", lr=1e-3)


def test_groups_that_lost_parameters_are_refused(make_model):
    """As sentence-transformers takes parameters out for `learning_rate_mapping`; layouts are known by position."""
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments("swan"), make_model("llama"))
    group = kwargs["params"][0]
    group["params"] = group["params"][1:]
    with pytest.raises(ValueError, match=r"13 parameters and 14 param_names.*learning_rate_mapping.*freeze"):
        cls(**kwargs)


def test_layout_of_a_group_is_that_of_its_weights(any_model):
    name, model = any_model
    layouts = {id(e.parameter): e.layout for e in partition_parameters(model)}
    groups = [g for g in create_optimizer(model, "sinkgd", lr=1e-3).param_groups if g["role"] == "matrix"]
    assert all({layouts[id(p)] for p in group["params"]} == {group["layout"]} for group in groups)
    assert {group["layout"] for group in groups} == {"in_out" if name == "gpt2" else "out_in"}


# Text of `optim_args`, and what the group of matrices says then.
REACHING = [
    ("sinkgd", "num_iterations=3,lr_scale=0.05", {"num_iterations": 3, "lr_scale": 0.05}),
    ("swan", "whitening=nsds", {"whitening": "nsds", "ns_steps": 2, "ns_beta": 0.4}),
    ("swan", "whitening=eigh", {"whitening": "eigh", "ns_steps": None, "ns_beta": None}),
    ("swan", "whitening=polar_express", {"whitening": "polar_express", "ns_steps": 5, "ns_beta": None}),
    (
        "swan",
        "whitening=newton_schulz,ns_steps=4,ns_beta=0.5",
        {"whitening": "newton_schulz", "ns_steps": 4, "ns_beta": 0.5},
    ),
    ("swan", "whitening=newton_schulz,ns_dtype=float16", {"whitening": "newton_schulz", "ns_dtype": "float16"}),
    ("swan", "center=false", {"norms": ("row_l2", "spectral")}),
    ("multinorm", "norms=row_l2+sign,num_iterations=2", {"norms": ("row_l2", "sign"), "num_iterations": 2}),
    ("multinorm", " norms = spectral ", {"norms": ("spectral",)}),
    ("sinkgd", "stochastic_rounding=false,seed=7", {"stochastic_rounding": False, "seed": 7}),
]


@pytest.mark.parametrize(("name", "text", "expected"), REACHING)
def test_optim_args_reach_the_groups(make_model, name, text, expected):
    group = from_trainer(make_model("llama"), name, optim_args=text).param_groups[0]
    assert {key: group[key] for key in expected} == expected


def test_optim_args_reach_the_groups_through_every_part_of_a_model(make_model):
    groups = from_trainer(make_model("llama"), "sinkgd", optim_args="embeddings=stateless,lr_scale=0.05").param_groups
    assert {group["lr_scale"] for group in groups} == {0.05}
    assert {group["algorithm"] for group in groups} == {"multinorm"}


def test_adam_arguments_of_the_trainer_reach_the_adamw_part_and_optim_args_beat_them(make_model):
    given = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-5}
    plain = groups_by_role(from_trainer(make_model("llama"), "sinkgd", **given))
    for role in ("embedding", "head", "rest"):
        assert (plain[role]["betas"], plain[role]["eps"], plain[role]["lr"]) == ((0.8, 0.9), 1e-5, 1e-3)
    text = "adamw_beta1=0.7,adamw_beta2=0.6,adamw_eps=1e-4,adamw_lr=3e-4"
    beaten = groups_by_role(from_trainer(make_model("llama"), "sinkgd", optim_args=text, **given))
    for role in ("embedding", "head", "rest"):
        assert (beaten[role]["betas"], beaten[role]["eps"], beaten[role]["lr"]) == ((0.7, 0.6), 1e-4, 3e-4)
    assert beaten["matrix"]["lr"] == 1e-3


@pytest.mark.parametrize("target_modules", [["q_proj"], r".*\.self_attn\.q_proj", "all-linear", None])
def test_target_modules_of_the_arguments_choose_the_matrices(make_model, target_modules):
    model = make_model("llama")
    options = {} if target_modules is None else {"optim_target_modules": target_modules}
    group = from_trainer(model, "sinkgd", **options).param_groups[0]
    expected = [e.name for e in partition_parameters(model, target_modules) if e.role == "matrix"]
    assert group["param_names"] == expected
    assert len(expected) == (14 if target_modules in ("all-linear", None) else 2)


@pytest.mark.parametrize("embeddings", ["adamw", "stateless", "sinkhorn_momentum"])
@pytest.mark.parametrize("name", PRESETS)
def test_groups_hold_plain_values_that_a_checkpoint_keeps(make_model, name, embeddings):
    optimizer = from_trainer(make_model("gpt2"), name, optim_args=f"embeddings={embeddings}", weight_decay=0.1)
    for group in optimizer.param_groups:
        for key, value in options_of(group).items():
            entries = value if isinstance(value, tuple | list) else [value]
            assert {type(entry) for entry in entries} <= {str, int, float, bool, type(None)}, key
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded["param_groups"] == optimizer.state_dict()["param_groups"]


def test_adapters_get_the_rule_of_matrices(make_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    model = peft.get_peft_model(make_model("llama"), config)
    groups = groups_by_role(from_trainer(model, "swan"))
    assert {role: group["algorithm"] for role, group in groups.items()} == {"adapter": "multinorm", "rest": "adamw"}


def test_construction_keeps_no_state_and_changes_nothing(make_model):
    model = make_model("llama")
    before = [p.clone() for p in model.parameters()]
    optimizer = create_optimizer(model, "sinkgd", lr=1e-3)
    assert not optimizer.state
    optimizer.step()
    assert not optimizer.state
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("lr", [math.nan, math.inf, -math.inf, -1e-3])
def test_learning_rate_that_is_negative_or_not_finite_is_refused(make_model, lr):
    model = make_model("llama")
    for message in (
        refusal(create_optimizer, model, "sinkgd", lr=lr),
        refusal(from_trainer, model, "swan", learning_rate=lr),
        refusal(StatelessOptimizer, [{"params": list(model.parameters()), "algorithm": "multinorm"}], lr=lr),
    ):
        assert message == f"The learning rate must be a finite number of at least 0, got {lr}."


# Text of `optim_args` and a part of the answer.
MALFORMED = [
    ("num_iteration=3", "Did you mean 'num_iterations'"),
    ("num_iterations=2.5", "num_iterations='2.5' is not an integer of at least 1"),
    ("ns_steps=3", "belongs to a whitening such as 'spectral'"),
    ("lr_scale=nan", "lr_scale='nan' is not a number"),
    ("norms=sign", "belongs to optim='multinorm'"),
    ("num_iterations", "is not key=value"),
    ("num_iterations=3,", "optim_args='num_iterations=3,' is malformed"),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED)
def test_bad_optim_args_are_refused_in_one_line(make_model, text, message):
    assert message in refusal(from_trainer, make_model("llama"), "sinkgd", optim_args=text)


def test_unknown_names_options_and_groups_without_a_role_are_refused(make_model):
    model = make_model("llama")
    assert "Unknown optimizer 'sinkdg'" in refusal(create_optimizer, model, "sinkdg", lr=1e-3)
    assert "Did you mean 'adamw_lr'" in refusal(SinkGDFactory(), model, lr=1e-3, adam_lr=1e-3)
    of_torch = refusal(SwanFactory(), model, lr=1e-3, betas=(0.9, 0.95))
    assert of_torch.endswith("Did you mean 'adamw_beta1' and 'adamw_beta2'?")
    assert "hf_stateless.create_optimizer" in refusal(StatelessOptimizer, [{"params": list(model.parameters())}])
    assert "matched no trainable matrix" in refusal(create_optimizer, model, "swan", lr=1e-3, target_modules=["x"])


@pytest.mark.parametrize("name", optimizer_names())
def test_a_framework_that_makes_its_own_groups_is_told_what_to_leave_out(name):
    """LLaMA-Factory asks for the class without a model, to give it the groups of LoRA+ or BAdam."""
    message = refusal(Trainer.get_optimizer_cls_and_kwargs, arguments(name))
    assert message.startswith(f"optim={name!r} needs the model")
    assert "makes its own parameter groups" in message
    assert "loraplus_lr_ratio, use_badam" in message
    assert "\n" not in message


def test_factories_are_found_where_the_readme_says():
    assert {cls.name: cls for cls in FACTORIES.values()} == FACTORIES
    assert all(getattr(hf_stateless, cls.__name__) is cls for cls in FACTORIES.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, True, "1e-3", None])
@pytest.mark.parametrize("what", ["lr", "weight_decay"])
def test_a_rate_that_is_no_finite_number_is_refused_in_one_line(make_model, what, value):
    arguments = {"lr": 1e-3, what: value}
    with pytest.raises(ValueError, match="must be a finite number of at least 0, got") as refusal:
        create_optimizer(make_model("llama"), "sinkgd", **arguments)
    assert "\n" not in str(refusal.value)


def test_a_numpy_rate_becomes_a_plain_float(make_model):
    optimizer = create_optimizer(make_model("llama"), "sinkgd", lr=np.float64(1e-3), weight_decay=np.float32(0.5))
    assert {type(group[key]) for group in optimizer.param_groups for key in ("lr", "weight_decay")} == {float}

"""Claims about what `optim_args` refuse: one line that says what was got and what is expected."""

import re

import pytest
import torch
from factories import message_of
from transformers import Trainer, TrainingArguments

from hf_stateless import NORMS, create_optimizer
from hf_stateless.norms.scale import UPDATE_SCALES
from hf_stateless.norms.whitening import NS_DTYPES, WHITENING_DEFAULTS
from hf_stateless.optimizer.options import MOMENTUM_DTYPES, embeddings
from hf_stateless.optimizer.rates import RATES
from hf_stateless.trainer.optim_args import optimizer_names, parse_options, valid_keys
from hf_stateless.update.width import WIDTH_RULES


NAMES = optimizer_names()
DTYPES = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_unknown_key_is_answered_with_the_valid_ones_and_the_nearest(name):
    message = message_of(name, {"num_iteration": "3"})
    assert message.startswith(f"Unknown key 'num_iteration' in optim_args for optim={name!r}.")
    assert ", ".join(sorted(valid_keys(name))) in message
    assert message.endswith("Did you mean 'num_iterations'?")


@pytest.mark.parametrize("key", ["ns_steps", "ns_beta", "ns_dtype", "whitening"])
@pytest.mark.parametrize(("name", "norms"), [("sinkgd", None), ("multinorm", "row_l2+sign")])
def test_whitening_keys_without_whitening_are_explained(name, norms, key):
    message = message_of(name, {key: "1"} | ({"norms": norms} if norms else {}))
    chain = norms or "row_l2+col_l2"
    assert message.endswith(f"({key} belongs to a whitening such as 'spectral', and the chain {chain} has none.)")


def test_release_is_explained_to_the_other_names():
    message = message_of("swan", {"release": "all"})
    assert message.startswith("optim_args for optim='swan' take no release. Valid keys: ")
    fix = "take optim='swan_layerwise', with max_grad_norm=0 for release=all."
    assert message.endswith(f"(release belongs to layer-wise updates: {fix})")


@pytest.mark.parametrize("key", ["min_signal", "split_whitening"])
def test_keys_that_need_a_whole_step_are_explained_to_layerwise_names(key):
    message = message_of("swan_layerwise", {key: "1"})
    assert message.endswith(f"({key} needs all gradients at once, which layer-wise updates free: take optim='swan'.)")


@pytest.mark.parametrize(
    ("name", "key", "owner"),
    [
        ("swan", "norms", "multinorm"),
        ("sinkgd", "norms", "multinorm"),
        ("sinkgd", "center", "swan"),
        ("multinorm", "center", "swan"),
    ],
)
def test_key_of_another_optimizer_names_it(name, key, owner):
    assert message_of(name, {key: "sign"}).endswith(f"({key} belongs to optim={owner!r}.)")


WRONG = [
    ("num_iterations", ["abc", "0", "-1", "2.5", 2.5, True, "true", "", None, "1_0", "nan", "inf"], "an integer of"),
    ("seed", ["-1", "x", 1.5], "an integer of at least 0"),
    ("lr_scale", ["nan", "-1", "true", True, "inf", "1e400", "", None, "0.1.2", (1,)], "a number of at least 0"),
    ("adamw_lr", ["nan", "-1e-3", "fast"], "a number of at least 0"),
    ("rates", ["pretrain", "32", "", None, ["pretraining"]], " | ".join(RATES)),
    ("embedding_lr_scale", ["nan", "-1", True, "inf"], "a number of at least 0"),
    ("head_lr_scale", ["", None, "16x"], "a number of at least 0"),
    ("rest_lr_scale", ["16+4", (16,), "1e400"], "a number of at least 0"),
    ("adamw_beta1", ["1", "-0.1", "1.5", "nan"], r"a number in [0, 1)"),
    ("adamw_beta2", ["1.0", True], r"a number in [0, 1)"),
    ("adamw_eps", ["-1e-8", "nan"], "a number of at least 0"),
    ("stochastic_rounding", ["yes", "", "2", None], "true or false"),
    ("rounding_feedback", ["yes", "", "2", None], "true or false"),
    ("embeddings", ["adam", "", None, ["adamw"]], " | ".join(embeddings())),
    ("momentum", ["1", "-0.1", "nan", True, "yes"], "a number in [0, 1)"),
    ("momentum_dtype", ["fp32", "8", "", None], " | ".join(MOMENTUM_DTYPES)),
    ("width_rule", ["mup", "", None, 2], " | ".join(WIDTH_RULES)),
    ("scale", ["op", "", None, 1.0, "RMS"], " | ".join(UPDATE_SCALES)),
]
WRONG_FOR_SWAN = [
    ("whitening", ["svd", "", None], " | ".join(WHITENING_DEFAULTS)),
    ("ns_steps", ["0", "1.5", "ten"], "an integer of at least 1"),
    ("ns_beta", ["-0.5", "nan", "inf"], "a number of at least 0"),
    ("ns_dtype", ["float64", "half", "", None], " | ".join(DTYPES)),
    ("center", ["maybe", "-1"], "true or false"),
]
WRONG_CASES = [
    (name, key, value, expected)
    for names, table in ((NAMES, WRONG), (("swan", "swan_layerwise"), WRONG_FOR_SWAN))
    for name in names
    for key, values, expected in table
    for value in values
]


@pytest.mark.parametrize(("name", "key", "value", "expected"), WRONG_CASES)
def test_wrong_value_is_answered_with_what_was_got_and_what_is_expected(name, key, value, expected):
    message = message_of(name, {key: value})
    assert message.startswith(f"optim_args for optim={name!r}: {key}={value!r} is not {expected}")


class Unreadable:
    """A value that says no to every question."""

    def __repr__(self):
        raise RuntimeError("\n")

    __str__ = __int__ = __float__ = __hash__ = __repr__


ENDLESS = []
ENDLESS.append(ENDLESS)
HOSTILE = {
    "infinity": float("inf"),
    "10**400": 10**400,
    "-10**400": -(10**400),
    "10**400 as text": "1" + "0" * 400,
    "10**5000": 10**5000,
    "5000 digits": "9" * 5000,
    "10000 characters": "x" * 10_000,
    "lines": "a\nb\x1b[31m",
    "bytes": b"x",
    "complex": 1j,
    "tensor": torch.ones(3),
    "two-dimensional tensor": torch.ones(40, 40),
    "a list in itself": ENDLESS,
    "unreadable": Unreadable(),
    "dictionary": {},
}
KEYS = [(name, key) for name in ("swan", "multinorm_layerwise") for key in valid_keys(name)]


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_hostile_values_of_every_key_are_answered_with_one_short_line(value):
    for name, key in [*KEYS, ("sinkgd", "x" * 10_000), ("sinkgd", "a\nb")]:
        message = message_of(name, {key: value})
        assert len(message) < 700
        assert message.isprintable()


def test_numbers_that_no_step_can_use_are_refused():
    for key, value in (("lr_scale", "1e308"), ("num_iterations", 1_000_000), ("seed", 2**63), ("adamw_lr", 10**400)):
        assert " is not a" in message_of("sinkgd", {key: value})
    assert parse_options("sinkgd", {"seed": 2**63 - 1}).seed == 2**63 - 1


@pytest.mark.parametrize("targets", [5, 1.5, True, b"q", [1, 2], [None], {}, torch.ones(2), Unreadable(), range(2)])
def test_target_modules_that_are_no_texts_are_refused(targets, make_model):
    with pytest.raises(ValueError, match=r"^optim_target_modules=.* is no text and no list of texts") as error:
        create_optimizer(make_model("llama"), "sinkgd", lr=1e-3, target_modules=targets)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("targets", ["(", ["["], "(" * 5000, "a{99999999999}", "x" * 10_000, ["x" * 10_000]])
def test_target_modules_that_match_nothing_are_repeated_in_part(targets, make_model):
    with pytest.raises(ValueError, match=r"^optim_target_modules=") as error:
        create_optimizer(make_model("llama"), "sinkgd", lr=1e-3, target_modules=targets)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("optim_args", "repeated"),
    [
        ("num_iterations=3,num_iterations=5", "'num_iterations' 2 times, as ['3', '5']"),
        ("seed=1, lr_scale=2 ,seed = 1,seed=2", "'seed' 3 times"),
        ("rank=" + "4" * 10_000 + ",rank=2", "'rank' 2 times"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(optim_args, repeated, make_model, tmp_path):
    args = TrainingArguments(str(tmp_path), optim="sinkgd", optim_args=optim_args, report_to=[])
    with pytest.raises(ValueError, match=re.escape(repeated)) as error:
        Trainer(make_model("llama"), args).create_optimizer()
    assert len(str(error.value)) < 300


def test_a_malformed_text_is_repeated_in_part(make_model, tmp_path):
    for optim_args in ("x" * 10_000, "seed=1," + "y" * 10_000, "=" * 10_000):
        args = TrainingArguments(str(tmp_path), optim="sinkgd", optim_args=optim_args, report_to=[])
        with pytest.raises(ValueError, match="is malformed") as error:
            Trainer(make_model("llama"), args).create_optimizer()
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("norms", ["row_l3", "", "row_l2+", "row_l2,col_l2", "row_l2+l2", [], ("l2",)])
def test_unknown_or_empty_norms_are_answered_with_the_valid_ones(norms):
    message = message_of("multinorm", {"norms": norms})
    assert message.startswith("Unknown norms")
    assert ", ".join(NORMS) in message


@pytest.mark.parametrize("norms", [5, None, True, [["row_l2"]], [1]])
def test_norms_that_are_no_names_are_refused(norms):
    assert "joined by +" in message_of("multinorm", {"norms": norms})


@pytest.mark.parametrize(
    ("whitening", "key"),
    [
        (name, key)
        for name in WHITENING_DEFAULTS
        for key in ("ns_steps", "ns_beta", "ns_dtype")
        if key not in WHITENING_DEFAULTS[name]
    ],
)
def test_value_that_the_whitening_does_not_take_is_refused(whitening, key):
    message = message_of(
        "swan", {"whitening": whitening, key: {"ns_steps": "7", "ns_beta": "0.5", "ns_dtype": "float32"}[key]}
    )
    assert f"whitening={whitening} takes no {key}" in message
    assert message.endswith("leave it out.")


@pytest.mark.parametrize(
    ("whitening", "ns_dtype"), [("newton_schulz", "bfloat16"), ("polar_express", "float16"), ("nsds", "float16")]
)
@pytest.mark.parametrize("name", ["swan", "multinorm", "sinkgd_polar_layerwise"])
def test_a_dtype_that_the_whitening_cannot_take_is_refused(name, whitening, ns_dtype):
    message = message_of(name, {"whitening": whitening, "ns_dtype": ns_dtype})
    assert f"whitening={whitening} takes no ns_dtype" in message
    assert " | ".join(NS_DTYPES[whitening]) in message if whitening in NS_DTYPES else message.endswith("leave it out.")


@pytest.mark.parametrize("name", ["sinkdg", "", "SWAN", "adamw", "swan_layer", "_layerwise"])
def test_unknown_optimizer_is_answered_with_the_names(name):
    message = message_of(name, {})
    assert message == f"Unknown optimizer {name!r}. Valid: {', '.join(NAMES)}."

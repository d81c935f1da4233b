"""Claims about `optim_args`: every key takes text and Python values, and what is left out has a default."""

from dataclasses import replace

import pytest
from factories import message_of

from hf_stateless import NORMS, PRESETS, create_optimizer
from hf_stateless.norms.scale import UPDATE_SCALES
from hf_stateless.norms.whitening import NS_DTYPES, WHITENING_DEFAULTS
from hf_stateless.optimizer.option_kinds import FRACTION
from hf_stateless.optimizer.options import (
    LORA,
    MOMENTUM_DTYPES,
    OPTIONS,
    BelongsTo,
    Option,
    embeddings,
    option_table,
)
from hf_stateless.optimizer.rates import RATES
from hf_stateless.optimizer.rules import complete_group, told_options
from hf_stateless.trainer.optim_args import is_layerwise, optimizer_names, parse_options, plain_name, valid_keys
from hf_stateless.update.width import WIDTH_RULES


NAMES = optimizer_names()
DTYPES = ("float32", "float16", "bfloat16")
# Each key with some text, and the Python value that means the same.
VALUES = {
    "norms": [("row_l2+spectral", ("row_l2", "spectral")), ("spectral", ["spectral"])],
    "num_iterations": [("3", 3), (" 1 ", 1)],
    "lr_scale": [("0.05", 0.05), ("1e-2", 0.01), ("2", 2), ("0", 0.0)],
    "scale": [(name, name) for name in UPDATE_SCALES],
    "whitening": [(name, name) for name in WHITENING_DEFAULTS],
    "ns_steps": [("7", 7)],
    "ns_beta": [("0.5", 0.5)],
    "ns_dtype": [(name, name) for name in DTYPES],
    "center": [("true", True), ("False", False), ("0", 0)],
    "embeddings": [(name, name) for name in embeddings()],
    "heads": [(name, name) for name in embeddings()],
    "table_beta2": [("0.95", 0.95)],
    "lora": [(name, name) for name in LORA],
    "adamw_lr": [("1e-3", 1e-3)],
    "rates": [(name, name) for name in RATES],
    "embedding_lr_scale": [("32", 32), ("0.5", 0.5)],
    "head_lr_scale": [("4", 4)],
    "rest_lr_scale": [("16.5", 16.5), ("0", 0)],
    "adamw_beta1": [("0.8", 0.8), ("0", 0)],
    "adamw_beta2": [("0.95", 0.95)],
    "adamw_eps": [("1e-6", 1e-6)],
    "stochastic_rounding": [("false", False), ("True", True), ("1", 1)],
    "seed": [("17", 17)],
    "split_whitening": [("true", True), ("false", False)],
    "min_signal": [("0.1", 0.1), ("0", 0.0)],
    "momentum": [("0.9", 0.9), ("0", 0.0)],
    "momentum_dtype": [(name, name) for name in MOMENTUM_DTYPES],
    "rounding_feedback": [("true", True), ("False", False), ("1", 1)],
    "width_rule": [(name, name) for name in WIDTH_RULES],
    "release": [("matrices", "matrices"), ("all", "all")],
}
CASES = [(name, key, *pair) for name in NAMES for key in valid_keys(name) for pair in VALUES[key]]


def test_table_covers_every_key():
    assert set().union(*map(valid_keys, NAMES)) == set(VALUES)


@pytest.mark.parametrize(("name", "key", "text", "value"), CASES)
def test_text_and_python_value_mean_the_same(name, key, text, value):
    # Which only this whitening takes, whatever the preset has.
    beside = {"whitening": "newton_schulz"} if key == "ns_beta" else {}
    if key == "ns_dtype":
        beside = {"whitening": next(name for name in NS_DTYPES if value in NS_DTYPES[name])}
    parsed = parse_options(name, {key: text, **beside})
    assert parsed == parse_options(name, {key: value, **beside})
    if key not in ("norms", "center"):
        assert getattr(parsed, key) == value
        assert type(getattr(parsed, key)) in (str, int, float, bool)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_given_is_the_preset(name):
    preset = PRESETS[plain_name(name)]
    options = parse_options(name, {})
    assert (options.norms, options.num_iterations, options.lr_scale) == (
        preset.norms,
        preset.num_iterations,
        preset.lr_scale,
    )
    assert options.release == ("matrices" if is_layerwise(name) else None)


@pytest.mark.parametrize("whitening", WHITENING_DEFAULTS)
@pytest.mark.parametrize("name", ["swan", "multinorm"])
def test_defaults_of_the_whitening_are_filled_in(name, whitening):
    options = parse_options(name, {"whitening": whitening})
    defaults = WHITENING_DEFAULTS[whitening]
    assert {key: getattr(options, key) for key in ("ns_steps", "ns_beta", "ns_dtype")} == {
        key: defaults.get(key) for key in ("ns_steps", "ns_beta", "ns_dtype")
    }


@pytest.mark.parametrize("name", ["sinkgd_polar", "sinkgd_polar_layerwise"])
@pytest.mark.parametrize(
    ("given", "whitening", "steps"),
    [
        ({}, "polar_express", PRESETS["sinkgd_polar"].ns_steps),
        ({"whitening": "polar_express"}, "polar_express", PRESETS["sinkgd_polar"].ns_steps),
        ({"ns_steps": 3}, "polar_express", 3),
        ({"whitening": "newton_schulz"}, "newton_schulz", WHITENING_DEFAULTS["newton_schulz"]["ns_steps"]),
        ({"whitening": "nsds"}, "nsds", WHITENING_DEFAULTS["nsds"]["ns_steps"]),
        ({"whitening": "eigh"}, "eigh", None),
    ],
    ids=str,
)
def test_a_preset_may_have_a_whitening_of_its_own(name, given, whitening, steps):
    options = parse_options(name, given)
    assert (options.whitening, options.ns_steps, options.scale) == (whitening, steps, "rms")
    assert options.norms == PRESETS["sinkgd_polar"].norms
    assert message_of(name, {**given, "ns_beta": 0.5} if whitening == "polar_express" else {"norms": "sign"})


def test_given_whitening_values_beat_its_defaults():
    options = parse_options("swan", {"whitening": "nsds", "ns_steps": "3"})
    assert (options.ns_steps, options.ns_beta) == (3, WHITENING_DEFAULTS["nsds"]["ns_beta"])


def test_chain_without_whitening_has_no_whitening_values():
    options = parse_options("sinkgd", {})
    assert (options.ns_steps, options.ns_beta) == (None, None)
    assert set(valid_keys("multinorm", ("sign",))) == {"norms", *valid_keys("sinkgd")}


@pytest.mark.parametrize("off", ["false", "0", False])
def test_swan_without_centring_normalises_rows(off):
    centred, plain = parse_options("swan", {}), parse_options("swan", {"center": off})
    assert centred.norms[0] == "row_standardize"
    assert plain == replace(centred, norms=("row_l2", *centred.norms[1:]))
    assert parse_options("swan", {"center": "true"}) == centred


@pytest.mark.parametrize(
    ("name", "given", "matrices", "beside"),
    [
        ("swan", {}, 2.0, 0.2),
        ("swan", {"center": "false"}, 2.0, 0.2),
        ("sinkgd", {}, 0.8, 0.2),
        ("multinorm", {}, 2.0, 0.2),
        ("multinorm_layerwise", {"norms": "spectral"}, 2.0, 0.2),
        ("multinorm", {"norms": "sign"}, 0.8, 0.2),
        ("swan", {"momentum": "0.9"}, 1.0, 0.2),
        ("sinkgd", {"momentum": "0.9"}, 0.4, 0.2),
        ("multinorm", {"norms": "sign", "momentum": "0"}, 0.8, 0.2),
        ("swan", {"momentum": "0.9", "lr_scale": "2"}, 2.0, 2.0),
        ("sinkgd", {"lr_scale": "0.05"}, 0.05, 0.05),
        ("multinorm", {"norms": "sign", "lr_scale": "0.05"}, 0.05, 0.05),
    ],
)
def test_the_scale_of_the_step_follows_the_chain_and_momentum_unless_it_is_given(name, given, matrices, beside):
    options = parse_options(name, given)
    assert (options.lr_scale, options.lr_scale_beside) == (matrices, beside)


# ---- One table: what is derived from a row


EXTRA = Option(
    "warp",
    0.5,
    FRACTION,
    "how far a step is bent",
    belongs_to=BelongsTo(release=False),
    groups={"multinorm": 0.25, "lora_product": 0.25},
    roles=("matrix",),
)


@pytest.fixture
def extra_option(monkeypatch):
    """An option that is one row more in the table, and nothing else."""
    monkeypatch.setitem(OPTIONS, EXTRA.name, EXTRA)


def test_an_option_is_added_by_one_row(extra_option, make_model):
    assert parse_options("swan", {}).warp == 0.5
    assert parse_options("swan", {"warp": "0.1"}).warp == 0.1
    assert message_of("swan", {"warp": "2"}).endswith("warp='2' is not a number in [0, 1).")
    assert "warp" in message_of("swan", {"wrap": "0.1"}).partition("Valid keys: ")[2].split(".")[0].split(", ")
    assert message_of("swan", {"wrap": "0.1"}).endswith("Did you mean 'warp'?")
    assert "warp needs all gradients at once" in message_of("swan_layerwise", {"warp": "0.1"})

    groups = create_optimizer(make_model("llama"), "swan", lr=1e-3, warp=0.1, embeddings="stateless").param_groups
    assert {group["role"]: group["warp"] for group in groups} == {
        "matrix": 0.1,
        **dict.fromkeys(("embedding", "head", "rest"), 0.25),
    }
    assert told_options(groups[0])["warp"] == 0.1
    assert complete_group({"params": [], "algorithm": "lora_product"}, lr=1.0)["warp"] == 0.25
    assert "warp" not in complete_group({"params": [], "algorithm": "adamw"}, lr=1.0)
    assert option_table().splitlines()[-1] == (
        "| `warp` | `0.5` | how far a step is bent | names without `_layerwise` |"
    )


def test_without_its_row_the_option_is_unknown():
    assert message_of("swan", {"warp": "0.1"}).startswith("Unknown key 'warp'")
    with pytest.raises(ValueError, match="no option 'warp'"):
        complete_group({"params": [], "algorithm": "multinorm", "warp": 0.1}, lr=1.0)


def test_the_table_for_the_documentation_has_a_row_for_every_option():
    rows = [line.strip("| ").split(" | ") for line in option_table().splitlines()[2:]]
    assert [row[0].strip("`") for row in rows] == list(OPTIONS)
    assert all(len(row) == 4 and all(row) for row in rows)


def test_a_default_that_is_no_constant_is_described_in_words():
    assert all(option.default is not None or option.default_text for option in OPTIONS.values())


def test_defaults_of_the_table_are_read_by_their_own_parsers():
    for option in OPTIONS.values():
        if option.default is not None:
            assert option.kind.parse(option.default) == option.default


def test_a_norm_that_is_added_later_is_read(monkeypatch):
    assert message_of("multinorm", {"norms": "row_l2+doubled"}).startswith("Unknown norms")
    monkeypatch.setitem(NORMS, "doubled", NORMS["row_l2"])
    assert parse_options("multinorm", {"norms": "row_l2+doubled"}).norms == ("row_l2", "doubled")

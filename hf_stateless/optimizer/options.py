"""Every option of the optimizers, one row each: the table `OPTIONS`.

Parser, error texts, parameter groups, model card and documentation are derived from it. A new option is one row here,
and the line that uses its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..norms.presets import PRESETS, in_words
from ..norms.scale import UPDATE_SCALES
from ..norms.whitening import NS_DTYPES, WHITENING_DEFAULTS
from ..update.width import WIDTH_RULES
from .option_kinds import CHAIN, COUNT, FRACTION, NUMBER, SWITCH, WHOLE, BelongsTo, Kind, choice
from .rates import RATES, SCALES


LORA = ("separate", "product")
"""How LoRA adapters are updated; the first is the default."""
MOMENTUM_DTYPES = ("int8", "bfloat16", "float32")
"""How the momentum of matrices is stored; the first is the default."""
EVERY_RULE = "every rule"
"""Among the groups of an option, and as `algorithm`: what the groups of all rules have."""


def embeddings() -> tuple[str, ...]:
    """Return what may update embeddings and heads, the default first: rules for tables, or `stateless`."""
    from .rules import RULES  # which read their options here

    return (*(name for name, rule in RULES.items() if rule.for_tables), "stateless")


_ALL_RUNS = BelongsTo()


@dataclass(frozen=True)
class Option:
    """One option: what may be written, what it is without that, and where its value goes."""

    name: str
    """The key in `optim_args`, the keyword of `create_optimizer`, and the key in groups."""
    default: Any
    """None where a preset, a whitening or the Trainer decides; `default_text` says which."""
    kind: Kind
    meaning: str
    """One line for the documentation."""
    default_text: str = ""
    """The default in words."""
    belongs_to: BelongsTo = _ALL_RUNS
    groups: Mapping[str, Any] = field(default_factory=dict)
    """The rules whose groups hold the value, each with the default of groups that are made by hand."""
    roles: tuple[str, ...] = ()
    """The roles of parameters whose groups get the value, where not all do; the others keep the rule's default."""
    on_demand: bool = False
    """Whether groups hold it only where it is not the default: older sharded checkpoints lack it, see `SCALES`."""
    on_card: bool = True
    """Whether a model card tells it: not what changes the noise or the work, but not the method."""


# What the scales of `SCALES` multiply the rate of.
_OF_KIND = (
    "embeddings, a table that is the head too included",
    "heads",
    "norms, biases and all that is neither matrix, embedding nor head",
)


def _rate_option(name: str, what: str) -> Option:
    """Return the row of one of `SCALES`."""
    role = name.removesuffix("_lr_scale")
    preset = RATES["pretraining"]
    default = f"1; with `rates=pretraining` {getattr(preset, role):g}"
    return Option(
        name,
        None,
        NUMBER,
        f"factor on the learning rate of {what}, whatever updates them",
        f"{default}, where a table is the head too {preset.tied:g}" if role == "embedding" else default,
    )


_OF_WHITENING: dict[str, Any] = {"belongs_to": BelongsTo(whitening=True), "groups": {"multinorm": None}}
_ROWS = (
    Option(
        "norms",
        None,
        CHAIN,
        "the chain of norm projections, from left to right",
        "of the preset: `row_l2+spectral`",
        BelongsTo(optim="multinorm"),
        {"multinorm": ("row_l2", "col_l2"), "lora_product": ("spectral",)},
    ),
    Option(
        "num_iterations",
        None,
        COUNT,
        "how often the chain runs",
        "of the preset",
        groups={"multinorm": 5, "lora_product": 1},
    ),
    Option(
        "lr_scale",
        None,
        NUMBER,
        "factor on the learning rate of what is updated without moments",
        ", ".join(f"{preset.lr_scale} (`{name}`)" for name, preset in PRESETS.items())
        + "; that of `sinkgd` without a whitening; half with `momentum`; 0.2 for `lora=product` and beside the "
        "matrices",
        groups={"multinorm": 0.8, "lora_product": 0.2},
    ),
    Option(
        "scale",
        None,
        choice(UPDATE_SCALES),
        "what the size of an update is measured by, its entries or its operator norm",
        in_words("scale"),
        groups={"multinorm": UPDATE_SCALES[0], "lora_product": UPDATE_SCALES[0]},
        on_demand=True,
    ),
    Option(
        "whitening",
        "polar_express",
        choice(list(WHITENING_DEFAULTS)),
        "how `spectral` is computed",
        in_words("whitening"),
        belongs_to=BelongsTo(whitening=True),
        groups={"multinorm": "polar_express"},
    ),
    Option("ns_steps", None, COUNT, "iterations of the whitening", in_words("ns_steps"), **_OF_WHITENING),
    Option("ns_beta", None, NUMBER, "step size of the whitening", "of the whitening", **_OF_WHITENING),
    Option(
        "ns_dtype",
        None,
        choice(sorted({dtype for dtypes in NS_DTYPES.values() for dtype in dtypes}, reverse=True)),
        "what products of the whitening are computed in",
        "`float32`; `bfloat16` for `polar_express` from 256 rows on, where the device is fast in it",
        **_OF_WHITENING,
    ),
    Option(
        "center",
        True,
        SWITCH,
        "subtract the mean of each row before the rows are normalised",
        belongs_to=BelongsTo(optim="swan"),
    ),
    Option(
        "embeddings",
        "adamw",
        choice(embeddings),
        "what updates embeddings and heads (`stateless` takes norms and biases along: nothing holds state)",
    ),
    Option(
        "heads",
        None,
        choice(embeddings),
        "what updates heads, where embeddings are updated in another way; a tied table is an embedding",
        "as `embeddings`",
    ),
    Option(
        "table_beta2",
        0.99,
        FRACTION,
        "decay of the averages of squares that `row_moment`, `column_moment` and `factored` keep of tables",
        groups={"row_moment": 0.99, "column_moment": 0.99, "factored": 0.99},
        roles=("embedding", "head"),
    ),
    Option(
        "lora",
        LORA[0],
        choice(LORA),
        "how LoRA factors A and B are normalised, each on its own or by what they do to B A",
    ),
    Option(
        "adamw_lr",
        None,
        NUMBER,
        "learning rate of the AdamW part, which the scales below multiply; the scheduler acts on it too",
        "the learning rate",
    ),
    Option(
        "rates",
        next(iter(RATES)),
        choice(list(RATES)),
        "sets the three scales below at once, to what was measured; a scale that is given wins",
    ),
    *(_rate_option(*row) for row in zip(SCALES, _OF_KIND, strict=True)),
    Option(
        "adamw_beta1",
        0.9,
        FRACTION,
        "decay of the first moment of the AdamW part",
        "`adam_beta1` of the Trainer, `0.9` without one",
    ),
    Option(
        "adamw_beta2",
        0.999,
        FRACTION,
        "decay of the second moment of the AdamW part",
        "`adam_beta2` of the Trainer, `0.999` without one",
    ),
    Option(
        "adamw_eps",
        1e-8,
        NUMBER,
        "what keeps the AdamW part from dividing by zero",
        "`adam_epsilon` of the Trainer, `1e-8` without one",
    ),
    Option(
        "stochastic_rounding",
        True,
        SWITCH,
        "round updates of bf16 weights stochastically; other dtypes are not affected",
        groups={EVERY_RULE: True},
    ),
    Option(
        "seed",
        0,
        WHOLE,
        "of the rounding noise: equal on all replicas, repeated by a resumed run",
        groups={EVERY_RULE: 0},
        on_card=False,
    ),
    Option(
        "split_whitening",
        False,
        SWITCH,
        "under DDP each process whitens some of the matrices and shares the updates",
        "`true` in the Trainer on several processes, else `false`",
        BelongsTo(whitening=True, release=False),
        {"multinorm": False},
        on_card=False,
    ),
    Option(
        "min_signal",
        0.0,
        FRACTION,
        "skip the matrices in a step whose gradient norm is below this fraction of the 90th percentile of the last 64",
        belongs_to=BelongsTo(release=False),
        groups={"multinorm": 0.0, "lora_product": 0.0},
    ),
    Option(
        "momentum",
        0.0,
        FRACTION,
        "normalise a moving average of the gradients of matrices (Nesterov); 0 keeps none",
        groups={"multinorm": 0.0},
        roles=("matrix", "adapter"),
    ),
    Option(
        "momentum_dtype",
        MOMENTUM_DTYPES[0],
        choice(MOMENTUM_DTYPES),
        "how that average is stored",
        belongs_to=BelongsTo(option="momentum"),
        groups={"multinorm": MOMENTUM_DTYPES[0]},
        roles=("matrix", "adapter"),
    ),
    Option(
        "rounding_feedback",
        False,
        SWITCH,
        "put what rounding leaves out of 8-bit weights into that average; no clear gain where it was measured",
        belongs_to=BelongsTo(option="momentum"),
        groups={"multinorm": False},
        roles=("matrix", "adapter"),
        on_demand=True,
    ),
    Option(
        "width_rule",
        WIDTH_RULES[0],
        choice(WIDTH_RULES),
        "how the step of a linear layer depends on its shape, for one learning rate over all widths",
        groups={"multinorm": WIDTH_RULES[0]},
        roles=("matrix", "head"),  # a low-rank factor and a table of tokens have a side that is no width
    ),
    Option(
        "release",
        None,
        choice(("matrices", "all")),
        "what is updated in backward (`all` takes the AdamW part along)",
        "`matrices`",
        BelongsTo(release=True),
    ),
)
OPTIONS: dict[str, Option] = {option.name: option for option in _ROWS}
"""The options by name."""


def group_defaults(rule: str) -> dict[str, Any]:
    """Return the options that groups of a rule hold, with the defaults of groups that are made by hand.

    Example:
        >>> from hf_stateless.optimizer.options import group_defaults
        >>> group_defaults("lora_product")
        {'norms': ('spectral',), 'num_iterations': 1, 'lr_scale': 0.2, 'min_signal': 0.0}
    """
    rows = [option for option in OPTIONS.values() if rule in option.groups and not option.on_demand]
    return {option.name: option.groups[rule] for option in rows}


def on_demand(rule: str) -> dict[str, Any]:
    """Return what groups of a rule hold only where it is not the default, with the defaults.

    Example:
        >>> from hf_stateless.optimizer.options import on_demand
        >>> on_demand("multinorm")
        {'scale': 'rms', 'rounding_feedback': False}
    """
    rows = [option for option in OPTIONS.values() if rule in option.groups and option.on_demand]
    return {option.name: option.groups[rule] for option in rows}


def group_values(rule: str, options: object, role: str) -> dict[str, Any]:
    """Return what a group of a rule takes from the options of a run."""
    rows = [option for option in OPTIONS.values() if rule in option.groups and role in (option.roles or (role,))]
    values = {option.name: getattr(options, option.name) for option in rows}
    return {name: value for name, value in values.items() if (name, value) not in on_demand(rule).items()}


def option_table() -> str:
    """Return the options as a table in Markdown, for the documentation.

    Example:
        >>> from hf_stateless.optimizer.options import option_table
        >>> option_table().splitlines()[10]
        '| `center` | `true` | subtract the mean of each row before the rows are normalised | `swan` |'
    """
    lines = ["| Key | Default | Meaning | Belongs to |", "|---|---|---|---|"]
    for option in OPTIONS.values():
        default = option.default_text or f"`{str(option.default).lower()}`"
        names = ", ".join(f"`{name}`" for name in option.kind.names())
        meaning = f"{option.meaning}: {names}" if names else option.meaning
        lines.append(f"| `{option.name}` | {default} | {meaning} | {option.belongs_to} |")
    return "\n".join(lines)

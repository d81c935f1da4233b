"""Reading `optim_args`: what may be written for which name, checked before anything is trained.

The options themselves are rows of `hf_stateless.optimizer.options.OPTIONS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING, Any

from ..norms.chain import Chain, check_norms
from ..norms.presets import PRESETS
from ..norms.whitening import NS_DTYPES, WHITENING_DEFAULTS
from ..optimizer.option_kinds import LAYERWISE, UNREADABLE, shown
from ..optimizer.options import OPTIONS, Option
from ..optimizer.rates import RATES, SCALES


# The `lr_scale` of what is updated without moments beside the matrices: LoRA pairs as products, embeddings, vectors.
# AdamW's step has about this size.
_SCALE_BESIDE = 0.2
# What torch's AdamW calls what is an option here.
_OF_TORCH = {
    "betas": ["adamw_beta1", "adamw_beta2"],
    "beta1": ["adamw_beta1"],
    "beta2": ["adamw_beta2"],
    "eps": ["adamw_eps"],
}


@dataclass(frozen=True, eq=False)
class Options:
    """Checked options of one optimizer: a frozen dataclass with an attribute for each row of `OPTIONS`.

    `center` has become part of `norms`; `lr_scale_beside` is the `lr_scale` of what is updated without moments beside
    the matrices, `tied_lr_scale` the `embedding_lr_scale` of a model in which a table is the head too. `not_asked` has
    the roles of tables whose rule is the default one, because nobody has asked for any.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and vars(self) == vars(other)


def is_layerwise(name: str) -> bool:
    """Tell whether an optimizer name is that of updates in backward."""
    return name.endswith(LAYERWISE)


def plain_name(name: str) -> str:
    """Return an optimizer name without `_layerwise`: that of its preset."""
    return name.removesuffix(LAYERWISE)


def optimizer_names() -> tuple[str, ...]:
    """Return every name that `optim=` takes: the presets, and each with `_layerwise`."""
    return (*PRESETS, *(name + LAYERWISE for name in PRESETS))


def valid_keys(name: str, norms: Sequence[str] | None = None) -> list[str]:
    """Return the keys that mean something for an optimizer name (and chain, for `multinorm`)."""
    chain = norms or PRESETS[plain_name(name)].norms
    return [option.name for option in OPTIONS.values() if not _misplaced(option, name, chain)]


def parse_options(name: str, given: Mapping[str, Any]) -> Any:
    """Check `optim_args` (strings) or keyword arguments (Python values) against a preset, and fill in the defaults.

    Raises:
        ValueError: unknown name, unknown key (with the nearest), or a value of the wrong type or range.
    """
    if name not in optimizer_names():
        raise ValueError(f"Unknown optimizer {shown(name)}. Valid: {', '.join(optimizer_names())}.")
    norms = _norms(name, given)
    valid = valid_keys(name, norms)
    for key in given:
        if key not in valid:
            raise ValueError(_unknown_key(name, key, valid, norms))
    values = {key: _parse(name, key, value) for key, value in given.items()}
    if not values.pop("center", True):
        norms = tuple("row_l2" if norm == "row_standardize" else norm for norm in norms)
    if values.get("momentum") and values.get("lora") == "product":
        raise ValueError(
            f"optim_args for optim={name!r}: lora=product updates A and B from their gradients of this step alone: "
            "leave out momentum, or lora=product."
        )
    values["norms"] = norms
    asked = {"embedding": "embeddings" in given, "head": "embeddings" in given or "heads" in given}
    values["not_asked"] = tuple(role for role in asked if not asked[role])
    values = {**_defaults(name, values), **values}
    return make_dataclass("Options", values, bases=(Options,), frozen=True, eq=False)(**values)


def _norms(name: str, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the chain that is asked for, where the name leaves a choice, or that of the preset."""
    norms: tuple[str, ...] = PRESETS[plain_name(name)].norms
    if "norms" in given and OPTIONS["norms"].belongs_to.optim == plain_name(name):
        norms = _parse(name, "norms", given["norms"])
    check_norms(norms)
    return norms


def _defaults(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default of every option, by what else was given; a checkpoint thereby says what was run."""
    preset, norms = PRESETS[plain_name(name)], given["norms"]
    whitens = Chain(norms).whitens
    lr_scale = (preset if whitens else PRESETS["sinkgd"]).lr_scale
    if given.get("momentum"):
        lr_scale /= 2  # averaged steps point the same way for longer: the best rate was half of that without, or less
    values = {option.name: option.default for option in OPTIONS.values() if option.name != "center"}
    values["whitening"] = preset.whitening
    values |= {"num_iterations": preset.num_iterations, "lr_scale": lr_scale, "scale": preset.scale}
    rates = RATES[given.get("rates", OPTIONS["rates"].default)]
    values |= {scale: getattr(rates, scale.removesuffix("_lr_scale")) for scale in SCALES}
    values["tied_lr_scale"] = given.get("embedding_lr_scale", rates.tied)
    values["lr_scale_beside"] = given.get("lr_scale", _SCALE_BESIDE)
    if is_layerwise(name):
        values["release"] = "matrices"
    return values | (_whitening_defaults(name, given) if whitens else {})


def _whitening_defaults(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of the whitening that is used; refuse what only another one takes."""
    preset = PRESETS[plain_name(name)]
    whitening = given.get("whitening", preset.whitening)
    taken = WHITENING_DEFAULTS[whitening]
    for key in {key for others in WHITENING_DEFAULTS.values() for key in others} - taken.keys():
        if key in given:
            raise ValueError(f"whitening={whitening} takes no {key} (optim_args of optim={name!r}): leave it out.")
    dtype = given.get("ns_dtype")
    if dtype is not None and dtype not in NS_DTYPES[whitening]:
        valid = " | ".join(NS_DTYPES[whitening])
        raise ValueError(f"whitening={whitening} takes no ns_dtype={dtype} (optim_args of optim={name!r}): {valid}.")
    steps = {"ns_steps": preset.ns_steps} if whitening == preset.whitening and preset.ns_steps else {}
    return {"whitening": whitening, **taken, **steps}


def _parse(name: str, key: str, value: Any) -> Any:
    kind = OPTIONS[key].kind
    try:
        return kind.parse(value)
    except UNREADABLE:
        raise ValueError(f"optim_args for optim={name!r}: {key}={shown(value)} is not {kind.expected}.") from None


def refuse_repeated_keys(optim_args: str | None) -> None:
    """Refuse `optim_args` that give a key twice, of which the Trainer would take the last in silence.

    Raises:
        ValueError: it does, with the key and its values.
    """
    values: dict[str, list[str]] = {}
    for part in (optim_args or "").split(","):
        key, _, value = part.partition("=")
        values.setdefault(key.strip(), []).append(value.strip())
    for key, given in values.items():
        if len(given) > 1:
            raise ValueError(f"optim_args gives {shown(key)} {len(given)} times, as {shown(given)}: keep one of them.")


def check_target_modules(value: Any) -> None:
    """Refuse what cannot choose modules: neither a text nor a list of texts.

    Raises:
        ValueError: it is something else.
    """
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, Sequence | Set) or not all(isinstance(text, str) for text in value):
        raise ValueError(
            f"optim_target_modules={shown(value)} is no text and no list of texts: give a regular expression, or "
            "parts of the names of modules such as ['q_proj']."
        )


def _misplaced(option: Option, name: str, norms: Sequence[str]) -> str:
    """Return why an option means nothing for a name and a chain; empty where it does."""
    key, to, plain = option.name, option.belongs_to, plain_name(name)
    if to.whitening and not Chain(tuple(norms)).whitens:
        return f"{key} belongs to a whitening such as 'spectral', and the chain {_joined(norms)} has none."
    if to.release is False and is_layerwise(name):
        return f"{key} needs all gradients at once, which layer-wise updates free: take optim={plain!r}."
    if to.release and not is_layerwise(name):
        layerwise = name + LAYERWISE
        return f"{key} belongs to layer-wise updates: take optim={layerwise!r}, with max_grad_norm=0 for {key}=all."
    if to.optim and to.optim != plain:
        return f"{key} belongs to optim={to.optim!r}."
    return ""


def _joined(norms: Sequence[str]) -> str:
    return "+".join(norms) if len(norms) < 10 else f"of {len(norms)} norms"


def _unknown_key(name: str, key: Any, valid: list[str], norms: Sequence[str]) -> str:
    keys = f"Valid keys: {', '.join(sorted(valid))}."
    if key in OPTIONS:
        return f"optim_args for optim={name!r} take no {key}. {keys} ({_misplaced(OPTIONS[key], name, norms)})"
    message = f"Unknown key {shown(key)} in optim_args for optim={name!r}. {keys}"
    near = _OF_TORCH.get(str(key)) or difflib.get_close_matches(str(key)[:100], valid, n=1)
    return f"{message} Did you mean {' and '.join(map(repr, near))}?" if near else message

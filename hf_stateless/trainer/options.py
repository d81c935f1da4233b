"""The options of the optimizers: what may be written in `optim_args`, checked before anything is trained."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..norms.chain import check_norms
from ..norms.presets import PRESETS, MultiNormPreset
from ..norms.whitening import NS_DTYPES, WHITENING_DEFAULTS
from ..update.width import WIDTH_RULES


LORA = ("separate", "product")
"""How LoRA adapters are updated; the first is the default."""
EMBEDDINGS = ("adamw", "adamw_8bit", "stateless", "sinkhorn_momentum")
MOMENTUM_DTYPES = ("int8", "bfloat16", "float32")
"""How the momentum of matrices is stored; the first is the default."""


@dataclass(frozen=True)
class Options:
    """Validated options of one optimizer, defaults filled in from its preset.

    Example:
        >>> from hf_stateless.trainer.options import parse_options
        >>> parse_options("sinkgd", {"num_iterations": "3"}).num_iterations
        3
    """

    norms: tuple[str, ...]
    """Chain of norm projections of the matrices, from left to right."""
    num_iterations: int
    """How often the chain runs (L)."""
    lr_scale: float
    """Factor on the learning rate of the matrices; the preset's, and half of it with momentum."""
    lr_scale_beside: float = 0.2
    """The same for what is updated beside them without moments: LoRA pairs as products, embeddings, vectors; AdamW's
    step has about this size. No key of its own: it is `lr_scale` where that is given."""
    whitening: str = "newton_schulz"
    """How `spectral` is computed."""
    ns_steps: int | None = None
    """Iterations of the whitening; None is its own default."""
    ns_beta: float | None = None
    """Step size of the whitening; None is its own default."""
    ns_dtype: str | None = None
    """What the products of `newton_schulz` are computed in; None is its own default."""
    embeddings: str = "adamw"
    """What updates embeddings and heads; `stateless` covers norms and biases too, so that nothing holds state."""
    lora: str = LORA[0]
    """LoRA factors A and B: `separate`, each normalised on its own, or `product`, by what they do to B A."""
    adamw_lr: float | None = None
    """Learning rate of the AdamW part; None is the learning rate of the run."""
    adamw_beta1: float = 0.9
    adamw_beta2: float = 0.999
    adamw_eps: float = 1e-8
    stochastic_rounding: bool = True
    """Write bf16 weights by stochastic rounding."""
    seed: int = 0
    """Seed of the rounding noise."""
    split_whitening: bool = False
    """Let each DDP replica whiten some of the matrices and share the updates; the Trainer's default is true."""
    min_signal: float = 0.0
    """Hold the matrices back where the norm of their gradients is below this fraction of informative steps'."""
    momentum: float = 0.0
    """Normalise a moving average of the gradients of matrices (Nesterov, before the chain); 0 keeps none."""
    momentum_dtype: str = MOMENTUM_DTYPES[0]
    """How that average is stored."""
    width_rule: str = WIDTH_RULES[0]
    """How the step of a matrix depends on its shape, see `hf_stateless.optimizer.width.width_factor`."""
    release: str | None = None
    """Layer-wise names only: what is updated in backward, `matrices` or `all`."""


def _integer(text: Any) -> int:
    value = int(text)
    if value < 0 or str(value) != str(text).strip():
        raise ValueError
    return value


def _positive_integer(text: Any) -> int:
    value = _integer(text)
    if value < 1:
        raise ValueError
    return value


def _number(text: Any) -> float:
    value = float(text)
    if not 0 <= value < math.inf or isinstance(text, bool):
        raise ValueError
    return value


def _fraction(text: Any) -> float:
    value = _number(text)
    if value >= 1:
        raise ValueError
    return value


def _boolean(text: Any) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[str(text).lower()]


def _chain(text: Any) -> tuple[str, ...]:
    norms = tuple(text.split("+")) if isinstance(text, str) else tuple(text)
    if not all(isinstance(norm, str) for norm in norms):
        raise ValueError
    return norms


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(text: Any) -> str:
        if text not in choices:
            raise ValueError
        return str(text)

    return parse


# Each key with how its value is read and what is said when that fails.
_PARSERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "norms": (_chain, "norm projections joined by +, like row_l2+spectral"),
    "num_iterations": (_positive_integer, "an integer of at least 1"),
    "lr_scale": (_number, "a number of at least 0"),
    "whitening": (_one_of(*WHITENING_DEFAULTS), " | ".join(WHITENING_DEFAULTS)),
    "ns_steps": (_positive_integer, "an integer of at least 1"),
    "ns_beta": (_number, "a number of at least 0"),
    "ns_dtype": (_one_of(*NS_DTYPES), " | ".join(NS_DTYPES)),
    "center": (_boolean, "true or false"),
    "embeddings": (_one_of(*EMBEDDINGS), " | ".join(EMBEDDINGS)),
    "lora": (_one_of(*LORA), " | ".join(LORA)),
    "adamw_lr": (_number, "a number of at least 0"),
    "adamw_beta1": (_fraction, "a number in [0, 1)"),
    "adamw_beta2": (_fraction, "a number in [0, 1)"),
    "adamw_eps": (_number, "a number of at least 0"),
    "stochastic_rounding": (_boolean, "true or false"),
    "seed": (_integer, "an integer of at least 0"),
    "split_whitening": (_boolean, "true or false"),
    "min_signal": (_fraction, "a number in [0, 1)"),
    "momentum": (_fraction, "a number in [0, 1)"),
    "momentum_dtype": (_one_of(*MOMENTUM_DTYPES), " | ".join(MOMENTUM_DTYPES)),
    "width_rule": (_one_of(*WIDTH_RULES), " | ".join(WIDTH_RULES)),
    "release": (_one_of("matrices", "all"), "matrices | all"),
}
LAYERWISE = "_layerwise"
_WHITENING_KEYS = ("ns_steps", "ns_beta", "ns_dtype")
_SPECTRAL_KEYS = ("whitening", *_WHITENING_KEYS, "split_whitening")
_WHOLE_STEP_KEYS = ("split_whitening", "min_signal")
_OWNERS = {"norms": "multinorm", "center": "swan"}


def valid_keys(name: str, norms: tuple[str, ...] | None = None) -> list[str]:
    """Return the `optim_args` keys that mean something for an optimizer name (and chain, for `multinorm`).

    Example:
        >>> from hf_stateless.trainer.options import valid_keys
        >>> "ns_steps" in valid_keys("swan"), "ns_steps" in valid_keys("sinkgd")
        (True, False)
    """
    preset = name.removesuffix(LAYERWISE)
    chain = norms or PRESETS[preset].norms
    left_out = set() if "spectral" in chain else set(_SPECTRAL_KEYS)
    if preset != "multinorm":
        left_out.add("norms")
    if preset != "swan":
        left_out.add("center")
    left_out |= {"release"} if preset == name else set(_WHOLE_STEP_KEYS)
    return [key for key in _PARSERS if key not in left_out]


def parse_options(name: str, given: Mapping[str, Any]) -> Options:
    """Check `optim_args` (strings) or keyword arguments (Python values) against a preset.

    Args:
        name: `swan`, `sinkgd` or `multinorm`, or one of them with `_layerwise`.
        given: option values by key.

    Returns:
        Options with the preset's defaults filled in.

    Raises:
        ValueError: unknown name, unknown key (with the nearest), or a value of the wrong type or range.

    Example:
        >>> from hf_stateless.trainer.options import parse_options
        >>> parse_options("multinorm", {"norms": "row_l2+sign"}).norms
        ('row_l2', 'sign')
    """
    if name not in optimizer_names():
        raise ValueError(f"Unknown optimizer {name!r}. Valid: {', '.join(optimizer_names())}.")
    preset = PRESETS[name.removesuffix(LAYERWISE)]
    own_chain = name.startswith("multinorm") and "norms" in given
    norms = _parse(name, "norms", given["norms"]) if own_chain else preset.norms
    check_norms(norms)
    valid = valid_keys(name, norms)
    for key in given:
        if key not in valid:
            raise ValueError(_unknown_key(name, key, valid, norms))
    values = {key: _parse(name, key, value) for key, value in given.items() if key != "norms"}
    if not values.pop("center", True):
        norms = tuple("row_l2" if norm == "row_standardize" else norm for norm in norms)
    if values.get("momentum") and values.get("lora") == "product":
        raise ValueError(
            f"optim_args for optim={name!r}: lora=product updates A and B from their gradients of this step alone: "
            "leave out momentum, or lora=product."
        )
    if "lr_scale" in values:
        values["lr_scale_beside"] = values["lr_scale"]
    if name.endswith(LAYERWISE):
        values.setdefault("release", "matrices")
    return _fill_whitening(name, _from_preset(preset, norms, values.get("momentum", 0.0)), values)


def optimizer_names() -> tuple[str, ...]:
    """Return every name that `optim=` takes: the presets, and each with `_layerwise`.

    Example:
        >>> from hf_stateless.trainer.options import optimizer_names
        >>> optimizer_names()
        ('swan', 'sinkgd', 'multinorm', 'swan_layerwise', 'sinkgd_layerwise', 'multinorm_layerwise')
    """
    return (*PRESETS, *(name + LAYERWISE for name in PRESETS))


def _from_preset(preset: MultiNormPreset, norms: tuple[str, ...], momentum: float) -> Options:
    lr_scale = preset.lr_scale if "spectral" in norms else PRESETS["sinkgd"].lr_scale
    if momentum:
        lr_scale /= 2  # averaged steps point the same way for longer: the best rate was half of that without, or less
    return Options(norms=norms, num_iterations=preset.num_iterations, lr_scale=lr_scale)


def _fill_whitening(name: str, options: Options, values: dict[str, Any]) -> Options:
    """Apply the values, and resolve the whitening's own defaults so that a checkpoint says what was run."""
    options = replace(options, **values)
    if "spectral" not in options.norms:
        return options
    defaults = WHITENING_DEFAULTS[options.whitening]
    for key in _WHITENING_KEYS:
        if key in values and key not in defaults:
            raise ValueError(
                f"whitening={options.whitening} takes no {key} (optim_args of optim={name!r}): leave it out."
            )
    return replace(options, **{key: values.get(key, default) for key, default in defaults.items()})


def _parse(name: str, key: str, value: Any) -> Any:
    parser, expected = _PARSERS[key]
    try:
        return parser(value)
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"optim_args for optim={name!r}: {key}={value!r} is not {expected}.") from None


def _unknown_key(name: str, key: str, valid: list[str], norms: tuple[str, ...]) -> str:
    message = f"Unknown key {key!r} in optim_args for optim={name!r}. Valid keys: {', '.join(sorted(valid))}."
    if key in _SPECTRAL_KEYS and "spectral" not in norms:
        return f"{message} ({key} belongs to the norm 'spectral', which is not in the chain {'+'.join(norms)}.)"
    if key in _WHOLE_STEP_KEYS:
        plain = name.removesuffix(LAYERWISE)
        return f"{message} ({key} needs all gradients at once, which layer-wise updates free: take optim={plain!r}.)"
    if key in _OWNERS:
        return f"{message} ({key} belongs to optim={_OWNERS[key]!r}.)"
    near = difflib.get_close_matches(key, valid, n=1)
    return f"{message} Did you mean {near[0]!r}?" if near else message

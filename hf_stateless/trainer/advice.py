"""What is said where no weight is a matrix: what the model has instead, and a value that works as it is typed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from torch import nn
from torch.nn.utils import parametrize
from transformers.trainer_utils import check_target_module_exists

from ..optimizer.option_kinds import shown
from .matrices import CONVOLUTIONS, LAYERS


# What PEFT adds to the name of a layer that it wraps.
_PEFT_TAIL = re.compile(r"\.(lora_\w+|base_layer|original_module|modules_to_save)(\..*)?$")
_MOST_NAMES = 12
_MOST_IN_A_VALUE = 6


def refuse_no_model(model: object) -> None:
    """Refuse parameters, or anything else, in place of the model: matrices are known by the modules that own them.

    Raises:
        ValueError: it is no module, with what to type.

    Example:
        >>> from hf_stateless.trainer.advice import refuse_no_model
        >>> refuse_no_model([])
        Traceback (most recent call last):
            ...
        ValueError: create_optimizer(model, "swan", lr=1e-3) takes the model first, to tell matrices: got a list.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            'create_optimizer(model, "swan", lr=1e-3) takes the model first, to tell matrices: got a '
            f"{type(model).__name__}."
        )


def refuse_no_matrix(
    model: nn.Module,
    target_modules: object,
    selectable: Mapping[str, Sequence[nn.Parameter]],
    *,
    typed: bool,
    all_linear: bool,
) -> NoReturn:
    """Raise the error of a model of which no trainable weight became a matrix, in one line.

    Args:
        model: all of it.
        target_modules: what the user gave as `optim_target_modules`.
        selectable: the names of modules with the trained weights that become matrices once they are named.
        typed: whether the user chose the matrices.
        all_linear: whether `all-linear` would find one.

    Raises:
        ValueError: always.
    """
    selectable = {name: weights for name, weights in selectable.items() if weights}
    if typed:
        got = f"optim_target_modules={shown(target_modules)} matched no trainable matrix"
        value = _meant(target_modules, selectable) or ("all-linear" if all_linear else "")
        raise ValueError(f"{got}: {_why_unmatched(model, target_modules)}. {_choices(selectable, value)}")
    if selectable and not _learns_prompts(model):
        convolutions = _convolutions(model, selectable)
        value = target_value(convolutions or selectable, selectable)
        raise ValueError(
            f"The model has no trainable matrix: {_instead(model, selectable)}. Type optim=adamw_torch, or "
            f"{_as_typed(value)} to treat these weights as matrices."
        )
    raise ValueError(_nothing_to_select(model))


def refuse_target(
    target_modules: object, error: Exception, selectable: Mapping[str, Sequence[nn.Parameter]]
) -> NoReturn:
    """Raise the error of an `optim_target_modules` that cannot be compared with names.

    Args:
        target_modules: what the user gave.
        error: of the comparison.
        selectable: as for `refuse_no_matrix`.

    Raises:
        ValueError: always.
    """
    value = _meant(target_modules, {name: weights for name, weights in selectable.items() if weights}) or "all-linear"
    wrong = "is no list of names, regular expression or 'all-linear'"
    if not isinstance(error, TypeError):
        wrong = f"is no regular expression ({error}): a string has to match the whole name of a module"
    raise ValueError(f"optim_target_modules={shown(target_modules)} {wrong}. Type {_as_typed(value)}.") from None


def target_value(names: Iterable[str], selectable: Mapping[str, Sequence[nn.Parameter]]) -> str:
    """Return a regular expression for `optim_target_modules` that matches modules and those named alike.

    A list cannot be typed on a command line; this can, in quotes. It holds no backslash, so that it is the same text
    in Python, in YAML and in a shell.

    Args:
        names: of the modules; those with the most weights go first where there are too many.
        selectable: the weights of each.

    Example:
        >>> import torch
        >>> from hf_stateless.trainer.advice import target_value
        >>> weights = {f"layers.{i}.conv1": [torch.nn.Parameter(torch.zeros(2, 2))] for i in range(2)}
        >>> target_value(weights, weights)
        '.*conv1'
    """
    sizes: dict[str, int] = {}
    for name in names:
        tail = _tail(name)
        sizes[tail] = sizes.get(tail, 0) + sum(p.numel() for p in selectable[name])
    tails = sorted(sizes, key=lambda tail: -sizes[tail])[:_MOST_IN_A_VALUE]
    value = _joined(tails)
    # The layers that PEFT wraps hold their factors below their own name.
    return value if any(_matches(value, name) for name in selectable) else _joined([f"{tail}.*" for tail in tails])


def _tail(name: str) -> str:
    """Return a pattern for the end of a name from its last word on, or for all of it where it has numbers only."""
    parts = [as_pattern(part) for part in _PEFT_TAIL.sub("", name).split(".")]
    words = [i for i, part in enumerate(parts) if not part.isdecimal()]
    if not words:
        return ".".join(parts)
    numbers = ["[0-9]+"] * (len(parts) - words[-1] - 1)
    return ".*" + ".".join([parts[words[-1]], *numbers])


def _joined(patterns: Sequence[str]) -> str:
    if len(patterns) > 1 and all(pattern.startswith(".*") for pattern in patterns):
        return f".*({'|'.join(pattern.removeprefix('.*') for pattern in patterns)})"
    return "|".join(patterns)


def _matches(target_modules: Any, name: str) -> bool:
    return bool(check_target_module_exists(target_modules, name))


def _as_typed(value: str) -> str:
    return f"optim_target_modules='{value}' (on a command line in the same quotes)"


def _words(target_modules: object) -> list[str]:
    """Return what may be names in a value that does not work: in a list written as text, or behind a lone `*`."""
    return [word.strip(".") for word in re.findall(r"[A-Za-z_][\w.-]{2,}", str(target_modules)[:2000])][:20]


def as_pattern(name: str) -> str:
    """Return a name as a regular expression that needs no escapes: `.` for what is no letter, digit, `_` or `-`."""
    return re.sub(r"[^\w-]", ".", name)


def first_of(names: Sequence[str], most: int) -> str:
    """Return the first names of some, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _listed(names: Iterable[str]) -> str:
    return first_of(sorted(set(names)), _MOST_NAMES)


def _last(name: str) -> str:
    """Return the part of a module's name that people know: the last one that is no number."""
    return _tail(name).removeprefix(".*").replace("[0-9]+", "*")


def _choices(selectable: Mapping[str, Sequence[nn.Parameter]], value: str) -> str:
    """Return which names there are, and what could be typed."""
    if not selectable:
        return "Nothing else of this model can be one: type optim=adamw_torch."
    names, value = _listed(map(_last, selectable)), value or target_value(selectable, selectable)
    return f"Linear layers, convolutions and heads of this model: {names}. Type {_as_typed(value)}."


def _meant(target_modules: object, selectable: Mapping[str, Sequence[nn.Parameter]]) -> str:
    """Return a value that works and is close to what was typed; empty if there is none."""
    lasts = {_last(name): name for name in selectable}
    meant = []
    for word in _words(target_modules):
        if word not in lasts and any(word in name for name in selectable):
            meant.append(f".*{word}.*")
        else:
            meant += [_tail(lasts[last]) for last in difflib.get_close_matches(word, lasts, n=1, cutoff=0.75)]
    meant = [*dict.fromkeys(meant)][:_MOST_IN_A_VALUE]
    tries = (_joined(meant), _joined([f"{pattern}.*" for pattern in meant]))
    return next((value for value in tries if meant and any(_matches(value, name) for name in selectable)), "")


def _why_unmatched(model: nn.Module, target_modules: object) -> str:
    """Return what the modules are that were named, if there are any."""
    matched = {name: module for name, module in model.named_modules() if name and _matches(target_modules, name)}
    wrapped = _parametrized(matched.items())
    if wrapped:
        return _under_parametrization(wrapped)
    if any(isinstance(module, LAYERS) for module in matched.values()):
        layers = {name: module for name, module in matched.items() if isinstance(module, LAYERS)}
        tied = any(getattr(module.weight, "requires_grad", False) for module in layers.values())
        return f"what it names ({_listed(map(_last, layers))}) is {'an embedding too' if tied else 'frozen'}"
    if matched:
        kinds = _listed(type(module).__name__ for module in matched.values())
        return f"what it names is no linear layer and no convolution ({kinds})"
    whole = " as a whole, which is what a string has to match" if isinstance(target_modules, str) else ""
    return f"no module has such a name{whole}"


def _convolutions(model: nn.Module, selectable: Iterable[str]) -> list[str]:
    modules = dict(model.named_modules())
    return [name for name in selectable if isinstance(modules[name], CONVOLUTIONS)]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _instead(model: nn.Module, selectable: Mapping[str, Sequence[nn.Parameter]]) -> str:
    """Return what is trained instead of linear layers, by what could be selected."""
    convolutions = _convolutions(model, selectable)
    others = _listed(_last(name) for name in selectable if name not in convolutions)
    if any(_PEFT_TAIL.search(name) for name in convolutions):
        found = f"its adapters are on convolutions ({_listed(_last(name) for name in convolutions)})"
    elif convolutions:
        found = f"it trains no linear layer but {_count(len(convolutions), 'convolution')}"
        found += f" and a head ({others})" if others else ""
    else:
        found = f"of its linear layers it trains only what writes the output or chooses experts ({others})"
    wrapped = _parametrized(model.named_modules())
    return f"{found}; {_under_parametrization(wrapped)}" if wrapped else f"{found}, which AdamW updates"


def _learns_prompts(model: nn.Module) -> bool:
    """Tell whether PEFT trains virtual tokens, whose layers are there to make them."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def _nothing_to_select(model: nn.Module) -> str:
    """Return the error of a model in which nothing can be named that would be a matrix."""
    methods = sorted({str(config.peft_type.value) for config in getattr(model, "peft_config", {}).values()})
    if methods and methods != ["LORA"]:
        return (
            f"The model has no trainable matrix: what PEFT's {', '.join(methods)} trains is no weight of a linear "
            "layer. Type optim=adamw_torch, or use LoraConfig (use_rslora and use_dora included)."
        )
    wrapped = _parametrized(model.named_modules())
    if wrapped:
        return f"The model has no trainable matrix: {_under_parametrization(wrapped)}, or type optim=adamw_torch."
    layers = sum(isinstance(module, LAYERS) for module in model.modules())
    why = f"its {layers} linear layers and convolutions are frozen" if layers else "it has no linear layer"
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return (
        f"The model has no trainable matrix: {why}, and what it trains ({len(trained)} tensors, such as {trained[0]}) "
        "is for AdamW. Type optim=adamw_torch."
    )


def _parametrized(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, tuple[str, str]]:
    """Map trained layers whose weight is computed from other parameters to what does that, and what takes it off."""
    found = {}
    for name, module in modules:
        own = {key for key, p in module.named_parameters(recurse=False) if p.requires_grad}
        if parametrize.is_parametrized(module, "weight") and any(p.requires_grad for p in module.parameters()):
            kind = type(module.parametrizations["weight"][0]).__name__.strip("_")  # type: ignore[index]
            found[name] = (kind, "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')")
        elif "weight_g" in own or "weight_v" in own:
            found[name] = ("weight_norm", "torch.nn.utils.remove_weight_norm(layer)")
        elif "weight_orig" in own and hasattr(module, "weight_mask"):
            found[name] = ("pruning", "torch.nn.utils.prune.remove(layer, 'weight')")
        elif "weight_orig" in own:
            found[name] = ("spectral_norm", "torch.nn.utils.remove_spectral_norm(layer)")
    return found


def _under_parametrization(wrapped: Mapping[str, tuple[str, str]]) -> str:
    kinds = ", ".join(sorted({kind for kind, _ in wrapped.values()}))
    fixes = " and ".join(sorted({fix for _, fix in wrapped.values()}))
    layers = _listed(_last(name) for name in wrapped)
    return f"the weights of {_count(len(wrapped), 'layer')} ({layers}) are computed by {kinds}: take it off by {fixes}"

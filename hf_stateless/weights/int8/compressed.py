"""The layout of `compressed-tensors`: what a `config.json` says of 8-bit weights, read and written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .codes import COMMON_LENGTHS
from .linear import Int8Linear, sizes_of


METHOD = "compressed-tensors"
_OURS = "hf_stateless_"
"""How the groups of a config are called that this package wrote; others read no meaning into it."""
_PACKED, _PLAIN = ("pack-quantized",), ("int-quantized", "naive-quantized")
_REFUSED = "Int8TrainingConfig trains on symmetric int8 weights with one scale for a group or a row, and nothing else"


@dataclass(frozen=True)
class Group:
    """Layers that are stored alike."""

    targets: tuple[str, ...]
    """Names of layers, regular expressions after `re:`, or names of classes."""
    group_size: int | None
    """Weights that share a scale; None for all of a row."""
    packed: bool
    ours: bool


@dataclass(frozen=True)
class Layout:
    """What the config of a folder says."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]


def read_layout(config: Mapping[str, Any]) -> Layout:
    """Return what a `quantization_config` says.

    Args:
        config: from `config.json`, with `quant_method: compressed-tensors`.

    Raises:
        ValueError: it describes something else than symmetric int8 weights with a scale for a group or a row.

    Example:
        >>> from hf_stateless.weights.int8.compressed import read_layout
        >>> weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
        >>> groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        >>> read_layout({"format": "pack-quantized", "quantization_status": "compressed", "config_groups": groups,
        ...              "ignore": ["lm_head"]}).groups[0].group_size
        64
    """
    _expect(isinstance(config, Mapping), "the layout", config)
    for name in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        _expect(not config.get(name), f"{name}", config.get(name))
    _expect(
        config.get("quantization_status") == "compressed", "quantization_status", config.get("quantization_status")
    )
    groups, ignore = config.get("config_groups"), config.get("ignore") or []
    _expect(isinstance(groups, Mapping) and groups, "config_groups", groups)
    _expect(_are_names(ignore), "ignore", ignore)
    read = [_read_group(name, group, config.get("format")) for name, group in groups.items()]  # type: ignore[union-attr]
    found = tuple(group for group in read if group is not None)
    _expect(found, "config_groups", "no weights")
    return Layout(found, tuple(ignore))


def _read_group(name: str, group: Any, default: Any) -> Group | None:
    _expect(isinstance(group, Mapping), name, group)
    for part in ("input_activations", "output_activations"):
        _expect(group.get(part) is None, f"{name}: {part}", "quantised")
    weights, targets = group.get("weights"), group.get("targets")
    if weights is None:
        return None
    _expect(isinstance(weights, Mapping), f"{name}: weights", weights)
    _expect(_are_names(targets) and targets, f"{name}: targets", targets)
    size, order = weights.get("group_size"), weights.get("actorder")
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    _expect(bits == 8 and kind == "int", f"{name}: weights", f"{bits} bits, {kind}")
    _expect(weights.get("symmetric", True) is True, f"{name}: symmetric", weights.get("symmetric"))
    _expect(not weights.get("dynamic"), f"{name}: dynamic", weights.get("dynamic"))
    _expect(order in (None, False, "weight", "static"), f"{name}: actorder", order)
    strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
    by_row = strategy == "channel" and size in (None, -1)
    grouped = strategy == "group" and type(size) is int and size > 0
    _expect(by_row or grouped, f"{name}: strategy", f"{strategy}, group_size {size}")
    layout = group.get("format") or default
    _expect(layout in (*_PACKED, *_PLAIN), f"{name}: format", layout)
    return Group(tuple(targets), size if grouped else None, layout in _PACKED, name.startswith(_OURS))


def _expect(condition: object, what: str, got: object) -> None:
    if not condition:
        said = " ".join(str(got).split())[:80]
        raise ValueError(
            f"quantization_config: {what} is {said}. {_REFUSED}: leave quantization_config out to run it."
        )


def _are_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def stored_layers(model: PreTrainedModel, layout: Layout) -> dict[str, Group]:
    """Return the linear layers of a model that a layout speaks of, each with how it is stored.

    Names go before regular expressions, and those before classes. Tied layers are left out.

    Raises:
        ValueError: something else than a linear layer is meant, a row is no whole number of groups, or nothing fits.
    """
    tied = {name.removesuffix(".weight") for name in getattr(model, "all_tied_weights_keys", None) or ()}
    found: dict[str, Group] = {}
    for name, module in model.named_modules():
        group = _group_of(name, module, layout)
        if group is None or name in tied:
            continue
        if isinstance(module, nn.Embedding):
            raise ValueError(f"quantization_config: {name} is an embedding in 8 bits. {_REFUSED}, in linear layers.")
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if group.group_size and sizes_of(module)[0] % group.group_size:
            raise ValueError(
                f"quantization_config: rows of {name} are no whole number of groups of {group.group_size}."
            )
        found[name] = group
    if not found:
        raise ValueError(f"quantization_config: none of its targets is a linear layer of {type(model).__name__}.")
    return found


def _group_of(name: str, module: nn.Module, layout: Layout) -> Group | None:
    classes = {kind.__name__ for kind in type(module).__mro__}
    if any(_fits(name, classes, target) for target in layout.ignore):
        return None
    ranked = [
        (target in classes and target != name, target.startswith("re:"), target, group)
        for group in layout.groups
        for target in group.targets
        if _fits(name, classes, target)
    ]
    return min(ranked, key=lambda entry: entry[:3])[3] if ranked else None


def _fits(name: str, classes: Iterable[str], target: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target[3:], name) is not None
        except re.error as error:
            raise ValueError(f"quantization_config: {target} is no regular expression ({error}).") from None
    return target == name or target in classes


def describe(model: PreTrainedModel, *, packed: bool = True) -> dict[str, Any]:
    """Return the `quantization_config` of a model with 8-bit layers, as `compressed-tensors` and vLLM read it.

    Layers are named by regular expressions that fit with and without a head or a tower around the backbone, and that
    no other layer fits, so that a head which a reader adds stays in float.
    """
    kinds: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            size = None if module.length == module.in_features else module.length
            kinds[name] = (size, module.ours)
        elif isinstance(module, nn.Linear | Conv1D):
            kinds[name] = "float"
    prefix = f"{model.base_model_prefix}."
    stored = Counter(kind for kind in kinds.values() if kind != "float").most_common()
    groups = {}
    for i, ((size, ours), _) in enumerate(stored):
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel", "group_size": None}
        groups[f"{_OURS if ours else 'group_'}{i}"] = {
            "targets": _targets(kinds, (size, ours), prefix),
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": METHOD,
        "format": (_PACKED if packed else _PLAIN)[0],
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": _targets(kinds, "float", prefix),
    }


def _targets(kinds: Mapping[str, Any], kind: Any, prefix: str) -> list[str]:
    """Return targets that the layers of a kind fit, and no others."""
    others = [name for name, other in kinds.items() if other != kind]
    mine = [name for name, own in kinds.items() if own == kind]
    targets: dict[str, None] = {}
    taken: set[str] = set()
    for name in mine:
        if name in taken:
            continue
        if "." not in name:
            targets[name] = None
            continue
        for pattern in _patterns(name, prefix):
            if not any(re.match(pattern, other) for other in others):
                break
        targets[f"re:{pattern}"] = None
        taken.update(own for own in mine if re.match(pattern, own))
    return list(targets)


def _patterns(name: str, prefix: str) -> Iterable[str]:
    """Yield regular expressions for a layer, from the one that fits most others of its kind to its name alone."""
    parts = name.removeprefix(prefix).split(".")
    any_layer = [r"\d+" if part.isdigit() else re.escape(part) for part in parts]
    exact = [re.escape(part) for part in parts]
    first = max(next((i for i, part in enumerate(parts) if part.isdigit()), 0) - 1, 0)
    for words in (any_layer, exact):
        yield rf"(?:.*\.)?{_joined(words[first:])}$"
        yield rf"(?:{re.escape(prefix)})?{_joined(words)}$"
    yield f"{re.escape(name)}$"


def _joined(words: Sequence[str]) -> str:
    return r"\.".join(words)


def has_kernels(layers: Iterable[Int8Linear]) -> bool:
    """Tell whether vLLM has kernels for the groups of 8-bit layers, of which there is at least one."""
    fits = [layer.length == layer.in_features or layer.length in COMMON_LENGTHS for layer in layers]
    return bool(fits) and all(fits)

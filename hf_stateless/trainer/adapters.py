"""What PEFT's LoRA adapters are made of: factors, and which two of them make one product."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn


# What LoRA trains, by the name of the part of a layer that holds it.
_PART = re.compile(r"(^|\.)lora_\w+(\.|$)")
# A factor of LoRA by its name: the module that owns it is a plain linear layer.
_FACTOR = re.compile(r"\.lora_(embedding_)?[AB]\.")


@dataclass(frozen=True)
class LoraPair:
    """The two factors of which PEFT adds `scaling` B A to a weight, both trained."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    """alpha / r, or alpha / sqrt(r) for rsLoRA, as it is when the groups are made."""
    layout: str
    """`out_in` where B A is stored as a linear weight is, `in_out` for an embedding, of which it is the transpose."""
    experts: int = 1
    """How many products the two make, see `expert_layouts`."""


def lora_linears(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the linear layers that a PEFT tuner layer added to the layer it wraps."""
    if hasattr(module, "base_layer"):
        for name, child in module.named_children():
            if name != "base_layer":
                yield from (m for m in child.modules() if isinstance(m, nn.Linear))


def expert_layouts(model: nn.Module) -> dict[int, str]:
    """Return how the factors of experts lie, by the id of the linear layer that holds the factors of all of them.

    PEFT's `target_parameters` adapts a stack of E experts by one A in R^{E r x n}, those of the experts one after the
    other, and one B in R^{m x r E}, whose columns are dealt out: column j belongs to expert j mod E.
    """
    found: dict[int, str] = {}
    for module in (m for m in model.modules() if _experts(m) > 1):
        for factors, sign in ((module.lora_A, "*"), (module.lora_B, "/")):
            assert isinstance(factors, nn.ModuleDict)
            found |= {id(factor): f"out_in{sign}{_experts(module)}" for factor in factors.values()}
    return found


def _experts(module: nn.Module) -> int:
    """Return for how many experts a layer of PEFT holds factors, 1 for any other module."""
    holds = all(isinstance(getattr(module, name, None), nn.ModuleDict) for name in ("lora_A", "lora_B"))
    return int(getattr(module, "num_experts", 1)) if holds and hasattr(module, "base_layer") else 1


def has_lora(model: nn.Module) -> bool:
    """Tell whether a model trains a LoRA factor, in a pair or alone."""
    return any(p.requires_grad and _FACTOR.search(name) for name, p in model.named_parameters())


def is_factor(name: str) -> bool:
    """Tell by the name of a parameter whether LoRA trains it: its rows are no tokens, also beside an embedding.

    Example:
        >>> from hf_stateless.trainer.adapters import is_factor
        >>> [is_factor(f"embed_tokens.{name}.default") for name in ("lora_embedding_A", "trainable_tokens_delta")]
        [True, False]
    """
    return bool(_PART.search(name))


def lora_pairs(model: nn.Module) -> Iterator[LoraPair]:
    """Yield the pairs of LoRA factors, of every adapter, that are in no other pair and whose effect is B A.

    PEFT's adapters of stacks of experts are a product for each expert, in one pair of parameters; those of grouped
    convolutions are no product, and AdaLoRA has a diagonal between the two.
    """
    found = []
    for module in (m for m in model.modules() if hasattr(m, "base_layer") and not hasattr(m, "lora_E")):
        plain, experts = getattr(module.base_layer, "groups", 1) == 1, _experts(module)
        for kind, layout in (("lora_", "out_in"), ("lora_embedding_", "in_out")):
            first, second = getattr(module, f"{kind}A", None), getattr(module, f"{kind}B", None)
            if plain and first is not None and second is not None:
                found += list(_pairs_of_layer(first, second, getattr(module, "scaling", {}), layout, experts))
    uses = Counter(id(p) for pair in found for p in (pair.a, pair.b))
    yield from (pair for pair in found if uses[id(pair.a)] == uses[id(pair.b)] == 1)


def _pairs_of_layer(
    first: nn.Module, second: nn.Module, scaling: Mapping[str, float], layout: str, experts: int
) -> Iterator[LoraPair]:
    of_a, of_b = (dict(_weights_by_adapter(factors)) for factors in (first, second))
    for adapter in [name for name in of_a if name in of_b and name in scaling]:
        a, b = of_a[adapter], of_b[adapter]
        if a.requires_grad and b.requires_grad and b[0].numel() == len(a) and scaling[adapter] > 0:
            yield LoraPair(a, b, float(scaling[adapter]), layout, experts)


def _weights_by_adapter(factors: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    if not isinstance(factors, nn.ModuleDict | nn.ParameterDict):
        return
    for adapter, factor in factors.items():
        weight = factor.weight if isinstance(factor, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) else factor
        if isinstance(weight, nn.Parameter):
            yield adapter, weight

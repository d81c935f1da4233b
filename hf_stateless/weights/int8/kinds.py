"""Which weights a module computes with by itself: stacks of experts, projections of attention."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn


_ROUTER = re.compile(r"(^|\.)(\w*router|gate|wg|switch)(\.|$)")
# Of attention, where queries, keys and values have one size, and where they have not.
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def expert_stacks(module: nn.Module) -> list[str]:
    """Return the names of the parameters of a module that are stacks of matrices, one for each expert.

    They have three dimensions, in a module whose class is named so or that knows of as many experts.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hf_stateless.weights.int8.kinds import expert_stacks
        >>> layer = nn.Module()
        >>> layer.num_experts, layer.weight = 4, nn.Parameter(torch.zeros(4, 8, 2))
        >>> expert_stacks(layer)
        ['weight']
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return []
    named = any("Experts" in kind.__name__ for kind in type(module).__mro__)
    counts = {count for owner in (module, getattr(module, "config", None)) for count in _expert_counts(owner)}
    return [
        name
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and (named or (len(p) > 1 and len(p) in counts))
    ]


def routers(model: nn.Module) -> set[int]:
    """Return the identities of the linear layers that choose among the stacks of experts beside them.

    They have an output for each expert, and a name that says so.
    """
    found = set()
    for path, module in model.named_modules():
        counts = {len(getattr(module, name)) for name in expert_stacks(module)}
        beside = model.get_submodule(path.rpartition(".")[0]) if counts and path else module
        for name, layer in beside.named_modules() if counts else ():
            if isinstance(layer, nn.Linear) and layer.out_features in counts and _ROUTER.search(name):
                found.add(id(layer))
    return found


def _expert_counts(owner: object) -> set[int]:
    fields = getattr(owner, "__dict__", {})
    return {value for name, value in fields.items() if "expert" in name and type(value) is int}


def computed_by_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the weights that modules compute with by themselves and that are worth 8 bits: module and names.

    Matrices of one row or column have nothing to save. The encoder layer of torch reads the weights of its attention
    past the attention's code, so those are left out.
    """
    left_out = {id(layer.self_attn) for layer in model.modules() if isinstance(layer, nn.TransformerEncoderLayer)}
    for path, module in model.named_modules():
        owners: list[tuple[str, nn.Module, Sequence[str]]] = [(path, module, expert_stacks(module))]
        if isinstance(module, nn.MultiheadAttention) and id(module) not in left_out:
            projection = f"{path}.out_proj".lstrip(".")
            owners = [(path, module, _PROJECTIONS), (projection, module.out_proj, ("weight",))]
        for place, owner, names in owners:
            for name in names:
                weight = dict(owner.named_parameters(recurse=False)).get(name)
                if weight is not None and min(weight.shape[-2:]) > 1:
                    yield place, owner, name

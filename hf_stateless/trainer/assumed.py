"""What the partition of a model assumed, each as a line that says how to change it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .advice import as_pattern, first_of
from .heads import find_heads
from .matrices import matrix_weights


_LONGEST = 400  # characters of a value that somebody types
_MOST_NAMES = 3


def assumptions(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each thing that groups made without `optim_target_modules` could not know.

    Args:
        model: all of it.
        groups: from `hf_stateless.trainer.factory.parameter_groups`.

    Example:
        >>> from torch import nn
        >>> from hf_stateless.trainer.assumed import assumptions
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> group = {"role": "matrix", "param_names": ["0.weight", "2.weight"], "params": [model[0].weight]}
        >>> for line in assumptions(model, [group]):
        ...     print(line.split(". ")[1])
        If it writes classes, tokens or values, type optim_target_modules='.*(0)' to leave it to AdamW.
    """
    roles = {name: group["role"] for group in groups for name in group["param_names"]}
    matrices = [name.rpartition(".")[0] for name, role in roles.items() if role in ("matrix", "adapter")]
    heads = find_heads(model)
    assumed = [name for name in heads.assumed if f"{name}.weight" in roles]
    if assumed and matrices:
        yield (
            "Taken for heads, since they stand behind the layers, and updated by AdamW: "
            f"{first_of(assumed, _MOST_NAMES)}. If they are layers like the others, type "
            f"{_typed(model, matrices + assumed)}."
        )
    undecided = [name for name in heads.undecided if name in matrices]
    if undecided and len(matrices) > 1 and "adapter" not in roles.values():
        last = undecided[-1]
        yield (
            f"Nothing tells whether the last linear layer, {last}, is a head, so it is updated as a matrix. If it "
            "writes classes, tokens or values, type "
            f"{_typed(model, [name for name in matrices if name != last])} to leave it to AdamW."
        )
    yield from _small_share(groups)


def _small_share(groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say it where most of what is neither embedding nor head is left to AdamW."""
    inner = [
        (group["role"], name, p)
        for group in groups
        for name, p in zip(group["param_names"], group["params"], strict=False)
        if group["role"] not in ("embedding", "head")
    ]
    total = sum(p.numel() for _, _, p in inner)
    rest = sorted(((p.numel(), name, p) for role, name, p in inner if role == "rest"), key=lambda row: -row[0])
    share = 1 - sum(numel for numel, _, _ in rest) / total if total else 1.0
    if share < 0.5:
        largest = first_of([f"{name} {tuple(p.shape)}" for _, name, p in rest], _MOST_NAMES)
        yield (
            f"Only {share:.0%} of the trained weights outside embeddings and heads are matrices; AdamW updates the "
            f"rest and keeps two moments of it: {largest}."
        )


def _typed(model: nn.Module, names: Iterable[str]) -> str:
    """Return what to type for these modules to be the matrices; names alone where a pattern would be too long."""
    pattern = pattern_of(model, names)
    return f"optim_target_modules={pattern!r}" if len(pattern) <= _LONGEST else "optim_target_modules with their names"


def pattern_of(model: nn.Module, names: Iterable[str]) -> str:
    """Return a regular expression that matches these modules of a model and no others, as short as one can be typed.

    Example:
        >>> from torch import nn
        >>> from hf_stateless.trainer.assumed import pattern_of
        >>> block = nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4), "norm": nn.LayerNorm(4)})
        >>> pattern_of(nn.ModuleList([block]), ["0.up", "0.down"])
        '.*(down|up)'
    """
    wanted = set(names)
    plain = {as_pattern(name) for name in wanted}
    modules = model.named_modules(remove_duplicate=False)
    layers = {name for name, module in modules if any(True for _ in matrix_weights(module, convolutions=True))}
    ends = "|".join(sorted({as_pattern(name.rpartition(".")[2]) for name in wanted}))
    # Neither backslashes nor escapes: what is printed can be typed in Python, in YAML and on a command line.
    numbered = sorted({re.sub("[0-9]+", "[0-9]+", name) for name in plain})
    for pattern in (rf".*({ends})", rf"(.*[.])?({ends})", "|".join(numbered)):
        if {name for name in layers if re.fullmatch(pattern, name)} == wanted:
            return pattern
    return "|".join(sorted(plain))

"""How plans of transformers name parameters, by which it cuts them over ranks while it loads them."""

from __future__ import annotations

import re
from collections.abc import Mapping


def style_of(name: str, plan: Mapping[str, str]) -> str | None:
    """Return how a parallel plan of transformers cuts a parameter: by its own name, or that of its module.

    Example:
        >>> from hf_stateless.weights.plans import style_of
        >>> style_of("layers.3.mlp.up_proj.weight", {"layers.*.mlp.up_proj": "colwise"})
        'colwise'
    """
    own = in_plan(name)
    return plan.get(own) or plan.get(own.rpartition(".")[0])


def in_plan(name: str) -> str:
    """Return a name as plans write it: a star for the number of a layer."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)

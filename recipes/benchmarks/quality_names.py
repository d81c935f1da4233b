"""What the rows of `quality.py` are called where people read of them."""

from __future__ import annotations

import re


FAMILIES = {
    "AdamW": "adamw, rates apart",
    "Muon": "muon",
    "`swan`": "swan",
    "`swan`, `momentum=0.9`": "swan, momentum 0.9",
    "`swan`, `newton_schulz`": "swan, newton_schulz",
    "`sinkgd_polar`": "sinkgd 1, polar 1",
    "`sinkgd`": "sinkgd",
    "`swan`, `newton_schulz`, `embeddings=factored`": "swan, newton_schulz, factored tables",
    "`swan`, `newton_schulz`, `embeddings=row_moment`": "swan, newton_schulz, row_moment tables",
}
"""What an optimizer is called, and how the rows of the plan begin that may stand for it."""
_REST = re.compile(r", rest ([\d/]+)x$")


def family_of(row: str) -> str:
    """Return a row of the plan without the multiples of its rates.

    Example:
        >>> family_of("adamw, rates apart, rest 32/4/16x")
        'adamw, rates apart'
    """
    return _REST.sub("", row)


def title_of(row: str) -> str:
    """Return what the optimizer of a row is called, or the row itself where it is of no family.

    Example:
        >>> title_of("sinkgd 1, polar 1, rest 32/4/16x"), title_of("adamw")
        ('`sinkgd_polar`', 'AdamW, one rate')
    """
    titles = {family: title for title, family in FAMILIES.items()}
    return {**titles, "adamw": "AdamW, one rate"}.get(family_of(row), row)


def kinds_of(row: str) -> str:
    """Return the multiples of the rates of a row for embeddings, head and norms.

    Example:
        >>> kinds_of("swan, rest 32/4/16x"), kinds_of("swan")
        ('32x / 4x / 16x', '1x / 1x / 1x')
    """
    found = _REST.search(row)
    return " / ".join(f"{kind}x" for kind in (found[1] if found else "1/1/1").split("/"))

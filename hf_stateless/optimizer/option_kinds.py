"""How the value of an option is read: text from `optim_args`, or a Python value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """How a value is read."""

    parse: Callable[[Any], Any]
    """Reads text and Python values; what it cannot read is a ValueError, TypeError or KeyError."""
    values: str = ""
    """Which values there are, in words."""
    names: Callable[[], Sequence[str]] = tuple
    """The words that may be written, where it is one of some; asked when they are needed."""

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that may be written, if it is one of some."""
        return tuple(self.names())

    @property
    def expected(self) -> str:
        """What a refusal says that it expected."""
        return self.values or " | ".join(self.choices)


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


COUNT = Kind(_positive_integer, "an integer of at least 1")
WHOLE = Kind(_integer, "an integer of at least 0")
NUMBER = Kind(_number, "a number of at least 0")
FRACTION = Kind(_fraction, "a number in [0, 1)")
SWITCH = Kind(_boolean, "true or false")
CHAIN = Kind(_chain, "norm projections joined by +, like row_l2+spectral")


def choice(names: Sequence[str] | Callable[[], Sequence[str]]) -> Kind:
    """Return the kind of an option that is one of some words, or of those that a function returns.

    Example:
        >>> from hf_stateless.optimizer.option_kinds import choice
        >>> choice(("matrices", "all")).expected
        'matrices | all'
    """
    known = names if callable(names) else lambda: names

    def parse(text: Any) -> str:
        if text not in known():
            raise ValueError
        return str(text)

    return Kind(parse, names=known)

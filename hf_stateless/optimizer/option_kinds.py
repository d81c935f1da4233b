"""How the value of an option is read, from `optim_args` or Python, and in which runs it means something."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


LAYERWISE = "_layerwise"
"""What names end with whose matrices are updated in backward."""
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError)
"""What reading a value may raise: a tensor has no truth, a float no place for 10**400."""
_MOST_SHOWN = 100
# More iterations would never end, seeds have 64 bits, and float32 ends at 2**128.
_COUNT_END, _SEED_END, _NUMBER_END = 1_000_000, 2**63, 2.0**127


def shown(value: Any) -> str:
    """Return a value for an error text of one line: as Python writes it, a long one cut.

    Example:
        >>> from hf_stateless.optimizer.option_kinds import shown
        >>> shown("3"), shown("3" * 10_000)[:9] + "..." + shown("3" * 10_000)[-23:]
        ("'3'", "'33333333...... (10,002 characters)")
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # integers of many digits, and objects that cannot be shown
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 30]}... ({len(text):,} characters)"


@dataclass(frozen=True)
class Kind:
    """How a value is read."""

    parse: Callable[[Any], Any]
    """Reads text and Python values; what it cannot read is one of `UNREADABLE`."""
    values: str = ""
    """Which values there are, in words."""
    names: Callable[[], Sequence[str]] = tuple
    """The words that may be written, where it is one of some; asked when they are needed."""

    @property
    def expected(self) -> str:
        """What a refusal says that it expected."""
        return self.values or " | ".join(self.names())


@dataclass(frozen=True)
class BelongsTo:
    """The runs in which an option means something: all that is set here has to hold."""

    optim: str = ""
    """An optimizer name, with or without `_layerwise`."""
    whitening: bool = False
    """True: chains with a whitening only."""
    release: bool | None = None
    """True: layer-wise names only. False: the other names only."""
    option: str = ""
    """Another option, without which this one changes nothing; it may be given all the same."""

    def __str__(self) -> str:
        parts = {
            f"`{self.optim}`": self.optim,
            "chains with a whitening, as `spectral`": self.whitening,
            f"names with `{LAYERWISE}`": self.release,
            f"names without `{LAYERWISE}`": self.release is False,
            f"runs with `{self.option}`": self.option,
        }
        return ", ".join(part for part, holds in parts.items() if holds) or "all"


def _numbers(read: Callable[[Any], float], values: str, *, least: int = 0, below: float = math.inf) -> Kind:
    def parse(text: Any) -> float:
        value = read(text)
        if not least <= value < below or isinstance(text, bool):
            raise ValueError
        return value

    return Kind(parse, values)


def _integer(text: Any) -> int:
    value = int(text)
    if str(value) != str(text).strip():
        raise ValueError
    return value


def _boolean(text: Any) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[str(text).lower()]


def _chain(text: Any) -> tuple[str, ...]:
    norms = tuple(text.split("+")) if isinstance(text, str) else tuple(text)
    if not all(isinstance(norm, str) for norm in norms):
        raise ValueError
    return norms


COUNT = _numbers(_integer, f"an integer of at least 1, below {_COUNT_END:,}", least=1, below=_COUNT_END)
WHOLE = _numbers(_integer, "an integer of at least 0, below 2**63", below=_SEED_END)
NUMBER = _numbers(float, "a number of at least 0, below 2**127", below=_NUMBER_END)
FRACTION = _numbers(float, "a number in [0, 1)", below=1)
SWITCH = Kind(_boolean, "true or false")
CHAIN = Kind(_chain, "norm projections joined by +, like row_l2+spectral")


def choice(names: Sequence[str] | Callable[[], Sequence[str]]) -> Kind:
    """Return the kind of an option that is one of some words, or of those that a function returns."""
    known = names if callable(names) else lambda: names

    def parse(text: Any) -> str:
        if text not in known():
            raise ValueError
        return str(text)

    return Kind(parse, names=known)

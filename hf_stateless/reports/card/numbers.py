"""Numbers as a model card writes them."""

from __future__ import annotations

from math import floor, log10

from ..files import GIB


def gib(size: int | None) -> str:
    """Return bytes in GiB with three significant digits.

    Example:
        >>> from hf_stateless.reports.card.numbers import gib
        >>> gib(3 << 29), gib(123456), gib(0), gib(None)
        ('1.50', '0.000115', '0', '')
    """
    return "" if size is None else number(size / GIB, digits=3, smallest=0.0)


def number(value: float | None, digits: int = 4, smallest: float = 1e-5) -> str:
    """Return a number with so many significant digits and without an exponent, where that is readable.

    Example:
        >>> from hf_stateless.reports.card.numbers import number
        >>> number(4238.4), number(0.0512345), number(1.0), number(2e-9)
        ('4238', '0.05123', '1.000', '2e-09')
    """
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or abs(value) >= 1e9 or abs(value) < smallest:
        return f"{value:.{digits}g}"
    return f"{value:.{max(0, digits - 1 - floor(log10(abs(value))))}f}"

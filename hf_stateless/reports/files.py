"""Files that appear whole or not at all, the JSON in them, and the units that sizes are shown in."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


GIB = 1 << 30
_UNITS = (("GiB", GIB, 0.1), ("MiB", 1 << 20, 1.0), ("KiB", 1 << 10, 1.0), ("B", 1, 0.0))
"""Each unit with its bytes, and from how many of them on it is taken."""


def unit_of(size: float) -> tuple[str, int]:
    """Return the unit that suits a size in bytes, and its bytes."""
    return next((name, unit) for name, unit, least in _UNITS if abs(size) >= least * unit)


def size_text(size: float | None) -> str:
    """Return bytes with three significant digits in the unit that suits them; nothing for None.

    Example:
        >>> from hf_stateless.reports.files import size_text
        >>> [size_text(size) for size in (84, 8397980, 751190016, 3 << 40)]
        ['84 B', '8.01 MiB', '0.700 GiB', '3072 GiB']
    """
    if size is None:
        return ""
    name, unit = unit_of(size)
    value = size / unit
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{0 if name == 'B' else max(0, 3 - whole)}f} {name}"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path; what is written there replaces the file when the block ends without an error.

    Nobody reads half a file, and several processes may write the same one.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replace a file by a text, see `replacing`; its folder is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Any) -> None:
    """Replace a file by plain values, see `replacing`."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Return the plain values in a file of JSON."""
    return json.loads(Path(path).read_text(encoding="utf-8"))

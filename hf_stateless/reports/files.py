"""Files that appear whole or not at all, the JSON in them, and the unit that their sizes are shown in."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


GIB = 1 << 30


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

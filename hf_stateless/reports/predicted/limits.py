"""What keeps a config that somebody else wrote from running without end: its layers are counted, and time and memory.

Sizes that no model has are refused before anything is built. What they do not show, a thread watches.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil  # type: ignore[import-untyped]
from torch import nn

from ...optimizer.option_kinds import shown
from ..files import GIB


MOST_SECONDS = 120.0
"""Seconds of the processor that a prediction may take; a model of 7B takes about ten."""
MOST_BYTES = 4 * GIB
"""Memory that a prediction may take on top of what the process holds."""
MOST_LAYERS, MOST_CLASSES, MOST_ROWS, MOST_PARAMETERS = 2000, 10**6, 10**8, 10**14
_LAYERS = re.compile(r"layers?$|depths?$|^(num|n)_.*(blocks|stages)$")


def check_config(values: Any) -> None:
    """Refuse a config that is no object, or asks for more layers or classes than any model has.

    Raises:
        ValueError: it does, with the key and the value.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"expected an object of names and values, got {shown(values)}")
    for key, value in values.items():
        if isinstance(value, Mapping):
            check_config(value)
        most = MOST_CLASSES if key == "num_labels" else MOST_LAYERS if _LAYERS.search(str(key)) else None
        largest = max((n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)), default=0)
        if most and largest > most:
            raise ValueError(f"{shown(key)} is {shown(value)}, expected at most {most:,}")


def check_sizes(model: nn.Module) -> None:
    """Refuse a model of sizes that no model has, of which a step would be cut into pieces without end.

    Raises:
        ValueError: a weight with an enormous side, or too many weights altogether, or none.
    """
    total = 0
    for name, p in model.named_parameters():
        total += p.numel()
        if max(p.shape, default=0) > MOST_ROWS:
            raise ValueError(f"{name} has the shape {tuple(p.shape)}, expected sides of at most {MOST_ROWS:,}")
    if not 0 < total < MOST_PARAMETERS:
        raise ValueError(f"it has {total:,} parameters, expected more than none and less than {MOST_PARAMETERS:,}")


class _TooMuchError(BaseException):
    """Raised in the watched thread; no `except Exception` of a model's code stops it."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """End what is run inside after `MOST_SECONDS` of the processor or `MOST_BYTES` of memory.

    Raises:
        ValueError: it took more.
    """
    process, thread = psutil.Process(), ctypes.c_ulong(threading.get_ident())
    began, held = time.process_time(), process.memory_info().rss
    ended, found = threading.Event(), []

    def watch() -> None:
        while not ended.wait(0.2):
            seconds, size = time.process_time() - began, process.memory_info().rss - held
            if seconds > MOST_SECONDS or size > MOST_BYTES:
                found.append(f"{seconds:.0f} seconds and {max(0, size) / GIB:.1f} GiB")
                # Again and again: where Python cleans up, an exception is printed and dropped.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_TooMuchError))
                ended.wait(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
    except _TooMuchError:
        raise ValueError(
            f"stopped after {found[0]}: this model is too large, or loops over its tokens; try --seq 128."
        ) from None

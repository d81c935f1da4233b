"""Compile the C sources of this package for the processor that runs it; the torch twins need no compiler."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path


logger = logging.getLogger(__name__)

# What the processor can do is asked for in two ways, and some compilers know neither.
_MACHINES: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])
_OPTIONS = ("-O3", "-fopenmp-simd", "-shared", "-fPIC")
_LIMIT = 60.0


def compiler() -> list[str]:
    """Return the command of the C compiler, `$CC` or the first of cc, gcc and clang; an empty list without one."""
    chosen = shlex.split(os.environ.get("CC", ""))
    names = [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]
    return next(([found, *name[1:]] for name in names if (found := shutil.which(name[0]))), [])


@cache
def compiled(name: str) -> ctypes.CDLL | None:
    """Return a C source of this folder as a library, compiled once per process, with one log line.

    Args:
        name: of the file, without `.c`.

    Returns:
        The library; None where there is no compiler, or where it failed, which is a warning.
    """
    command = compiler()
    if not command:
        return None
    start = time.perf_counter()
    source = Path(__file__).with_name(f"{name}.c")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        target = Path(folder) / f"{name}.so"
        for machine in _MACHINES:
            problem = _run([*command, *_OPTIONS, *machine, "-o", str(target), str(source), "-lm"])
            if not problem:
                break
        try:
            library = None if problem else ctypes.CDLL(str(target))
        except OSError as error:
            problem, library = str(error), None
    if library is None:
        logger.warning("%s could not compile %s.c, so torch does its work: %s", command[0], name, problem)
    else:
        seconds = time.perf_counter() - start
        logger.info("Compiled %s.c for this CPU in %.1f s; HF_STATELESS_KERNELS=torch does without.", name, seconds)
    return library


def _run(command: list[str]) -> str:
    """Run a compiler and return the first line of what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]

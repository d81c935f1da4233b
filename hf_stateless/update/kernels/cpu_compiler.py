"""Compile the C sources of this package for the processor that runs it; the torch twins need no compiler."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

# What the processor can do is asked for in two ways, and some compilers know neither.
_MACHINES: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])
_OPTIONS = ("-O3", "-fopenmp-simd", "-shared", "-fPIC")
# Seconds for all attempts together: a step waits for them, and torch can do without.
_LIMIT = 20.0


def compiler() -> list[str]:
    """Return the command of the C compiler, `$CC` or the first of cc, gcc and clang; an empty list without one.

    Raises:
        ValueError: `$CC` has a quote that is not closed.
    """
    chosen = shlex.split(os.environ.get("CC", ""))
    names = [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]
    return next(([found, *name[1:]] for name in names if (found := shutil.which(name[0]))), [])


@cache
def compiled(name: str) -> ctypes.CDLL | None:
    """Return a C source of this folder as a library, compiled once per process, with one log line.

    Args:
        name: of the file, without `.c`.

    Returns:
        The library; None where there is no compiler, or where it failed, which is a warning. It never ends a run.
    """
    start = time.perf_counter()
    try:
        command = compiler()
        library = _compile(command, name, start + _LIMIT) if command else None
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        logger.warning("Could not compile %s.c, so torch does its work: %s", name, problem)
        return None
    if library is not None:
        seconds = time.perf_counter() - start
        logger.info("Compiled %s.c for this CPU in %.1f s; HF_STATELESS_KERNELS=torch does without.", name, seconds)
    return library


def _compile(command: list[str], name: str, deadline: float) -> ctypes.CDLL:
    """Compile and load a source.

    Raises:
        OSError: there is no place to write to, no attempt succeeded, or the result is no library.
    """
    source = Path(__file__).with_name(f"{name}.c")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        target = Path(folder) / f"{name}.so"
        for machine in _MACHINES:
            problem = _run([*command, *_OPTIONS, *machine, "-o", str(target), str(source), "-lm"], deadline)
            if not problem:
                return ctypes.CDLL(str(target))
        raise OSError(f"{command[0]}: {problem}")


def _run(command: list[str], deadline: float) -> str:
    """Run a compiler and return the first line of what went wrong; it and its children end with the deadline."""
    left = deadline - time.perf_counter()
    if left <= 0:
        return f"it took more than {_LIMIT:.0f} s"
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=os.name != "nt"
    )
    said = bytearray()
    reader = threading.Thread(target=_keep_the_beginning, args=(process.stderr, said), daemon=True)
    reader.start()
    try:
        process.wait(timeout=left)
        reader.join(timeout=1)
    except subprocess.TimeoutExpired:
        _end(process)
        return f"it took more than {_LIMIT:.0f} s"
    except BaseException:
        _end(process)
        raise
    lines = bytes(said).decode(errors="replace").strip().splitlines()
    return "" if process.returncode == 0 else (lines or [f"exit status {process.returncode}"])[0]


def _keep_the_beginning(stream: Any, said: bytearray) -> None:
    """Read all that a compiler says, so that it does not wait, and keep what may be its first lines."""
    with stream:
        while chunk := stream.read1(1 << 16):
            if len(said) < 1 << 16:
                said += chunk


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a compiler with the programs that it has started."""
    if os.name == "nt":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.stderr is not None
    process.stderr.close()
    process.wait()

"""One stage of `gpu.py` as a process of its own: with a time limit and a log, and never left behind by a dead run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


LINES_KEPT = 12
LOCK, STAGE_LOCK = ".gpu.lock", ".gpu-stage.lock"
# Of a log's last lines, the first that says what went wrong: an exception, or a line of our own recipes.
ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*|E  .*|.*\berror: .*|No .*)$")
PLACE = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int | None
    """Its exit status; None where it was stopped at its limit."""
    seconds: float
    lines: list[str]
    """The last ones that it printed."""


def run(command: Sequence[str], log: Path, limit: float, folder: Path, environment: Mapping[str, str]) -> Ended:
    """Run a command until it ends or its limit is over; all that it started ends with it.

    Args:
        command: program and arguments.
        log: takes what the process prints.
        limit: seconds.
        folder: where it works, and where the lock of the stage lies.
        environment: of the process.
    """
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output, (folder / STAGE_LOCK).open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The process inherits the lock: as long as it lives a later run finds it held, and the number in it is true.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
        lock.truncate(0)
        lock.write(str(process.pid))
        lock.flush()
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process.pid)
            process.wait()
    return Ended(code, round(time.monotonic() - start, 1), last_lines(log))


def end_group(leader: int) -> None:
    """End a process that we started, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def last_lines(log: Path) -> list[str]:
    """Return the last lines of a log without the folders of this machine; a bar that is written over counts once."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [PLACE.sub("", line)[:300] for line in lines if line.strip()][-LINES_KEPT:]


def telling_line(lines: Sequence[str]) -> str:
    """Return the line that says best why a process failed: its last error, or its last line.

    Example:
        >>> telling_line(["Traceback (most recent call last):", "ValueError: no room", "0 steps were made"])
        'ValueError: no room'
    """
    errors = [line for line in lines if ERROR.match(line)]
    return (errors or list(lines) or ["it printed nothing"])[-1].strip()


@contextlib.contextmanager
def alone(output: Path, folder: Path) -> Iterator[None]:
    """Hold a folder of results for this run, and end the stage that a killed run has left behind.

    Raises:
        SystemExit: another run writes to the folder.
    """
    with (output / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"Another run writes to {output}: wait for it, or type another --output.") from None
        with (folder / STAGE_LOCK).open("a+") as stage:
            stage.seek(0)
            leader = stage.read()
            try:
                fcntl.flock(stage, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # who was started by the killed run lives on, and would disturb what is measured now
                if leader.isdigit():
                    end_group(int(leader))
                fcntl.flock(stage, fcntl.LOCK_EX)
        yield

"""Where a process says how much memory it holds and has held at most, and how long the optimizer takes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque

import psutil  # type: ignore[import-untyped]
import torch


class ResidentSet:
    """The physical memory of this process, with everything in it: Python, libraries and data too.

    On Linux the kernel keeps the peak and resets it on request, so that no thread has to sample. Elsewhere the peak
    is that of the whole process so far, and `since` says so.
    """

    kind = "resident set"

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.since = "first step" if self._forgets() else "process start"

    def now(self) -> int:
        """Return what is held."""
        return int(self._process.memory_info().rss)

    def restart(self) -> None:
        """Reset the peak, where the operating system can."""
        if self.since == "first step":
            self._forgets()

    def peaks(self) -> tuple[int, int]:
        """Return the most that was held since the last restart, and 0: there is no allocator to ask."""
        if self.since == "first step":
            return _high_water(), 0
        if sys.platform == "win32":
            return int(self._process.memory_info().peak_wset), 0
        import resource  # which Windows does not have

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (peak if sys.platform == "darwin" else peak * 1024), 0

    def faults(self) -> tuple[int, int]:
        """Return zeros: there is no allocator to ask."""
        return 0, 0

    @staticmethod
    def _forgets() -> bool:
        """Reset the kernel's high-water mark; False where there is none, or no right to."""
        with contextlib.suppress(OSError):
            with open("/proc/self/clear_refs", "wb", buffering=0) as file:
                file.write(b"5")
            return True
        return False


def _high_water() -> int:
    with open("/proc/self/status", "rb", buffering=0) as file:
        line = file.read(4096).partition(b"VmHWM:")[2].partition(b"\n")[0]
    return int(line.split()[0]) * 1024


class CudaAllocator:
    """What torch's allocator has handed out on one GPU; the CUDA context and other processes are not in it."""

    kind = "CUDA allocator"
    since = "first step"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> int:
        """Return what is held."""
        return torch.cuda.memory_allocated(self._device)

    def restart(self) -> None:
        """Reset the peaks."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peaks(self) -> tuple[int, int]:
        """Return the most that was held and the most that was taken from the device since the last restart."""
        stats = torch.cuda.memory_stats(self._device)
        return stats.get("allocated_bytes.all.peak", 0), stats.get("reserved_bytes.all.peak", 0)

    def faults(self) -> tuple[int, int]:
        """Return how often memory had to be given back to find room, and none was found, since the process started."""
        stats = torch.cuda.memory_stats(self._device)
        return stats.get("num_alloc_retries", 0), stats.get("num_ooms", 0)


class Stopwatch:
    """Adds up the time between `start` and `stop`; on a GPU by events in its queue, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._total = 0.0
        self._started: float | torch.cuda.Event | None = None
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        """Begin a span; one that was begun and not stopped is forgotten."""
        self._started = _recorded() if self._cuda else time.perf_counter()

    def stop(self) -> None:
        """End the span; without a start nothing happens."""
        if isinstance(self._started, float):
            self._total += time.perf_counter() - self._started
        elif self._started is not None:
            self._pending.append((self._started, _recorded()))
            self._drain()
        self._started = None

    def seconds(self, *, wait: bool = False) -> float:
        """Return the sum of all spans that the device has finished, which may `wait` until it has finished all."""
        if wait and self._pending:
            self._pending[-1][1].synchronize()
        self._drain()
        return self._total

    def _drain(self) -> None:
        while self._pending and self._pending[0][1].query():  # type: ignore[no-untyped-call]
            first, last = self._pending.popleft()
            self._total += first.elapsed_time(last) / 1000


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event

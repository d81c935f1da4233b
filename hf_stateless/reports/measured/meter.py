"""Measures one training run from the events of its loop: memory by halves of a step, tokens, and where time goes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...optimizer.release import Release
from .footprint import LiveGradients, Storages, count_groups, stored_weight_bytes
from .probes import CudaAllocator, ResidentSet, Stopwatch
from .schema import Group


# What batches call their tokens and the mask of those that are no padding: of the Trainer, and of GRPO and its kin.
_TOKENS = {"input_ids": "attention_mask", "prompt_ids": "prompt_mask", "completion_ids": "completion_mask"}


@dataclass
class Reading:
    """Numbers of one rank, all integers, so that ranks can exchange them as one tensor."""

    peak: int = 0
    forward_backward: int = 0
    optimizer_step: int = 0
    settled: int = 0
    """Peak of forward and backward where the optimizer had its state already; 0 before the second step."""
    before_training: int = 0
    start: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    reserved: int = 0
    retries: int = 0
    ooms: int = 0
    tokens: int = 0
    longest_row: int = 0
    not_finite: int = 0
    """Updates of single parameters that were left out since their gradients were not finite."""
    held_steps: int = 0
    """Steps in which `min_signal` held matrices back."""


class RunMeter:
    """Follows a training loop through calls at its events.

    Peaks are read at the end of both halves of a step and reset at their start, so that evaluation and saving are in
    no number. Weights are counted at the start, gradients and state in the first steps and when a report is made.
    """

    def __init__(self, device: torch.device, name: str) -> None:
        self.device = device
        self.name = name  # of the optimizer, for groups that name no algorithm
        self.probe = CudaAllocator(device) if device.type == "cuda" else ResidentSet()
        self.steps = 0
        self.seconds = 0.0
        self.recent_peak = 0  # whoever logs it sets it back to 0
        self.groups: list[Group] = []
        self._updates = Stopwatch(device)
        self._reading = Reading()
        self._counted_until: float | None = None
        self._first_step = (0.0, 0, 0.0)
        self._tokens: int | Tensor = 0
        self._live: LiveGradients | None = None
        self._has_state = False

    def begin(self, model: nn.Module, optimizer: Any) -> None:
        """Take stock before the first step."""
        self.model, self.optimizer = model, optimizer
        self._rule = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
        self.counts_skips = hasattr(self._rule, "updates_not_finite")
        """Whether the optimizer tells which updates it left out."""
        self.trained = [p for p in model.parameters() if p.requires_grad]
        reading = self._reading
        reading.start = self.probe.now()
        reading.weights = stored_weight_bytes(model)
        self._count_state()
        self._has_state = reading.optimizer_state > 0
        reading.before_training = max(0, reading.start - reading.weights - reading.optimizer_state)
        self._faults = self.probe.faults()
        release = getattr(self._rule, "release", None)
        if isinstance(release, Release):
            release.remove()
            self._live = LiveGradients(self.trained)  # before the optimizer's own hooks, which free gradients
            release.install()

    def close(self) -> None:
        """Remove the hooks from the model."""
        if self._live:
            self._live.remove()

    def begin_step(self) -> None:
        """Begin to watch forward and backward."""
        self.probe.restart()
        if self._counted_until is None:
            self._counted_until = time.perf_counter()

    def before_update(self) -> None:
        """End forward and backward, begin the optimizer's step."""
        reading, peak = self._reading, self._read_peak()
        reading.forward_backward = max(reading.forward_backward, peak)
        if self._has_state:
            reading.settled = max(reading.settled, peak)
        if self.steps < 2:
            alive = self._live.peak if self._live else 0
            reading.gradients = max(reading.gradients, alive, Storages().add([p.grad for p in self.trained]))
        self.probe.restart()
        self._updates.start()

    def after_update(self) -> None:
        """End the optimizer's step."""
        self._updates.stop()
        self._reading.optimizer_step = max(self._reading.optimizer_step, self._read_peak())

    def end_step(self) -> None:
        """End a step; what follows up to the next one counts as time of training, unless `pause` is called."""
        now = time.perf_counter()
        self.seconds += 0.0 if self._counted_until is None else now - self._counted_until
        self._counted_until = now
        self.steps += 1
        if self.steps == 1:
            self._first_step = (self.seconds, int(self._tokens), self._updates.seconds(wait=True))
            self._count_state()
            self._has_state = True
        if self.steps == 2:
            self.close()

    def pause(self) -> None:
        """Leave out the time since the last step."""
        self._counted_until = None

    def see(self, batch: Any) -> None:
        """Count the tokens of a training batch, on its device: nothing waits for the number."""
        if not isinstance(batch, Mapping):
            return
        row = 0
        for name, mask_name in _TOKENS.items():
            ids, mask = batch.get(name), batch.get(mask_name)
            if isinstance(ids, Tensor):
                is_mask = isinstance(mask, Tensor) and mask.shape == ids.shape
                self._tokens = self._tokens + (mask.sum() if is_mask else ids.numel())  # type: ignore[union-attr]
                row += ids.shape[-1]
        self._reading.longest_row = max(self._reading.longest_row, row)

    def read(self) -> Reading:
        """Return this rank's numbers so far; counts the state again."""
        self._count_state()
        reading = self._reading
        reading.peak = max(reading.forward_backward, reading.optimizer_step)
        reading.retries, reading.ooms = (
            now - then for now, then in zip(self.probe.faults(), self._faults, strict=True)
        )
        reading.tokens = int(self._tokens)
        if self.counts_skips:
            reading.not_finite, reading.held_steps = self._rule.updates_not_finite, self._rule.held_steps
        return Reading(**asdict(reading))

    def rates(self, tokens: int) -> tuple[float, float | None, float | None]:
        """Return seconds of a step, the part of it that `step()` takes, and tokens of all ranks per second.

        The first step is left out where there are others.
        """
        seconds, first_tokens, updating = self._first_step if self.steps > 1 else (0.0, 0, 0.0)
        seconds = self.seconds - seconds
        share = (self._updates.seconds(wait=True) - updating) / seconds if seconds else 0.0
        own = int(self._tokens)
        per_second = tokens * (1 - first_tokens / own) / seconds if own and seconds else None
        updates_in_backward = self._live is not None
        return seconds / max(1, self.steps - 1), None if updates_in_backward else min(1.0, share), per_second

    def _count_state(self) -> None:
        self.groups = count_groups(self.optimizer, self.name)
        self._reading.optimizer_state = sum(group.state_bytes for group in self.groups)

    def _read_peak(self) -> int:
        peak, reserved = self.probe.peaks()
        self.recent_peak = max(self.recent_peak, peak)
        self._reading.reserved = max(self._reading.reserved, reserved)
        return peak


def highest(rows: Sequence[Reading]) -> Reading:
    """Return the numbers of the rank with the highest peak."""
    return max(rows, key=lambda reading: reading.peak)

"""Gradients that must move nothing, being not finite, zero under momentum or weak: left out, or marked on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..ranks.placement import check_gradients, gradient_flags, local_shard
from ..update.reads import both, reads_at_once
from .min_signal import guarded, log_held, mark_weak, measure_signal, new_history, strong
from .momentum import has_momentum
from .rule import Entry
from .rules import RULES
from .unread_flags import UnreadFlags


logger = logging.getLogger(__name__)
# So many gradients that are not finite are told one by one: those of a small model, or of a large one in part.
_EACH = 32


class Skips(Protocol):
    """What is needed of the optimizer."""

    param_groups: list[dict[str, Any]]
    unread: UnreadFlags

    def state_of(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter, made where there is none."""

    def warn_skipped(self, index: int) -> None:
        """Warn that the gradient of a parameter was not finite."""

    def count_held(self, held: Sequence[float]) -> None:
        """Take in whether `min_signal` held anything back, and the signal."""


class SkipCounts:
    """Counts the updates of an optimizer that were left out, in this process."""

    unread: UnreadFlags
    _held_steps: int = 0
    _not_finite: int = 0

    @property
    def held_steps(self) -> int:
        """Steps of this process in which `min_signal` held matrices back; on a GPU asking waits for the device."""
        self.hear(wait=True)
        return self._held_steps

    @property
    def updates_not_finite(self) -> int:
        """Updates of single parameters that NaN or infinite gradients prevented; on a GPU asking waits likewise."""
        self.hear(wait=True)
        return self._not_finite

    def hear(self, *, wait: bool = False) -> None:
        """Warn of gradients that were not finite, as far as the device has told."""
        for index in self.unread.read(wait=wait):
            self.warn_skipped(index)

    def count_held(self, held: Sequence[float]) -> None:
        """Take in whether `min_signal` held a step back, and its signal; a zero gradient is none to speak of."""
        if all(held):
            self._held_steps += 1
            log_held(self._held_steps, held[1])

    def name_of(self, index: int) -> str:
        """Return the name of a parameter, for messages."""
        raise NotImplementedError

    def warn_skipped(self, index: int) -> None:
        """Warn that the gradient of a parameter was not finite: of the first ones each, later as often as they double.

        A run that has diverged leaves out every update of every step, which would fill its log.
        """
        self._not_finite += 1
        count = self._not_finite
        if count > _EACH and count.bit_count() > 1:
            return
        logger.warning(
            "The gradient of %s has NaN or infinite entries: it is left unchanged in this step. "
            "Look at the loss and the learning rate if this goes on.%s",
            self.name_of(index),
            f" {count} updates were left out so far; the next line is at {2 * count}." if count >= _EACH else "",
        )


def without_bad_gradients(entries: list[Entry], host: Skips) -> list[Entry]:
    """Leave out gradients that must not reach a moment: not finite, on no rank, or under momentum of a matrix, zero.

    On an accelerator they stay, and are marked as not usable.
    """
    checked = [entry for entry in entries if RULES[entry.group["algorithm"]].has_moments(entry.group)]
    unread = [entry for entry in checked if not reads_at_once(local_shard(entry.param).device)]
    if unread:
        _mark_bad_gradients(unread, host)
        marked = {entry.index for entry in unread}
        checked = [entry for entry in checked if entry.index not in marked]
    out = set()
    told = check_gradients([entry.param for entry in checked], [entry.filled for entry in checked])
    for entry, (finite, nonzero, there) in zip(checked, told, strict=True):
        if not finite:
            host.warn_skipped(entry.index)
        if not finite or not there or (has_momentum(entry.group) and not nonzero):
            out.add(entry.index)
    return [entry for entry in entries if entry.index not in out]


def _mark_bad_gradients(entries: Sequence[Entry], host: Skips) -> None:
    finite, nonzero, there = gradient_flags([entry.param for entry in entries], [entry.filled for entry in entries])
    host.unread.watch([entry.index for entry in entries], finite)
    for entry, good, some in zip(entries, (finite & there).unbind(), (finite & nonzero).unbind(), strict=True):
        flag = some if has_momentum(entry.group) else good
        entry.usable = both(entry.usable, flag.to(local_shard(entry.param).device))


def without_weak_gradients(entries: list[Entry], host: Skips) -> list[Entry]:
    """Leave out what `min_signal` holds back; on an accelerator it stays, and is marked as not usable."""
    of_matrices = guarded(host.param_groups)
    grads = [p.grad for p, _ in of_matrices if p.grad is not None]
    if not grads:
        return entries
    first, group = of_matrices[0]
    history = host.state_of(first, group).setdefault("recent_norms", new_history(first))
    signal = measure_signal(grads, history)
    if isinstance(signal, Tensor):
        host.unread.later.tell(mark_weak(entries, signal), host.count_held)
        return entries
    kept = strong(entries, signal)
    host.count_held((len(kept) < len(entries), signal))
    return kept

"""Gradients that must move nothing, being not finite, zero under momentum or weak: left out, or marked on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..ranks.placement import check_gradients, gradient_flags, local_shard
from ..update.reads import both, reads_at_once
from .min_signal import guarded, mark_weak, measure_signal, new_history, strong
from .momentum import has_momentum
from .rule import Entry
from .rules import RULES
from .unread_flags import UnreadFlags


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


def without_bad_gradients(entries: list[Entry], host: Skips) -> list[Entry]:
    """Leave out gradients that must not reach a moment: not finite, or under momentum of a matrix, zero.

    On an accelerator they stay, and are marked as not usable.
    """
    checked = [entry for entry in entries if RULES[entry.group["algorithm"]].has_moments(entry.group)]
    unread = [entry for entry in checked if not reads_at_once(local_shard(entry.param).device)]
    if unread:
        _mark_bad_gradients(unread, host)
        marked = {entry.index for entry in unread}
        checked = [entry for entry in checked if entry.index not in marked]
    out = set()
    for entry, (finite, nonzero) in zip(checked, check_gradients([e.param for e in checked]), strict=True):
        if not finite:
            host.warn_skipped(entry.index)
        if not finite or (has_momentum(entry.group) and not nonzero):
            out.add(entry.index)
    return [entry for entry in entries if entry.index not in out]


def _mark_bad_gradients(entries: Sequence[Entry], host: Skips) -> None:
    finite, nonzero = gradient_flags([entry.param for entry in entries])
    host.unread.watch([entry.index for entry in entries], finite)
    for entry, good, some in zip(entries, finite.unbind(), (finite & nonzero).unbind(), strict=True):
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

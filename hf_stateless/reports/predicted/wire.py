"""What a GPU sends in one step under FSDP2: counted from shapes, by the rules of `hf_stateless.ranks`.

Bytes are what a ring sends: 2 (N-1)/N of an all-reduce, (N-1)/N of the result of an all-gather; of an all-to-all what
is for others. Flags and norms of a few bytes are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...norms.chain import Chain
from ...ranks.owners import assign_owners, whitening_cost
from ...ranks.ways import EXCHANGE_BYTES


Shape = tuple[int, int]


def fsdp_bytes(weights: int, trained: int, ranks: int) -> int:
    """Return what FSDP2 itself sends: weights are gathered in forward and in backward, gradients scattered.

    Args:
        weights: bytes of all parameters.
        trained: bytes of those that get a gradient.
        ranks: the number N of GPUs that share them.
    """
    return (2 * weights + trained) * (ranks - 1) // ranks


def sinkhorn_bytes(shapes: Mapping[Shape, int], ranks: int, iterations: int, itemsize: int = 4) -> float:
    """Return the bytes of SR-Sinkhorn: sums of columns and a flag of each matrix, once an iteration.

    Args:
        shapes: of the matrices that are cut between rows, with how many there are of each.
        ranks: the number of GPUs that share them.
        iterations: L.
        itemsize: bytes of a sum.
    """
    numbers = sum(count * (columns + 1) for (_, columns), count in shapes.items())
    return iterations * 2 * (ranks - 1) / ranks * itemsize * numbers


def exchanges(shapes: Mapping[Shape, int], ranks: int, itemsize: int = 2) -> Iterator[tuple[Shape, list[int] | None]]:
    """Yield the matrices that are whitened together: their shape, and the owner of each; None for one that all gather.

    Args:
        shapes: of the matrices that are cut between rows, with how many there are of each.
        ranks: the number of GPUs that share them.
        itemsize: bytes of an entry of a gradient.
    """
    load = [0] * ranks
    for shape, count in shapes.items():
        together = max(1, EXCHANGE_BYTES * ranks // (itemsize * shape[0] * shape[1]))
        for first in range(0, count, together):
            some = min(together, count - first)
            yield shape, assign_owners([whitening_cost(shape)] * some, load) if some > 1 else None


def exchange_temporary(groups: Sequence[Mapping[str, Any]], ranks: int) -> int:
    """Return what whitening needs where ranks send matrices to owners: parts and whole ones, updates in float32.

    Three times what is sent at once as gradients are stored, and three times in float32, of which gradients that were
    sent are gone by then: from the order of `hf_stateless.ranks.owners.Exchange`, not measured.

    Args:
        groups: of an optimizer of ours, with whole matrices.
        ranks: the number of GPUs that share them.
    """
    most = 0.0
    for group in groups:
        if group["algorithm"] != "multinorm" or not Chain.of(group).whitens:
            continue
        itemsize = group["params"][0].dtype.itemsize
        for shape, count in Counter(tuple(p.shape) for p in group["params"] if p.ndim == 2).items():
            one = itemsize * math.prod(shape)
            at_once = min(count * one, EXCHANGE_BYTES * ranks + one) / ranks
            most = max(most, at_once * (2 + 12 / itemsize) if count > 1 else 0.0)
    return int(most)


def exchanged_bytes(shapes: Mapping[Shape, int], ranks: int, itemsize: int = 2) -> list[float]:
    """Return what each GPU sends where matrices go to owners, and updates in float32 come back."""
    sent, by_all = [0.0] * ranks, 0.0
    for (rows, columns), owners in exchanges(shapes, ranks, itemsize):
        part = -(-rows // ranks) * columns
        if owners is None:
            by_all += itemsize * (ranks - 1) * part
            continue
        by_all += itemsize * len(owners) * part
        for rank, own in Counter(owners).items():
            sent[rank] += own * 4 * (rows * columns - part) - itemsize * own * part
    return [amount + by_all for amount in sent]

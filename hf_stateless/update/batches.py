"""Putting tensors together that can be worked on as one batch, without batches growing beyond what memory allows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar


_Item = TypeVar("_Item")
# Bytes of gradient that are stacked into one batch on an accelerator: bounds the temporaries of a step.
BATCH_BYTES = 64 << 20


def alike(items: Iterable[_Item], key: Callable[[_Item], Hashable]) -> list[list[_Item]]:
    """Group items by key, in the order of first appearance.

    Example:
        >>> from hf_stateless.update.batches import alike
        >>> alike(["a", "bb", "c"], len)
        [['a', 'c'], ['bb']]
    """
    groups: dict[Hashable, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def bounded(items: Sequence[_Item], size: Callable[[_Item], int], limit: int) -> Iterator[list[_Item]]:
    """Cut a list after each item with which a part reaches a size; a limit of 0 gives every item a part of its own.

    Example:
        >>> from hf_stateless.update.batches import bounded
        >>> list(bounded([2, 1, 3, 1], int, 3))
        [[2, 1], [3], [1]]
    """
    part: list[_Item] = []
    for item in items:
        part.append(item)
        if sum(map(size, part)) >= limit:
            yield part
            part = []
    if part:
        yield part

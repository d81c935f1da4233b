"""Putting tensors together that can be worked on as one batch, without batches growing beyond what memory allows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor


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


def of_one_shape(
    active: Iterable[tuple[int, Tensor]], unbounded: Callable[[list[Tensor]], bool] = lambda _: False
) -> Iterator[list[tuple[int, Tensor]]]:
    """Put matrices of one shape together on an accelerator, where a loop over small ones waits for kernel launches.

    Args:
        active: positions and parameters that have gradients.
        unbounded: tells whether parameters of one shape may all be one batch, because nothing is stacked.

    Example:
        >>> import torch
        >>> from hf_stateless.update.batches import of_one_shape
        >>> W = torch.ones(2, 2)
        >>> W.grad = torch.ones(2, 2)
        >>> [len(batch) for batch in of_one_shape([(0, W), (1, W)])]
        [1, 1]
    """
    for same in alike(active, lambda e: (e[1].shape, e[1].dtype, e[1].device, e[1].grad.dtype)):  # type: ignore[union-attr]
        if unbounded([p for _, p in same]):
            yield same
            continue
        limit = 0 if same[0][1].device.type == "cpu" else BATCH_BYTES
        yield from bounded(same, lambda entry: entry[1].nbytes, limit)

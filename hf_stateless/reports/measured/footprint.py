"""Bytes of a run's own tensors on this rank: each storage counts once, however many tensors share it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...ranks.placement import local_shard
from ...weights.int8.weight import Scale
from ...weights.stored import StoredWeight
from .schema import Group


def tensors_in(value: Any, depth: int = 5) -> Iterator[Tensor]:
    """Yield the plain tensors inside a value: in containers, objects, and subclasses that are made of other tensors.

    Of a DTensor it is the part that this rank holds.
    """
    if isinstance(value, DTensor):
        yield from tensors_in(value.to_local(), depth)
    elif isinstance(value, Tensor):
        yield from _inner_tensors(value, depth)
    elif isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(inner, depth)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        yield from tensors_in(vars(value), depth - 1)


def _inner_tensors(tensor: Tensor, depth: int) -> Iterator[Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from tensors_in(getattr(tensor, name), depth)
    elif isinstance(tensor, StoredWeight):
        yield from tensor.stored
    else:
        yield tensor
        if depth and type(tensor) not in (Tensor, nn.Parameter):  # quantised weights carry their scales
            yield from tensors_in(vars(tensor), depth - 1)


class Storages:
    """The memory behind tensors, each piece counted once."""

    def __init__(self) -> None:
        self._seen: set[tuple[torch.device, int]] = set()

    def add(self, value: Any) -> int:
        """Return the bytes of the storages in a value that were not seen before."""
        total = 0
        for tensor in tensors_in(value):
            storage = tensor.untyped_storage()
            key = (tensor.device, storage.data_ptr())
            if storage.nbytes() and key not in self._seen:
                self._seen.add(key)
                total += storage.nbytes()
        return total


def stored_weight_bytes(model: nn.Module) -> int:
    """Count the parameters and buffers of a model, tied weights once, quantised ones with their scales."""
    storages = Storages()
    total = sum(map(storages.add, (*model.parameters(), *model.buffers())))
    # A linear layer of bitsandbytes moves its codes and scales there in its first forward.
    return total + sum(storages.add(vars(module).get("state")) for module in model.modules())


def count_groups(optimizer: Any, name: str) -> list[Group]:
    """Count an optimizer's state for each pair of role and algorithm; what parameters share counts for the first."""
    storages = Storages()
    rows: dict[tuple[str, str], Group] = {}
    for group in optimizer.param_groups:
        key = (group.get("role", "all"), group.get("algorithm", name))
        row = rows.setdefault(key, Group(*key, tensors=0, parameters=0, state_bytes=0))
        for p in group["params"]:
            row.tensors += 1
            row.parameters += p.numel()
            row.state_bytes += storages.add(optimizer.state[p]) if p in optimizer.state else 0
    return list(rows.values())


def count_parameters(params: Iterable[Tensor]) -> dict[str, int]:
    """Return how many weights there are of each dtype, over all ranks; 4-bit ones as what they stand for.

    Scales of 8-bit weights belong to how these are stored, and are no weights.
    """
    counts: dict[str, int] = {}
    for p in params:
        if isinstance(p, Scale):
            continue
        packed = getattr(p, "quant_state", None)  # of bitsandbytes
        local = local_shard(p)
        stored = local.stored[0].dtype if isinstance(local, StoredWeight) else p.dtype
        dtype = str(stored).removeprefix("torch.") if packed is None else str(packed.quant_type)
        counts[dtype] = counts.get(dtype, 0) + (p.numel() if packed is None else packed.shape.numel())
    return counts


class LiveGradients:
    """The most bytes of gradients that are alive at once while backward frees some of them.

    Hooks see each gradient when it is complete, before the optimizer's own hook if they are installed first, and a
    finalizer sees it go.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.peak = 0
        self._alive: dict[tuple[torch.device, int], int] = {}
        trained = [p for p in params if p.requires_grad]
        self._handles = [p.register_post_accumulate_grad_hook(self._see) for p in trained]  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Remove the hooks; the peak stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _see(self, p: Tensor) -> None:
        for tensor in tensors_in(p.grad):
            storage = tensor.untyped_storage()
            key = (tensor.device, storage.data_ptr())
            if key not in self._alive:
                self._alive[key] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, key, None).atexit = False
        self.peak = max(self.peak, sum(self._alive.values()))

"""What forward and backward hold, found by running the model's own code where tensors have shapes and no contents.

On the meta device a step of a 7B model takes about a second and no memory, so the whole model is run rather than one
layer of it, and nothing is assumed about how its layers repeat.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from .fused import fused_kernels


@dataclass(frozen=True)
class Peak:
    """The most bytes that were alive, of the storages that were made while somebody counted."""

    total: int = 0
    """Everything together."""
    gradients_then: int = 0
    """The finished gradients at that moment."""
    activations: int = 0
    """Everything but finished gradients, at its own maximum."""
    gradients: int = 0
    """The finished gradients, at their own maximum."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that were made inside it and are still alive: each once, views not at all.

    Works on tensors with and without contents; a number that is read from one without contents is 1.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = Peak()
        self._gradients = 0
        self._alive: dict[int, int] = {}
        self._made_before: set[int] = set()
        self._finished: set[int] = set()

    def restart(self) -> None:
        """Forget the peak so far; what is alive stays counted."""
        self.peak = Peak()
        self._record()

    def finish_gradient(self, grad: Tensor) -> int:
        """Count a tensor as a finished gradient from now on; return the bytes that this adds to the finished ones."""
        key = grad.untyped_storage()._cdata
        if key not in self._alive or key in self._finished:
            return 0
        self._finished.add(key)
        self._gradients += self._alive[key]
        self._record()
        return self._alive[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count the storages of its results."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            number = args[0]
            if number.device.type == "meta" or isinstance(number, FakeTensor):
                return number.dtype == torch.bool or 1
        args, kwargs = _without_contents(func, args, kwargs)
        self._see((args, kwargs), made_here=False)
        out = func(*args, **kwargs)
        self._see(out, made_here=True)
        self._record()
        return out

    def _see(self, tensors: Any, made_here: bool) -> None:
        for tensor in tree_iter(tensors):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._alive:
                    self._alive[key] = 0
                    weakref.finalize(storage, self._forget, key).atexit = False
                    if not made_here:
                        self._made_before.add(key)
                if key not in self._made_before:  # a storage may have been emptied, or filled again
                    self.now += storage.nbytes() - self._alive[key]
                    self._alive[key] = storage.nbytes()

    def _forget(self, key: int) -> None:
        size = self._alive.pop(key)
        self._made_before.discard(key)
        self.now -= size
        if key in self._finished:
            self._finished.remove(key)
            self._gradients -= size

    def _record(self) -> None:
        old, now, gradients = self.peak, self.now, self._gradients
        if now > old.total or now - gradients > old.activations or gradients > old.gradients:
            self.peak = Peak(
                total=max(old.total, now),
                gradients_then=gradients if now > old.total else old.gradients_then,
                activations=max(old.activations, now - gradients),
                gradients=max(old.gradients, gradients),
            )


def _without_contents(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Make an operation on the meta device possible that also reads numbers, or picks by a mask.

    Sizes of images are numbers, from which a model computes where to look. A mask without contents picks all.
    """
    tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    if not any(t.device.type == "meta" for t in tensors):
        return args, kwargs
    if func is torch.ops.aten.index.Tensor:
        args = (args[0], [part for index in args[1] for part in _positions(index)], *args[2:])
    if any(t.device.type == "cpu" and not isinstance(t, FakeTensor) for t in tensors):
        args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    return args, kwargs


def _positions(index: Tensor | None) -> Sequence[Tensor | None]:
    if index is None or index.dtype != torch.bool:
        return [index]
    if index.device.type == "meta":
        return [torch.empty(index.numel(), dtype=torch.long, device="meta") for _ in range(index.dim())]
    return index.nonzero(as_tuple=True)


@dataclass(frozen=True)
class _Finished:
    """What was held until a gradient was complete, where no gradient is ever freed."""

    parameter: int
    """Identity of its parameter."""
    storage: int
    """Identity of the storage; gradients that are views of one share it."""
    size: int
    """Bytes of the storage, 0 where a gradient that shares it was complete before."""
    most: int
    """The most bytes that were alive since the gradient before."""
    now: int
    """Bytes that are alive with it."""


@dataclass(frozen=True)
class Timeline:
    """Forward and backward of a model: from one run of it follows what any release of gradients holds."""

    gradients: Sequence[_Finished]
    afterwards: int
    """The most bytes that were alive after the last gradient."""

    def peak(self, outcomes: Mapping[int, tuple[int, int]]) -> Peak:
        """Return what forward and backward hold on top of weights and inputs.

        Args:
            outcomes: what becomes of the gradient of a parameter, by its identity, once it is complete: the bytes that
                are kept in its place, and the bytes that are needed for a moment. A gradient without an outcome stays.
        """
        sizes: dict[int, int] = {}
        holders: dict[int, int] = {}
        for entry in self.gradients:
            sizes[entry.storage] = sizes.get(entry.storage, 0) + entry.size
            holders[entry.storage] = holders.get(entry.storage, 0) + 1
        fullest, shift, finished = _Fullest(), 0, 0
        for entry in self.gradients:
            fullest.see(entry.most + shift, finished)
            finished += entry.size
            fullest.see(entry.now + shift, finished)
            if entry.parameter not in outcomes:
                continue
            stays, moment = outcomes[entry.parameter]
            fullest.see(entry.now + shift + stays + moment, finished)
            finished += stays
            fullest.see(entry.now + shift + stays + moment, finished)
            holders[entry.storage] -= 1
            freed = 0 if holders[entry.storage] else sizes[entry.storage]
            shift += stays - freed
            finished -= freed
        fullest.see(self.afterwards + shift, finished)
        return fullest.peak()


class _Fullest:
    """Finds the fullest of moments, seen in their order."""

    def __init__(self) -> None:
        self._total = self._then = self._activations = self._gradients = 0

    def see(self, total: int, gradients: int) -> None:
        if total > self._total:
            self._total, self._then = total, gradients
        self._activations = max(self._activations, total - gradients)
        self._gradients = max(self._gradients, gradients)

    def peak(self) -> Peak:
        return Peak(self._total, self._then, self._activations, self._gradients)


def trace_training(model: nn.Module, loss: Callable[[nn.Module], Tensor], device: str) -> Timeline:
    """Run forward and backward of a model on the meta device, and return what they hold until which gradient."""
    live = LiveBytes()
    found: list[_Finished] = []

    def finish(p: Tensor) -> None:
        storage, most = p.grad.untyped_storage()._cdata, live.peak.total  # type: ignore[union-attr]
        found.append(_Finished(id(p), storage, live.finish_gradient(p.grad), most, live.now))  # type: ignore[arg-type]
        live.restart()

    with contextlib.ExitStack() as cleanup:
        cleanup.callback(model.zero_grad)
        for p in model.parameters():
            if p.requires_grad:
                handle = p.register_post_accumulate_grad_hook(finish)  # type: ignore[no-untyped-call]
                cleanup.callback(handle.remove)
        with torch.device("meta"), fused_kernels(device), live:
            loss(model).backward()  # type: ignore[no-untyped-call]
    return Timeline(found, live.peak.total)

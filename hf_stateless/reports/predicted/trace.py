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
        self._finished: set[int] = set()

    def restart(self) -> None:
        """Forget the peak so far; what is alive stays counted."""
        self.peak = Peak()
        self._record()

    def finish_gradient(self, grad: Tensor) -> None:
        """Count a tensor as a finished gradient from now on."""
        key = grad.untyped_storage()._cdata
        if key in self._alive and key not in self._finished:
            self._finished.add(key)
            self._gradients += self._alive[key]
            self._record()

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
                    self._alive[key] = storage.nbytes() if made_here else 0
                    self.now += self._alive[key]
                    weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        size = self._alive.pop(key)
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


def trace_training(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    outcomes: Mapping[int, tuple[int, int]],
    device: str,
) -> Peak:
    """Predict what forward and backward of a model on the meta device hold on top of weights and inputs.

    `outcomes` tells what becomes of the gradient of a parameter, by its identity, once it is complete: the bytes that
    are kept in its place, and the bytes that are needed for a moment. A gradient without an outcome stays.
    """
    live, kept = LiveBytes(), []

    def finish(p: Tensor) -> None:
        live.finish_gradient(p.grad)  # type: ignore[arg-type]
        if (outcome := outcomes.get(id(p))) is not None:
            stays, moment = (torch.empty(size, dtype=torch.uint8, device="meta") for size in outcome)
            live.finish_gradient(stays)
            kept.append(stays)
            p.grad = None
            del moment

    with contextlib.ExitStack() as cleanup:
        cleanup.callback(model.zero_grad)
        for p in model.parameters():
            if p.requires_grad:
                handle = p.register_post_accumulate_grad_hook(finish)  # type: ignore[no-untyped-call]
                cleanup.callback(handle.remove)
        with torch.device("meta"), fused_kernels(device), live:
            loss(model).backward()  # type: ignore[no-untyped-call]
    return live.peak

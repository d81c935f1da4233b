"""Clipping beside updates in backward: the norm counts gradients that are freed already."""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer

from ..optimizer.live import released_norm
from ..ranks.placement import is_sharded, mesh_of
from ..update.batches import alike
from ..weights.cuts import whole_tensor
from .patches import replaced


logger = logging.getLogger(__name__)

_WITHIN = threading.local()
"""Has `accelerate` while accelerate clips, which is counted already."""
_SAID: set[str] = set()
_BY_VALUE = (
    "clip_grad_value_ sees only the gradients that layer-wise updates have left, none of those that they have freed: "
    "clip by norm, or take the optimizer without _layerwise."
)
_RETURNED = (
    "clip_grad_norm_ clips by the norm of all gradients, but returns that of those that were left after backward: use "
    "accelerator.clip_grad_norm_ to log it, or optimizer.released_norm() for the rest."
)


def count_released_gradients() -> None:
    """Make clipping see gradients that layer-wise updates have freed; repeated calls do nothing.

    The Trainer clips, and logs as `grad_norm`, by `Accelerator.clip_grad_norm_`, or by a method of its own where
    gradients are on several meshes; Lightning and loops of one's own do
    by `torch.nn.utils.clip_grad_norm_`, which scripts import before us, so what it calls is replaced. Both look at
    `.grad` alone: they would clip the rest too little and report a part for the whole. Delete when torch lets an
    optimizer take part in clipping.
    """
    Accelerator.clip_grad_norm_ = replaced(Accelerator.clip_grad_norm_, _of_accelerate)  # type: ignore[method-assign]
    if clips_mixed_meshes():
        Trainer._mixed_mesh_grad_norm = replaced(Trainer._mixed_mesh_grad_norm, _of_mixed_meshes)
    module: Any = sys.modules["torch.nn.utils.clip_grad"]
    module._clip_grads_with_norm_ = replaced(module._clip_grads_with_norm_, _of_torch)
    module.clip_grad_value_ = torch.nn.utils.clip_grad_value_ = replaced(module.clip_grad_value_, _by_value)


def clips_mixed_meshes() -> bool:
    """Tell whether the Trainer clips gradients of several meshes, as tensor parallelism leaves them."""
    return hasattr(Trainer, "_mixed_mesh_grad_norm")


def _of_mixed_meshes(original: Callable[..., Tensor], trainer: Any, model: torch.nn.Module, max_norm: float) -> Tensor:
    parameters = list(model.parameters())
    released = released_norm(parameters)
    if released is None:
        return original(trainer, model, max_norm)
    total = _both(original(trainer, model, math.inf), released)
    for of_mesh in alike((p for p in parameters if p.grad is not None), lambda p: mesh_of(p.grad)):
        torch.nn.utils.clip_grads_with_norm_(of_mesh, max_norm, total)
    return total


def _of_accelerate(
    original: Callable[..., Any], accelerator: Any, parameters: Any, max_norm: float, norm_type: float = 2
) -> Any:
    parameters = _listed(parameters)
    released = released_norm(parameters)
    if released is None:
        return original(accelerator, parameters, max_norm, norm_type)
    if float(norm_type) != 2:
        raise ValueError(_other_norm(norm_type))
    _WITHIN.accelerate = True
    try:
        rest = whole_tensor(original(accelerator, parameters, math.inf, norm_type))
    finally:
        _WITHIN.accelerate = False
    total = _both(rest, released)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total


def _of_torch(
    original: Callable[..., None], parameters: Any, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    parameters = _listed(parameters)
    released = None if getattr(_WITHIN, "accelerate", False) else released_norm(parameters)
    if released is not None:
        grads = [p.grad for p in parameters if p.grad is not None]
        rest = whole_tensor(torch.nn.utils.get_total_norm(grads, foreach=foreach))
        if not torch.allclose(whole_tensor(total_norm), rest, rtol=0, atol=0, equal_nan=True):
            raise ValueError(_other_norm("another than 2"))
        whole = _both(rest, released)
        if is_sharded(total_norm):
            _say(_RETURNED)
        else:
            total_norm.copy_(whole)  # it is what clip_grad_norm_ returns
        total_norm = whole
    original(parameters, max_norm, total_norm, foreach)


def _by_value(original: Callable[..., None], parameters: Any, *args: Any, **kwargs: Any) -> None:
    parameters = _listed(parameters)
    if released_norm(parameters) is not None:
        _say(_BY_VALUE)
    original(parameters, *args, **kwargs)


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _both(rest: Tensor, released: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack([rest.to(released), released]))
    return norm


def _say(line: str) -> None:
    if line not in _SAID:
        _SAID.add(line)
        logger.warning(line)


def _other_norm(norm_type: object) -> str:
    return (
        f"norm_type={norm_type}: of gradients that layer-wise updates have freed only the 2-norm is known; "
        "leave norm_type out, or take the optimizer without _layerwise."
    )

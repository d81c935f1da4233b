"""Which optimizers have hooks on which parameters, and how those end: one optimizer trains a parameter at a time."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


if TYPE_CHECKING:
    from .release import Release

logger = logging.getLogger(__name__)

_LIVE: weakref.WeakSet[Release] = weakref.WeakSet()


def enter(updates: Release) -> None:
    """Make the hooks of an optimizer known, so that others can find out that they share its parameters.

    Args:
        updates: what drives the optimizer; forgotten with it.
    """
    _watch_steps()
    _LIVE.add(updates)


def _on(parameters: Iterable[Tensor]) -> list[Release]:
    """Return what updates some of these parameters in backward."""
    live = list(_LIVE)
    ids = {id(p) for p in parameters} if live else set()
    return [updates for updates in live if ids & updates.hooked]


def released_norm(parameters: Iterable[Tensor]) -> Tensor | None:
    """Return the norm of the gradients of these parameters that backward has freed, or None if there are none.

    Args:
        parameters: those of a model, as for `torch.nn.utils.clip_grad_norm_`.
    """
    norms = [updates.released_norm() for updates in _on(parameters)]
    released = [norm for norm in norms if norm is not None]
    return torch.linalg.vector_norm(torch.stack(released)) if released else None


def unhook(parameters: Iterable[Tensor]) -> None:
    """Take the hooks of every optimizer off these parameters: whichever optimizer trains them now has them alone.

    Args:
        parameters: those of the optimizer that takes over.
    """
    for updates in _on(parameters):
        updates.remove()


def begin_training(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """Wake the hooks that this optimizer has on these parameters, and put those of others to sleep.

    Args:
        parameters: those of a model whose training begins.
        optimizer: what trains it, maybe in a wrapper; None if it is still to be made.
    """
    for updates in _on(parameters):
        updates.asleep = optimizer is None or not _steps_for(optimizer, updates.optimizer)


def end_training(parameters: Iterable[Tensor]) -> None:
    """Put the hooks on these parameters to sleep until `train()`, and forget a step that was not completed.

    Args:
        parameters: those of a model whose training has ended or failed.
    """
    for updates in _on(parameters):
        updates.asleep = True
        updates.forget()


@functools.cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Take the hooks of others off what an optimizer steps: they would eat all its gradients."""
    if torch.compiler.is_compiling() or not any(updates.awake for updates in _LIVE):
        return
    for updates in _on(p for group in stepping.param_groups for p in group["params"]):
        if updates.awake and not _steps_for(stepping, updates.optimizer):
            logger.warning(
                "%s steps parameters that the hooks of another, layer-wise optimizer still updated in this backward "
                "pass. They are taken off now; type old_optimizer.eval() before the first backward for another one.",
                type(stepping).__name__,
            )
            updates.remove()
            if own := getattr(stepping, "release", None):
                own.install()


def _steps_for(stepping: torch.optim.Optimizer, optimizer: Any) -> bool:
    """Tell whether a step is that of this optimizer: its own, or of a wrapper, which shares its groups or holds it."""
    groups = {id(group) for group in optimizer.param_groups}
    if stepping is optimizer or any(id(group) in groups for group in stepping.param_groups):
        return True
    return any(value is optimizer for value in vars(stepping).values())

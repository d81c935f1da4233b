"""Who updates a matrix: a kernel, or torch. The only place that decides, and that reads `HF_STATELESS_KERNELS`."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from ...norms.chain import Chain
from ...norms.scale import UPDATE_SCALES
from ...weights.stored import StoredWeight
from ..layout import Layout
from ..reads import reads_at_once
from . import cpu_sinkgd, int8, plain, sinkgd
from .on_hub import HUB, chosen_on_hub


logger = logging.getLogger(__name__)

VARIABLE = "HF_STATELESS_KERNELS"
_CHOICES = ("", "torch", "triton")
Verdict: TypeAlias = bool | Tensor | None
"""Whether a gradient was finite: known, on the device and unread, or None where a kernel left a weight to torch."""
Kernel: TypeAlias = Callable[..., Sequence[Verdict]]
"""Takes weights, gradients, rounding keys, `step_size`, `decay`, `layout` and `num_iterations`."""


def choose(weights: Sequence[Tensor], grads: Sequence[Tensor], chain: Chain, layout: Layout) -> Kernel | None:
    """Return the kernel that updates weights of one shape by their gradients, or None where torch does.

    `HF_STATELESS_KERNELS=hub:OWNER/NAME` or `hub:FOLDER` asks the kernels there first, for plain weights; what they do
    not take, and all where they cannot be loaded, is for those here, see `choose_here`.

    Args:
        weights: plain tensors or stored weights, of one shape.
        grads: their gradients.
        chain: the norms.
        layout: how the weights are stored.

    Raises:
        ValueError: the variable has another value, or asks for Triton where it cannot run.
    """
    place = os.environ.get(VARIABLE, "")
    if place.startswith(HUB) and not any(isinstance(weight, StoredWeight) for weight in weights):
        found: Kernel | None = chosen_on_hub(place.removeprefix(HUB), weights, grads, chain, layout)
        if found is not None:
            return found
    return choose_here(weights, grads, chain, layout)


def choose_here(weights: Sequence[Tensor], grads: Sequence[Tensor], chain: Chain, layout: Layout) -> Kernel | None:
    """Return the kernel of this package that updates weights of one shape, or None where torch does.

    Triton takes SinkGD on CUDA. On CPU compiled C takes it for large plain matrices, if torch does not have many
    threads for few of them. Neither measures an operator norm. `HF_STATELESS_KERNELS=torch` leaves all to torch,
    `triton` insists on Triton.

    Args:
        weights: plain tensors or stored weights, of one shape.
        grads: their gradients.
        chain: the norms.
        layout: how the weights are stored.

    Raises:
        ValueError: the variable has another value, or asks for Triton where it cannot run.
    """
    if not chain.is_sinkhorn or chain.scale != UPDATE_SCALES[0]:
        return None
    if use_triton((weights[0], grads[0])):
        return sinkgd.sinkgd_update_ if sinkgd.fits(weights, grads, layout, chain.num_iterations) else None
    if _forced() or not reads_at_once(grads[0].device):
        return None
    if not cpu_sinkgd.fits(weights, grads, layout, chain.num_iterations):
        return None
    return cpu_sinkgd.sinkgd_steps_


def int8_kernel(weight: StoredWeight, update: Tensor, row: Tensor | None = None) -> Callable[..., None] | None:
    """Return the kernel that writes an update into a stored weight, or None where the weight does it itself.

    Args:
        weight: a weight in a format of its own.
        update: X, or G where X = diag(r) G diag(c).
        row: r.
    """
    fits = weight.kernel == "int8" and int8.fits_int8(weight, update)
    if not fits or (row is not None and row.dtype != torch.float32) or not use_triton((weight, update)):
        return None
    return int8.int8_update_


def plain_kernel(weights: Sequence[Tensor], updates: Tensor, layout: Layout) -> Callable[..., None] | None:
    """Return the kernel that writes updates into plain weights of one shape, or None where torch writes each.

    Args:
        weights: of one shape.
        updates: X of each, stacked.
        layout: how the weights are stored.
    """
    if not use_triton((weights[0], updates)) or not plain.fits_plain(weights, updates, layout):
        return None
    return plain.plain_update_


def use_triton(tensors: Iterable[Tensor]) -> bool:
    """Tell whether Triton kernels work on these tensors; a run on CUDA without them says so once.

    The environment variable `HF_STATELESS_KERNELS` forces a side: `torch` the twin, `triton` the kernels. On CPU
    tensors they run in Triton's interpreter (`TRITON_INTERPRET=1`), which is for tests.

    Args:
        tensors: all that a kernel would read and write.

    Raises:
        ValueError: the variable has another value, or asks for Triton where it cannot run.
    """
    choice = _forced()
    if choice not in _CHOICES:
        raise ValueError(
            f"{VARIABLE}={choice!r}: expected 'torch', 'triton', 'hub:OWNER/NAME' or nothing; type unset {VARIABLE}."
        )
    kinds = {tensor.device.type for tensor in tensors}
    if choice == "torch" or (not choice and kinds != {"cuda"}):
        return False
    problem = _problem(next(iter(kinds)) if len(kinds) == 1 else "several kinds of devices", bool(choice))
    if problem and choice:
        raise ValueError(f"{VARIABLE}=triton, but {problem}: type unset {VARIABLE} to use torch.")
    if problem:
        _say_once(problem)
    return not problem


def _forced() -> str:
    """Return the side that the variable forces; kernels of the Hub force none."""
    choice = os.environ.get(VARIABLE, "")
    return "" if choice.startswith(HUB) else choice


def _problem(device: str, asked: bool) -> str:
    """Say why Triton cannot run on tensors of a device, or shall not unless it is asked for; else return nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device == "cuda":
        return "TRITON_INTERPRET=1 keeps Triton off the GPU" if interpreted else _unfit(asked)
    return "" if device == "cpu" and interpreted else f"tensors on {device} need TRITON_INTERPRET=1 and the CPU"


@cache
def _unfit(asked: bool) -> str:
    if torch.version.hip is not None:  # tensors of AMD's GPUs are on "cuda" too
        return "" if asked else f"the Triton kernels were never run on ROCm ({VARIABLE}=triton takes them)"
    if torch.cuda.get_device_capability() < (8, 0):
        return "Triton needs a GPU of compute capability 8.0 or newer for bfloat16"
    return ""


@cache
def _say_once(problem: str) -> None:
    logger.warning("%s: SinkGD and 8-bit updates run in torch, which is slower on a GPU.", problem)

"""Whether Triton or the torch twin does the work: the only place where this is decided."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable
from functools import cache

from torch import Tensor


logger = logging.getLogger(__name__)

VARIABLE = "HF_STATELESS_KERNELS"
_CHOICES = ("", "torch", "triton")


def use_triton(tensors: Iterable[Tensor]) -> bool:
    """Tell whether Triton kernels work on these tensors; a run on CUDA without them says so once.

    The environment variable `HF_STATELESS_KERNELS` forces a side: `torch` the twin, `triton` the kernels. On CPU
    tensors they run in Triton's interpreter (`TRITON_INTERPRET=1`), which is for tests.

    Args:
        tensors: all that a kernel would read and write.

    Raises:
        ValueError: the variable has another value, or asks for Triton where it cannot run.

    Example:
        >>> import torch
        >>> from hf_stateless.update.kernels.choice import use_triton
        >>> use_triton([torch.ones(2)])
        False
    """
    choice = os.environ.get(VARIABLE, "")
    if choice not in _CHOICES:
        raise ValueError(f"{VARIABLE}={choice!r}: expected 'torch', 'triton' or nothing; type unset {VARIABLE}.")
    kinds = {tensor.device.type for tensor in tensors}
    if choice == "torch" or (not choice and kinds != {"cuda"}):
        return False
    problem = _problem(next(iter(kinds)) if len(kinds) == 1 else "several kinds of devices")
    if problem and choice:
        raise ValueError(f"{VARIABLE}=triton, but {problem}: type unset {VARIABLE} to use torch.")
    if problem:
        _say_once(problem)
    return not problem


def _problem(device: str) -> str:
    """Say why Triton cannot run on tensors of a device, or return an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device == "cuda":
        return "TRITON_INTERPRET=1 keeps Triton off the GPU" if interpreted else _too_old()
    return "" if device == "cpu" and interpreted else f"tensors on {device} need TRITON_INTERPRET=1 and the CPU"


@cache
def _too_old() -> str:
    import torch

    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "Triton needs a GPU of compute capability 8.0 or newer for bfloat16"
    return ""


@cache
def _say_once(problem: str) -> None:
    logger.warning("%s: SinkGD and 8-bit updates run in torch, which is slower on a GPU.", problem)

"""What the update of our optimizers needs on top, found by running it on tensors without memory."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...optimizer.optimizer import StatelessOptimizer
from ...update.batches import BATCH_BYTES
from ...weights.stored import stand_in
from .trace import LiveBytes


def step_temporary(groups: Sequence[Mapping[str, Any]], device: str = "cuda") -> int:
    """Predict the bytes that the step of a `StatelessOptimizer` needs on top, by running it on tensors without memory.

    Args:
        groups: its parameter groups, with parameters on any device.
        device: `cuda` or `cpu`, where it would run.

    Example:
        >>> import torch
        >>> from hf_stateless.reports.predicted.step import step_temporary
        >>> groups = [{"params": [torch.empty(100, 100, device="meta")], "algorithm": "multinorm"}]
        >>> step_temporary(groups, "cpu") >= 100 * 100 * 4
        True
    """
    if not groups:
        return 0
    with FakeTensorMode(), LiveBytes() as live:
        optimizer = StatelessOptimizer([{**g, "params": _fakes(g["params"], _place(g, device))} for g in groups])
        optimizer.step()  # makes the state
        before = live.now
        live.restart()
        optimizer.step()
        return int(live.peak.total - before)


def _place(group: Mapping[str, Any], device: str) -> str:
    """Return where a group is run: the meta device stands for a GPU, but CPUs have the fused AdamW of GPUs."""
    return "cpu" if device == "cpu" or group["algorithm"].startswith("adamw") else "meta"


def _fakes(params: Sequence[Tensor], device: str) -> list[nn.Parameter]:
    """Return stand-ins with gradients for parameters: of each shape no more than are updated at once."""
    counts: dict[Hashable, int] = {}
    fakes = []
    for p in params:
        key = (p.shape, p.dtype)
        counts[key] = counts.get(key, 0) + 1
        if counts[key] == 1 or (device != "cpu" and (counts[key] - 1) * p.numel() * p.element_size() < BATCH_BYTES):
            fakes.append(stand_in(p, device))
            fakes[-1].grad = torch.empty_like(fakes[-1])
    return fakes


def update_temporaries(groups: Sequence[Mapping[str, Any]], device: str = "cuda") -> dict[int, int]:
    """Predict for each parameter, by its identity, the bytes that its own update in backward needs.

    Example:
        >>> import torch
        >>> from hf_stateless.reports.predicted.step import update_temporaries
        >>> W = torch.empty(100, 100, device="meta")
        >>> list(update_temporaries([{"params": [W], "algorithm": "multinorm"}], "cpu")) == [id(W)]
        True
    """
    known: dict[Hashable, int] = {}
    found = {}
    for number, group in enumerate(groups):
        for p in group["params"]:
            key = (number, p.shape, p.dtype)
            if key not in known:
                known[key] = step_temporary([{**group, "params": [p]}], device)
            found[id(p)] = known[key]
    return found

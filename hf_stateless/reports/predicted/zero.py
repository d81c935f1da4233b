"""What changes under DeepSpeed's ZeRO: flat parts of masters, moments and gradients, and what GPUs send.

Stage 1 cuts the float32 masters and the moments over N GPUs, 2 the gradients too, 3 also the weights. Buckets, whose
size a DeepSpeed config names, come on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch import nn

from ...optimizer.partitioned import refuse_rules
from ...ranks.flat import FlatCut
from .state import is_ours, optimizer_groups
from .table import Settings


# Whose state is made of the masters, entry by entry.
_ADAMW = ("adamw_torch", "adamw_torch_fused")


def check_zero(names: Sequence[str], settings: Settings) -> None:
    """Refuse what is not known under ZeRO.

    Raises:
        ValueError: with what to type.

    Example:
        >>> from hf_stateless.reports.predicted import Settings
        >>> from hf_stateless.reports.predicted.zero import check_zero
        >>> check_zero(["sinkgd"], Settings(zero=3, ranks=8))
        Traceback (most recent call last):
            ...
        ValueError: --zero 3: sinkgd needs whole matrices, which no GPU holds there: type --zero 2, or --fsdp 8.
    """
    if not settings.zero:
        if settings.ranks > 1:
            raise ValueError(f"--ranks {settings.ranks}: expected --zero beside it; with FSDP2 type --fsdp N alone.")
        return
    flag = f"--zero {settings.zero}"
    if settings.ranks < 2:
        raise ValueError(f"{flag}: expected the number of GPUs beside it, such as --ranks 8.")
    if settings.fsdp > 1 or settings.dtype == "int8":
        beside = f"--fsdp {settings.fsdp}" if settings.fsdp > 1 else "--dtype int8"
        raise ValueError(f"{flag}: got {beside} beside it, expected one of the two.")
    for name in names:
        if is_ours(name) and settings.zero == 3:
            whole = f"{name} needs whole matrices, which no GPU holds there"
            raise ValueError(f"{flag}: {whole}: type --zero 2, or --fsdp {settings.ranks}.")
        if name.endswith("_layerwise"):
            raise ValueError(f"{flag}: DeepSpeed keeps gradients until the step: leave out --layerwise.")
        if not is_ours(name) and name not in _ADAMW:
            raise ValueError(f"{flag}: expected {', '.join(_ADAMW)} or an optimizer of ours, got {name}.")


def known_under_zero(names: Sequence[str], settings: Settings) -> list[str]:
    """Return those of some optimizers that run at this stage."""
    return [name for name in names if name in _ADAMW or (settings.zero < 3 and is_ours(name))]


def zero_state(model: nn.Module, name: str, optim_args: Mapping[str, Any], ranks: int) -> int:
    """Return the bytes of float32 masters and of what an optimizer keeps, of the GPU that holds most."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    if is_ours(name):
        groups = optimizer_groups(model, name, optim_args)
        refuse_rules(groups)
        moments = sum(_part(g["params"], ranks) for g in groups if g["algorithm"] != "multinorm")
    else:
        moments = -(-sum(trained) // ranks)
    return 4 * -(-sum(trained) // ranks) + 2 * 4 * moments


def zero_bytes(weights: int, trained: int, stage: int, ranks: int) -> int:
    """Return what ZeRO itself sends: gradients to those who update, weights back; at stage 3 weights twice.

    Args:
        weights: bytes of all parameters.
        trained: bytes of those that get a gradient.
        stage: 1, 2 or 3.
        ranks: the number N of GPUs.
    """
    return (trained + (2 * weights if stage == 3 else trained)) * (ranks - 1) // ranks


def zero_optimizer_bytes(model: nn.Module, name: str, optim_args: Mapping[str, Any], ranks: int) -> int:
    """Return what an optimizer sends, the GPU that sends most: pieces of the matrices across a border, in float32."""
    if not is_ours(name):
        return 0
    sent = [0] * ranks
    for group in optimizer_groups(model, name, optim_args):
        if group["algorithm"] != "multinorm":
            continue
        edges = [0, *accumulate(p.numel() for p in group["params"])]
        spans = tuple(pairwise(edges))
        for rank in range(ranks):
            cut = FlatCut(rank, ranks, _part(group["params"], ranks), spans)
            for i in cut.mine():
                first, last = cut.held(i)
                sent[rank] += 4 * (last - first) * (len(cut.holders(i)) - 1)
    return max(sent)


def zero_temporary(model: nn.Module, temporary: int, ranks: int) -> int:
    """Return what a step needs on top: gradients of a part in float32, and what the optimizer needs, in float32 too.

    Args:
        model: that is trained.
        temporary: what the optimizer needs for weights in the model's dtype.
        ranks: the number of GPUs.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    itemsize = max((p.dtype.itemsize for p in trained), default=4)
    return 4 * -(-sum(p.numel() for p in trained) // ranks) + temporary * 4 // itemsize


def _part(params: Sequence[nn.Parameter], ranks: int) -> int:
    """Return the entries of a part: DeepSpeed pads each group to an even number on each GPU."""
    return 2 * math.ceil(sum(p.numel() for p in params) / (2 * ranks))

"""What changes under DeepSpeed's ZeRO: flat parts of masters, moments and gradients, and what GPUs send.

Stage 1 cuts the float32 masters and the moments over N GPUs, 2 the gradients too, 3 also the weights. Buckets, whose
size a DeepSpeed config names, come on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from ...norms.chain import Chain
from ...optimizer.momentum import has_momentum
from ...optimizer.partitioned import refuse_rules
from ...ranks.flat import FlatCut
from ...ranks.slices import GATHERED_BYTES
from .state import is_ours, optimizer_groups, refuse_unknown_in_parts
from .table import Settings


def check_zero(names: Sequence[str], settings: Settings) -> None:
    """Refuse what is not known under ZeRO.

    Raises:
        ValueError: with what to type.

    Example:
        >>> from hf_stateless.reports.predicted import Settings
        >>> from hf_stateless.reports.predicted.zero import check_zero
        >>> check_zero(["sinkgd"], Settings(zero=3))
        Traceback (most recent call last):
            ...
        ValueError: --zero 3: expected the number of GPUs beside it, such as --ranks 8.
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
        if name.endswith("_layerwise"):
            raise ValueError(f"{flag}: DeepSpeed keeps gradients until the step: leave out --layerwise.")
    refuse_unknown_in_parts(names, flag)


def zero_state(model: nn.Module, name: str, optim_args: Mapping[str, Any], ranks: int) -> int:
    """Return the bytes of float32 masters and of what an optimizer keeps, of the GPU that holds most."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    if is_ours(name):
        groups = optimizer_groups(model, name, optim_args)
        refuse_rules(groups)
        adamw, matrices = ([g for g in groups if (g["algorithm"] == "multinorm") == held] for held in (False, True))
        kept = sum(2 * 4 * _part(g["params"], ranks) for g in adamw)
        kept += sum(_average_itemsize(g) * _part(g["params"], ranks) for g in matrices)
    else:
        kept = 2 * 4 * -(-sum(trained) // ranks)
    return 4 * -(-sum(trained) // ranks) + kept


def zero_bytes(weights: int, trained: int, stage: int, ranks: int) -> int:
    """Return what ZeRO itself sends: gradients to those who update, weights back; at stage 3 weights twice.

    Args:
        weights: bytes of all parameters.
        trained: bytes of those that get a gradient.
        stage: 1, 2 or 3.
        ranks: the number N of GPUs.
    """
    return (trained + (2 * weights if stage == 3 else trained)) * (ranks - 1) // ranks


def zero_optimizer_bytes(model: nn.Module, name: str, optim_args: Mapping[str, Any], settings: Settings) -> int:
    """Return what an optimizer sends, the GPU that sends most: gradients in float32, and their averages.

    At stages 1 and 2 these are pieces of the matrices across a border. At stage 3 all gather them, and share the
    updates where each whitens some of the matrices.
    """
    if not is_ours(name):
        return 0
    ranks, sent = settings.ranks, [0] * settings.ranks
    for group in _matrix_groups(optimizer_groups(model, name, optim_args)):
        if settings.zero == 3:
            itemsize = (8 if Chain.of(group).whitens else 4) + _average_itemsize(group)
            gathered = itemsize * sum(p.numel() for p in group["params"]) * (ranks - 1) // ranks
            sent = [of_rank + gathered for of_rank in sent]
            continue
        edges = [0, *accumulate(p.numel() for p in group["params"])]
        spans = tuple(pairwise(edges))
        for rank in range(ranks):
            cut = FlatCut(rank, ranks, _part(group["params"], ranks), spans)
            for i in cut.mine():
                first, last = cut.held(i)
                sent[rank] += (4 + _average_itemsize(group)) * (last - first) * (len(cut.holders(i)) - 1)
    return max(sent)


def zero_temporary(
    model: nn.Module, temporary: int, settings: Settings, groups: Sequence[Mapping[str, Any]] = ()
) -> int:
    """Return what a step needs on top: gradients of a part in float32, and what the optimizer needs, in float32 too.

    Args:
        model: that is trained.
        temporary: what the optimizer needs for weights in the model's dtype.
        settings: the stage and the number of GPUs.
        groups: of an optimizer of ours. At stage 3 gradients are gathered, and put together with a weight for each;
            their averages too.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    itemsize = max((p.dtype.itemsize for p in trained), default=4)
    matrices = _matrix_groups(groups) if settings.zero == 3 else []
    sizes: list[int] = [p.numel() for group in matrices for p in group["params"]]
    at_once: int = min(sum(sizes), GATHERED_BYTES // 4 + max(sizes, default=0))
    of_averages = max((_average_itemsize(group) for group in matrices), default=0)
    gathered = at_once * (3 * 4 + 2 * of_averages)
    return 4 * -(-sum(p.numel() for p in trained) // settings.ranks) + gathered + temporary * 4 // itemsize


def _matrix_groups(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [group for group in groups if group["algorithm"] == "multinorm"]


def _average_itemsize(group: Mapping[str, Any]) -> int:
    """Return the bytes that momentum keeps for each weight of a group."""
    return int(getattr(torch, group["momentum_dtype"]).itemsize) if has_momentum(group) else 0


def _part(params: Sequence[nn.Parameter], ranks: int) -> int:
    """Return the entries of a part: DeepSpeed pads each group to an even number on each GPU."""
    return 2 * math.ceil(sum(p.numel() for p in params) / (2 * ranks))

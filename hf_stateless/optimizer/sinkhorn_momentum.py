r"""The rule `sinkhorn_momentum` for embedding tables: one momentum buffer, balanced by SR-Sinkhorn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ranks.placement import local_shard, sum_over_cut, whole_if_unknown
from ..ranks.sinkhorn import sinkhorn_of_part
from ..update.rate import learning_rate
from ..update.write import write_update_
from ..weights.cuts import splits_of
from ..weights.noise import RoundingKey
from .rule import Entry, Host, Rule, counter, keys_of


_OPTIONS = {"momentum": 0.95, "num_iterations": 5.5, "row_threshold": 1e-3, "lr_scale": 0.18}


def sinkhorn_momentum_update_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    key: RoundingKey | None,
    *,
    lr: float,
    lr_scale: float,
    weight_decay: float,
    momentum: float,
    num_iterations: float,
    row_threshold: float,
    usable: Tensor | None = None,
) -> None:
    r"""Sinkhorn-balanced Nesterov momentum for embedding tables W in R^{V x d}: one buffer instead of AdamW's two.

    B <- mu B + (1 - mu) G; N = (1 - mu) G + mu B; rows with a norm of at most `row_threshold` times the mean row norm
    are masked, then SR-Sinkhorn with an odd number of half steps (it starts and ends on rows), so that every active
    row has the norm sqrt(d); W <- (1 - lr wd) W - lr lr_scale X. State kept: the buffer, in the parameter's dtype.

    Args:
        param: (V, d) weight, updated in place; of a DTensor each rank updates its part (a collective).
        grad: its gradient, cut as the weight is.
        momentum_buffer: B, updated in place.
        key: rounding key of a bf16 weight, or None.
        lr: learning rate.
        lr_scale: gamma of the report, 0.18.
        weight_decay: decoupled decay, per unit of learning rate.
        momentum: mu, 0.95.
        num_iterations: 5.5 for eleven half steps.
        row_threshold: tau, 1e-3: tokens that were not seen for long get no step.
        usable: a flag on the device, where weight and buffer stay as they are unless it is set.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.sinkhorn_momentum import sinkhorn_momentum_update_
        >>> W, B = torch.zeros(2, 2), torch.zeros(2, 2)
        >>> sinkhorn_momentum_update_(W, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), B, None, lr=1.0, lr_scale=0.18,
        ...                           weight_decay=0.0, momentum=0.95, num_iterations=5.5, row_threshold=1e-3)
        >>> W
        tensor([[-0.1800, -0.1800],
                [ 0.0000,  0.0000]])

    References:
        The optimizer of embedding tables in the DeepSeek-V4.1-Flash report, after
        https://huggingface.co/papers/2502.06742, Algorithm 3.
    """
    # As plain tensors: DTensor of torch 2.11 refuses some of these operations and gets others wrong.
    weight, kept = local_shard(param), local_shard(momentum_buffer)
    exact_grad = local_shard(grad).to(torch.promote_types(param.dtype, torch.float32))
    if usable is not None:
        exact_grad = torch.where(usable, exact_grad, 0)
    buffer = kept.to(exact_grad.dtype).lerp(exact_grad, 1 - momentum)
    direction = exact_grad.lerp(buffer, momentum)
    kept.copy_(buffer if usable is None else torch.where(usable, buffer, kept))
    row_norms, mean_norm = _row_norms(direction, param)
    direction.masked_fill_(row_norms <= row_threshold * mean_norm, 0)
    sizes = (param.shape[0], param.shape[1])
    update = sinkhorn_of_part(direction, splits_of(param) or (), sizes, num_iterations)
    write_update_(weight, update, lr * lr_scale, 1 - lr * weight_decay, key, usable)


def _row_norms(direction: Tensor, param: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms of this rank's rows, and the mean of those of the whole table."""
    norms = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    norms = sum_over_cut(norms.double().square(), param, 1).sqrt().to(norms.dtype)
    return norms, sum_over_cut(norms.sum(-2, keepdim=True), param, 0) / param.shape[0]


def _update(entries: list[Entry], host: Host) -> None:
    for entry, key in zip(entries, keys_of(entries, host.cache), strict=True):
        options = {name: entry.group[name] for name in ("weight_decay", *_OPTIONS)}
        with whole_if_unknown(entry.param, entry.grad, entry.state["momentum_buffer"]) as (weight, grad, buffer):
            lr = learning_rate(entry.group)
            sinkhorn_momentum_update_(weight, grad, buffer, key, lr=lr, usable=entry.usable, **options)
        entry.step.add_(1 if entry.usable is None else entry.usable)


def _state(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"step": counter(param), "momentum_buffer": torch.zeros_like(param)}


def _state_bytes(shape: Sequence[int], dtype: torch.dtype, group: Mapping[str, Any]) -> int:
    return 4 + math.prod(shape) * dtype.itemsize


SINKHORN_MOMENTUM = Rule(_update, _state, _state_bytes, _OPTIONS, decays=False, for_tables=True, by_rows=True)

"""Attention and the products of experts take the memory on the meta device that real devices need.

The meta device itself would form all attention scores, and knows grouped products in bf16 only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _GroupedProduct(torch.autograd.Function):
    """Products of groups of rows with a matrix each, in shapes only."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor) -> Tensor:
        ctx.save_for_backward(rows, matrices)
        return rows.new_empty(rows.shape[0], matrices.shape[-1])

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor]:
        rows, matrices = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(matrices)


@contextlib.contextmanager
def fused_kernels(device: str) -> Iterator[None]:
    """Replace two functions of torch for the time of the context.

    A mode for torch functions would not reach what activation checkpointing runs again in backward. Delete this when
    the meta device picks the fused kernels of real devices.
    """
    makers = {"scaled_dot_product_attention": _attention, "grouped_mm": _grouped_product}  # torch 2.9 lacks the second
    originals = {name: getattr(F, name) for name in makers if hasattr(F, name)}
    for name, original in originals.items():
        setattr(F, name, makers[name](original, device))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(F, name, original)


def _attention(original: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """Return attention that does not form the scores, but where a real device does too.

    CPUs form them where there is dropout or heads of different sizes, and every device where the mask has a gradient.
    """

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        learned_mask = attn_mask is not None and attn_mask.requires_grad
        missing = query.shape[-1] - value.shape[-1]
        if query.device.type != "meta" or learned_mask or (device == "cpu" and (dropout_p > 0 or missing)):
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        padded = F.pad(value, (0, missing)) if missing else value
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = flash(query, key, padded, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return out[..., : value.shape[-1]]

    return attend


def _grouped_product(original: Callable[..., Any], device: str) -> Callable[..., Any]:
    def grouped_mm(rows: Tensor, matrices: Tensor, **options: Any) -> Any:
        if rows.device.type == "meta":
            return _GroupedProduct.apply(rows, matrices)  # type: ignore[no-untyped-call]
        return original(rows, matrices, **options)

    return grouped_mm

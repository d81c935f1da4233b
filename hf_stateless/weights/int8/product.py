"""The product of a linear layer whose weight is made in float for the moment of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .codes import dequantize_matrix


def int8_product(input: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return X W^T from codes and scales, with a gradient of the weight.

    Args:
        input: X, (..., in).
        weight: W, (out, in), which gets the gradient.
        codes: of W.
        scale: of W, (out, groups).
    """
    # The codes are arguments so that autograd notices when they change too early.
    product: Tensor = _Int8Product.apply(input, weight, codes, scale)  # type: ignore[no-untyped-call]
    return product


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(input, codes, scale)
        return functional.linear(input, dequantize_matrix(codes, scale, input.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, codes, scale = ctx.saved_tensors
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            of_input = grad.matmul(dequantize_matrix(codes, scale, grad.dtype))
        if ctx.needs_input_grad[1]:
            of_weight = grad.reshape(-1, grad.shape[-1]).mT.matmul(input.reshape(-1, input.shape[-1]))
        return of_input, of_weight, None, None

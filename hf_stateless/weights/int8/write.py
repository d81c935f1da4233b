"""Writing an update into 8-bit weights: some rows at a time in float32, so that no float matrix is ever whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .codes import dequantize_matrix, requantize_
from .weight import Int8Weight


# Elements that are in float32 at once; the result does not depend on it.
_BLOCK = 1 << 22


def write_int8_(
    weight: Int8Weight, update: Callable[[slice], Tensor], step_size: float, decay: float, key: Tensor | None
) -> None:
    r"""Apply W <- decay W - step_size X to codes and scales; a group without change keeps every byte.

    Args:
        weight: (out, in), updated in place.
        update: takes a slice of rows and returns those of X in float32; they may be overwritten.
        step_size: factor of X.
        decay: factor of W.
        key: rounding key: E[W] is then exact; None for rounding to nearest.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.int8.write import write_int8_
        >>> from hf_stateless.weights.int8.weight import Int8Weight
        >>> weight = Int8Weight(torch.tensor([[127, 64]], dtype=torch.int8),
        ...                     torch.tensor([[0.5]], dtype=torch.bfloat16))
        >>> write_int8_(weight, lambda rows: torch.tensor([[0.0, 4.0]])[rows], 1.0, 1.0, None)
        >>> weight.dequantize()
        tensor([[63.5000, 28.0000]], dtype=torch.bfloat16)
    """
    rows, columns = weight.shape
    at_once = max(1, _BLOCK // max(columns, 1))
    with torch.no_grad():
        for first in range(0, rows, at_once):
            part = slice(first, first + at_once)
            codes, scale = weight.codes[part], weight.scale.data[part]
            exact = dequantize_matrix(codes, scale)
            if decay != 1:
                exact.mul_(decay)
            exact.add_(update(part), alpha=-step_size)
            requantize_(codes, scale, exact, key, first_row=first)

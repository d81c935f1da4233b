"""`CodedWeight`: what a whole 8-bit weight and a part of one have in common, read from their codes and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from ..stored import StoredWeight
from .codes import dequantize_matrix


class CodedWeight(StoredWeight):
    """A parameter whose values are int8 codes (..., rows, columns) times bfloat16 scales (..., rows, groups)."""

    codes: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the float values, in the dtype of the parameter or another one."""
        return dequantize_matrix(self.codes, self.scale, dtype or self.dtype)

    def dequantize_into(self, out: Tensor) -> None:
        """Write the float values into a contiguous tensor of this shape, in its dtype."""
        scale = self.scale.detach()
        out.copy_(self.codes).view(*scale.shape, -1).mul_(scale.unsqueeze(-1))

    def rows(self, rows: slice) -> Tensor:
        """Return some rows of a matrix in float32."""
        return dequantize_matrix(self.codes[rows], self.scale.detach()[rows])

    def element_size(self) -> int:
        """Return 1: what a weight takes, as `get_memory_footprint()` asks; its gradient takes `dtype.itemsize`."""
        return self.codes.element_size()

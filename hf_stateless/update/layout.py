"""How a matrix W in R^{m x n}, m = out_features, lies in a stored tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Stored as (..., out, in): what `nn.Linear` has, and stacks of such matrices.

    Example:
        >>> import torch
        >>> from hf_stateless.update.layout import LAYOUTS
        >>> layout = LAYOUTS["conv"]
        >>> layout.as_matrix(torch.zeros(8, 3, 2, 2)).shape, layout.sizes((8, 3, 2, 2))
        (torch.Size([8, 12]), (8, 12))
    """

    name: str
    turned: bool = False
    """Whether the input features come first."""
    scales: bool = True
    """Whether diag(r) G diag(c) can be written into the stored tensor from its two vectors."""
    stacks: bool = True
    """Whether several tensors of one shape can be stacked and normalised as one batch."""
    any_length: bool = False
    """Whether tensors of different lengths are worked on alike."""

    @property
    def plain(self) -> bool:
        """Whether the stored tensor is the matrix itself."""
        return type(self) is Layout

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """View a stored tensor as (..., out_features, in_features)."""
        return tensor

    def back(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """View a matrix as it is stored."""
        return matrix.reshape(tuple(shape))

    def sizes(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """Return (m, n) of a stored shape, or None where a tensor has no width."""
        return shape[-2], shape[-1]

    def cut_along(self, dim: int, ndim: int) -> int | None:
        """Return what a cut of a stored dimension is to the matrix.

        Returns:
            -2 where it is cut between rows, -1 between columns, 0 between matrices of a stack, None otherwise.
        """
        from_end = dim - ndim
        return 0 if from_end < -2 else from_end


class _InOut(Layout):
    """Stored as (..., in, out): GPT-2's `Conv1D`, and some stacks of experts."""

    def as_matrix(self, tensor: Tensor) -> Tensor:
        return tensor.mT

    def back(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        return matrix.mT

    def sizes(self, shape: Sequence[int]) -> tuple[int, int] | None:
        return shape[-1], shape[-2]

    def cut_along(self, dim: int, ndim: int) -> int | None:
        from_end = dim - ndim
        return 0 if from_end < -2 else -3 - from_end


class _Conv(Layout):
    """Stored as (out, in, kernel...): a convolution, whose kernel counts as further input features."""

    def as_matrix(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(1)

    def sizes(self, shape: Sequence[int]) -> tuple[int, int] | None:
        return shape[0], math.prod(shape[1:])

    def cut_along(self, dim: int, ndim: int) -> int | None:
        return -2 if dim == 0 else None


class _Vector(Layout):
    """A norm or a bias: one row of any length."""

    def as_matrix(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(1, -1)

    def sizes(self, shape: Sequence[int]) -> tuple[int, int] | None:
        return None

    def cut_along(self, dim: int, ndim: int) -> int | None:
        return None


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("out_in"),
        _InOut("in_out", turned=True),
        _Conv("conv", scales=False, stacks=False),
        _Vector("vector", stacks=False, any_length=True),
    )
}
"""By the name that a parameter group has as `layout`."""

"""Weights in a format of their own: they write themselves, so that nobody else has to know the format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .noise import RoundingKey


Lost: TypeAlias = Callable[[slice, Tensor], None]
"""Takes in, for a slice of the rows of a weight, what rounding left out of it, in float32: wanted less written."""


class StoredWeight(nn.Parameter):
    """A parameter that counts as a float tensor (out, in), but whose values are stored in another way.

    A new format is one subclass; `Int8Weight` is the example. Plain float weights are no `StoredWeight`. A stack of
    matrices (..., out, in) is written one matrix after the other.
    """

    kernel: str = ""
    """Under which name `update.kernels` has kernels for this format; empty if it has none."""
    first_row: int = 0
    """Number of its first row in the whole matrix, on which its rounding noise depends."""
    first_matrix: int = 0
    """The same of a part of a stack: number of its first matrix in the whole stack."""

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that hold the values, the largest first."""
        raise NotImplementedError

    def matrices(self) -> Sequence[StoredWeight]:
        """Return the matrices of a stack, each over the memory that it has there."""
        raise NotImplementedError

    def rows(self, rows: slice) -> Tensor:
        """Return some rows in float32."""
        raise NotImplementedError

    def write_rows_(
        self,
        update: Callable[[slice], Tensor],
        step_size: float | Tensor,
        decay: float | Tensor,
        key: RoundingKey | None,
        *,
        usable: Tensor | None = None,
        lost: Lost | None = None,
    ) -> None:
        """Apply W <- decay W - step_size X, taking rows of X as they are needed.

        Args:
            update: takes a slice of rows and returns those of X in float32; they may be overwritten.
            step_size: factor of X; on an accelerator it may be a tensor with one number.
            decay: factor of W, of the same kind.
            key: of stochastic rounding; None for rounding to nearest.
            usable: given on accelerators only: a flag on the device, where every byte stays unless it is set.
            lost: takes in what rounding left out, after each slice.
        """
        raise NotImplementedError

    def stand_in(self, device: str) -> StoredWeight:
        """Return a weight of this shape and format on another device, with contents that mean nothing."""
        raise NotImplementedError


def is_rounded(weight: Tensor) -> bool:
    """Tell whether what is written into a weight is rounded, so that the rounding should be stochastic."""
    return weight.dtype == torch.bfloat16 or isinstance(weight, StoredWeight)


def stand_in(weight: Tensor, device: str) -> nn.Parameter:
    """Return a parameter of the shape, dtype and format of another, with contents that mean nothing."""
    if isinstance(weight, StoredWeight):
        return weight.stand_in(device)
    return nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device=device))

"""How a matrix W in R^{m x n}, m = out_features, lies in a stored tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
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
    blocks: int = 1
    """How many matrices, each on its own, one dimension of the stored tensor is made of."""

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

    def norms(self, stored: Tensor) -> Tensor:
        """Return the norm of a stored tensor, for each of its blocks, in at least float32."""
        wide = torch.promote_types(stored.dtype, torch.float32)
        each = self.as_matrix(stored).flatten(1) if self.blocks > 1 else stored.reshape(1, -1)
        norms: Tensor = torch.linalg.vector_norm(each, dim=1, dtype=wide)
        return norms

    def spread(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a tensor of a stored shape that has in each block the number of this block."""
        sizes = self.sizes(shape)
        assert sizes is not None
        return self.back(values.reshape(-1, 1, 1).expand(self.blocks, *sizes), shape)


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


class _InOuts(Layout):
    """Stored as (in, out...): projections with a dimension for heads, such as XLNet's `q`, `k` and `v`."""

    def as_matrix(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(1).mT

    def back(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        return matrix.mT.reshape(tuple(shape))

    def sizes(self, shape: Sequence[int]) -> tuple[int, int] | None:
        return math.prod(shape[1:]), shape[0]

    def cut_along(self, dim: int, ndim: int) -> int | None:
        return -1 if dim == 0 else None


class _Vector(Layout):
    """A norm or a bias: one row of any length."""

    def as_matrix(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(1, -1)

    def sizes(self, shape: Sequence[int]) -> tuple[int, int] | None:
        return None

    def cut_along(self, dim: int, ndim: int) -> int | None:
        return None


@dataclass(frozen=True)
class _Blocks(Layout):
    """Several matrices side by side in one stored matrix: as blocks of its rows, or of columns dealt out in turn."""

    of: Layout = Layout("out_in")
    """How the stored matrix lies."""
    dealt: bool = False
    """Whether the in_features are what is divided: input j belongs to matrix j mod `blocks`."""

    def as_matrix(self, tensor: Tensor) -> Tensor:
        matrix = self.of.as_matrix(tensor)
        *stack, rows, columns = matrix.shape
        if self.dealt:
            return matrix.reshape(*stack, rows, columns // self.blocks, self.blocks).movedim(-1, -3)
        return matrix.reshape(*stack, self.blocks, rows // self.blocks, columns)

    def back(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        one = matrix.movedim(-3, -1).flatten(-2) if self.dealt else matrix.flatten(-3, -2)
        return self.of.back(one, shape)

    def sizes(self, shape: Sequence[int]) -> tuple[int, int] | None:
        rows, columns = self.of.sizes(shape) or (0, 0)
        if (columns if self.dealt else rows) % self.blocks:
            divided = f"{columns} input" if self.dealt else f"{rows} output"
            raise ValueError(
                f"layout={self.name!r} divides the {divided} features of a weight of shape {tuple(shape)} among "
                f"{self.blocks} matrices, which leaves a rest: type layout={self.of.name!r} for one matrix."
            )
        return (rows, columns // self.blocks) if self.dealt else (rows // self.blocks, columns)

    def cut_along(self, dim: int, ndim: int) -> int | None:
        # A cut of what is divided may go through a matrix, and how many a rank holds differs over ranks.
        along = self.of.cut_along(dim, ndim)
        return None if along == (-1 if self.dealt else -2) else along


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("out_in"),
        _InOut("in_out", turned=True),
        _Conv("conv", scales=False, stacks=False),
        _InOuts("in_outs", turned=True, scales=False, stacks=False),
        _Vector("vector", stacks=False, any_length=True),
    )
}
"""By the name that a parameter group has as `layout`; `layout_of` knows blocks of them too."""


@cache
def layout_of(name: str) -> Layout:
    """Return the layout of a name: one of `LAYOUTS`, or several matrices in one that lies so.

    Args:
        name: a key of `LAYOUTS`; with `*3` three matrices whose output features lie one after the other, as in
            `nn.MultiheadAttention.in_proj_weight`; with `/8` eight whose input features are dealt out in turn, as PEFT
            stores B of eight experts.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> import torch
        >>> from hf_stateless.update.layout import layout_of
        >>> layout_of("out_in*3").as_matrix(torch.zeros(12, 4)).shape, layout_of("out_in*3").sizes((12, 4))
        (torch.Size([3, 4, 4]), (4, 4))
        >>> layout_of("out_in/2").as_matrix(torch.tensor([[0, 1, 2, 3]])).tolist()
        [[[0, 2]], [[1, 3]]]
    """
    for sign in "*/":
        base, found, count = name.partition(sign)
        if found and base in LAYOUTS and not LAYOUTS[base].any_length and count.isdecimal() and int(count) > 1:
            return _Blocks(name, scales=False, stacks=LAYOUTS[base].stacks, blocks=int(count), of=LAYOUTS[base],
                           dealt=sign == "/")  # fmt: skip
    if name not in LAYOUTS:
        raise ValueError(
            f"Unknown layout {name!r}: expected {', '.join(LAYOUTS)}, or such as out_in*3 and out_in/8 for three and "
            "eight matrices in one."
        )
    return LAYOUTS[name]


def layout_at(group: Mapping[str, Any], position: int) -> Layout:
    """Return the layout of one parameter of a group.

    Args:
        group: with `layout`, that of all; some may be listed in `layouts`, see `one_layout`.
        position: of the parameter in the group.
    """
    listed = group.get("layouts")
    return layout_of(_listed(listed).get(position, group["layout"]) if listed else group["layout"])


def one_layout(name: str) -> str:
    """Return the layout of the group in which weights of a layout are: several in one are with those that are one.

    So the groups of a model are the same however its factors are divided, and older checkpoints fit them.

    Example:
        >>> from hf_stateless.update.layout import one_layout
        >>> one_layout("out_in/8"), one_layout("in_out")
        ('out_in', 'in_out')
    """
    layout = layout_of(name)
    return layout.of.name if isinstance(layout, _Blocks) else name


def listed_layouts(names: Sequence[str]) -> str:
    """Return the group value `layouts` for weights of some layouts: those that are not `one_layout`, by position.

    Example:
        >>> from hf_stateless.update.layout import layout_at, listed_layouts
        >>> listed_layouts(["out_in", "out_in*8", "out_in/8"])
        '1=out_in*8 2=out_in/8'
        >>> layout_at({"layout": "out_in", "layouts": "1=out_in*8 2=out_in/8"}, 2).name
        'out_in/8'
    """
    return " ".join(f"{i}={name}" for i, name in enumerate(names) if name != one_layout(name))


@cache
def _listed(layouts: str) -> dict[int, str]:
    pairs = (entry.split("=") for entry in layouts.split())
    return {int(position): name for position, name in pairs}

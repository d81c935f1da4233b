"""`Int8Weight`: the trainable parameter of an 8-bit layer, with a gradient but without float values of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..noise import RoundingKey
from ..stored import StoredWeight
from .codes import dequantize_matrix, requantize_


# Elements that are in float32 at once while a weight is written; the result does not depend on it.
_BLOCK = 1 << 22


class Int8Weight(StoredWeight):
    """A parameter of a float dtype whose values are int8 codes times scales; autograd gives it an ordinary gradient.

    Optimizers, hooks and DDP see a trainable leaf of shape (out, in). Its own memory is one NaN, seen from every
    position: code that takes it for an ordinary weight gets NaN or an error, never a wrong number. `detach()` returns
    the codes, since what is stored is what `state_dict` saves and DDP sends. State kept: codes, 1 byte per weight.

    Args:
        codes: (out, in) int8; a stack of matrices has further dimensions before, and groups along its last one.
        scale: (out, groups) bfloat16; a frozen parameter where a module holds it, so that DDP sends it too.
        dtype: what the weight counts as: of its gradient, and of a model that is made from it.
        requires_grad: False for a weight that is not trained.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.int8.weight import Int8Weight
        >>> weight = Int8Weight(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([[0.5]], dtype=torch.bfloat16))
        >>> weight.dequantize(), weight.dtype, weight.untyped_storage().nbytes()
        (tensor([[ 1., -2.]], dtype=torch.bfloat16), torch.bfloat16, 2)
    """

    kernel = "int8"
    codes: Tensor
    scale: Tensor

    def __new__(
        cls, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = True
    ) -> Int8Weight:
        """Make the leaf beside its codes and scales."""
        weight: Int8Weight = super().__new__(cls, _nothing(codes.shape, dtype, codes.device), requires_grad)
        weight.codes, weight.scale = codes, scale
        return weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the float weight, in the dtype of the parameter or another one."""
        return dequantize_matrix(self.codes, self.scale, dtype or self.dtype)

    def rows(self, rows: slice) -> Tensor:
        """Return some rows of a matrix in float32."""
        return dequantize_matrix(self.codes[rows], self.scale.detach()[rows])

    def dequantize_into(self, out: Tensor) -> None:
        """Write the float weight into a contiguous tensor of its shape."""
        out.copy_(self.codes).view(*self.scale.shape, -1).mul_(self.scale.detach().unsqueeze(-1))

    def detach(self) -> Tensor:
        """Return the codes."""
        return self.codes.detach()

    def element_size(self) -> int:
        """Return 1: what a weight takes, as `get_memory_footprint()` asks; its gradient takes `dtype.itemsize`."""
        return self.codes.element_size()

    def matrices(self) -> list[Int8Weight]:
        """Return the matrices of a stack, each over the memory that it has there."""
        both = zip(*(t.data.flatten(0, -3) for t in self.stored), strict=True)
        return [Int8Weight(codes, scale, self.dtype) for codes, scale in both]

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The codes and their scales."""
        return self.codes, self.scale

    @torch.no_grad()
    def write_rows_(
        self,
        update: Callable[[slice], Tensor],
        step_size: float | Tensor,
        decay: float | Tensor,
        key: RoundingKey | None,
        *,
        usable: Tensor | None = None,
    ) -> None:
        r"""Apply W <- decay W - step_size X to codes and scales, some rows at a time in float32.

        A group without change keeps every byte. With a key E[W] is exact.
        """
        rows, columns = self.shape
        at_once = max(1, _BLOCK // max(columns, 1))
        for first in range(0, rows, at_once):
            part = slice(first, first + at_once)
            codes, scale = self.codes[part], self.scale.data[part]
            before = None if usable is None else (codes.clone(), scale.clone())
            exact = dequantize_matrix(codes, scale)
            if isinstance(decay, Tensor) or decay != 1:
                exact.mul_(decay)
            if isinstance(step_size, Tensor):
                exact.addcmul_(update(part), step_size, value=-1)
            else:
                exact.add_(update(part), alpha=-step_size)
            requantize_(codes, scale, exact, key, first_row=first)
            for now, old in zip((codes, scale), before or (), strict=False):
                now.copy_(torch.where(usable, now, old))  # type: ignore[arg-type]

    def stand_in(self, device: str) -> Int8Weight:
        """Return an 8-bit weight of this shape on another device, with contents that mean nothing."""
        codes, scale = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in self.stored)
        return Int8Weight(codes, scale, self.dtype)

    def move_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the weight as `nn.Module._apply` moves a parameter; a cast changes the dtype it counts as."""
        codes = fn(self.codes)
        like = fn(torch.empty((), dtype=self.dtype, device=self.device))
        self.codes = codes if codes.dtype == torch.int8 else self.codes.to(codes.device)
        self.data = _nothing(self.shape, like.dtype, like.device)
        if self.grad is not None:
            self.grad = fn(self.grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Weight:
        if id(self) not in memo:
            scale = copy.deepcopy(self.scale, memo)  # the same object as the module's copy
            memo[id(self)] = type(self)(self.codes.clone(), scale, self.dtype, self.requires_grad)
        copied: Int8Weight = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self), (self.codes, self.scale, self.dtype, self.requires_grad)


class Scale(nn.Parameter):
    """The scales beside the codes: saved, moved and sent as a parameter is, but never trained nor counted as weights.

    `nelement()` is their true number, which `get_memory_footprint()` asks for.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Scale:
        """Make a frozen parameter."""
        scale: Scale = super().__new__(cls, data, False)
        return scale

    def numel(self) -> int:
        """Return 0: `num_parameters()`, PEFT and reports count parameters with it, and scales are not of the model."""
        return 0

    def requires_grad_(self, requires_grad: bool = True) -> Scale:
        """Stay frozen where a module's `requires_grad_` unfreezes all it has: DDP would wait for a gradient."""
        return self


def _nothing(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(shape)

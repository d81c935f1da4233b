"""`Int8Weight`: the trainable parameter of an 8-bit layer, with a gradient but without float values of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..noise import RoundingKey
from ..stored import Lost
from .coded import CodedWeight
from .codes import write_rows_
from .sharded import Int8Shard


class Int8Weight(CodedWeight):
    """A parameter of a float dtype whose values are int8 codes times scales; autograd gives it an ordinary gradient.

    Optimizers, hooks and DDP see a trainable leaf of shape (out, in). Its own memory is one NaN for each
    row, seen from all its positions: code that takes it for an ordinary weight gets NaN or an error, never a wrong
    number. `detach()` returns the codes, since what is stored is what `state_dict` saves and DDP sends. FSDP2 cuts it
    into `Int8Shard`s. State kept: codes, 1 byte per weight.

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
    moved_to: Int8Weight | None = None
    """What has replaced it where it lost its memory, for another module that it is tied to."""

    def __new__(
        cls, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = True
    ) -> Int8Weight:
        """Make the leaf beside its codes and scales."""
        weight: Int8Weight = super().__new__(cls, _nothing(codes.shape, dtype, codes.device), requires_grad)
        weight.codes, weight.scale = codes, scale
        return weight

    def detach(self) -> Tensor:
        """Return the codes."""
        return self.codes.detach()

    @property
    def data(self) -> Tensor:
        """The NaN; what is put in its place says on which device and of which dtype the weight shall be."""
        data: Tensor = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return data

    @data.setter
    def data(self, like: Tensor) -> None:
        self.codes = self.codes.to(like.device)
        torch.Tensor.data.__set__(self, _nothing(self.shape, like.dtype, like.device))  # type: ignore[attr-defined]

    def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
        """Return True, as the codes are: FSDP2 asks."""
        return True

    def stride(self, *args: Any) -> Any:
        """Return the strides of the codes."""
        return self.codes.stride(*args)

    def new_zeros(self, *size: Any, **kwargs: Any) -> Tensor:
        """Return zeros; for a part of the shape and without a dtype what FSDP2 will copy rows of this weight into."""
        sizes = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        if kwargs or len(sizes) != self.ndim:
            zeros: Tensor = super().new_zeros(*size, **kwargs)
            return zeros
        return Int8Shard.empty_of(self, self.codes, sizes)

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
        lost: Lost | None = None,
    ) -> None:
        """Apply the update to codes and scales, see `codes.write_rows_`."""
        write_rows_(self.codes, self.scale.data, update, step_size, decay, key, usable=usable, lost=lost)

    def stand_in(self, device: str) -> Int8Weight:
        """Return an 8-bit weight of this shape on another device, with contents that mean nothing."""
        codes, scale = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in self.stored)
        return Int8Weight(codes, scale, self.dtype)

    def move_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the weight as `nn.Module._apply` moves a parameter; a cast changes the dtype it counts as."""
        codes = fn(self.codes)
        like = fn(torch.empty((), dtype=self.dtype, device=self.device))
        self.codes = codes if codes.dtype == torch.int8 else self.codes.to(codes.device)
        self.data = like
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
    # One for each row: what is cut from it tells by its offset which rows it is.
    one = (*shape[:1], *(1 for _ in shape[1:]))
    return torch.full(one, float("nan"), dtype=dtype, device=device).expand(shape)

"""Float weights that are lent to a module for its forward and its backward, in memory that is given back between."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .sharded import Int8Shard
from .weight import Int8Weight


class Purse:
    """The float values of one 8-bit weight, in one storage that is empty unless somebody computes with them.

    What autograd saved of them is the same storage, so it finds them again in backward; activation checkpointing, of
    both kinds, may compute them anew in between. It is what FSDP2 does with weights that it gathered.
    """

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._version = -1
        self._users: weakref.WeakSet[Loan] = weakref.WeakSet()  # a graph that is gone uses nothing

    def open(self, weight: Int8Weight | Int8Shard) -> Tensor:
        """Return the values of a weight, filled in where they are not there."""
        values, version = self._values, weight.codes._version
        if values is None or values.dtype != weight.dtype or values.device != weight.device:
            self._values = values = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            self._users.clear()
        elif not values.untyped_storage().nbytes():
            values.untyped_storage().resize_(weight.nelement() * weight.dtype.itemsize)
        elif version == self._version and self._users:
            return values
        weight.dequantize_into(values.data)  # `data` has a version of its own: autograd saved these values
        self._version = version
        return values

    def close(self) -> None:
        """Empty the storage, unless a backward is using it."""
        if self._values is not None and not self._users:
            self._values.untyped_storage().resize_(0)
            self._values.detach()  # lets who counts bytes see that there are none

    def enter(self, loan: Loan) -> None:
        """Open it for a backward."""
        self.open(loan.weight)
        self._users.add(loan)

    def leave(self, loan: Loan) -> None:
        """End a backward's use of it."""
        self._users.discard(loan)
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Purse:
        return Purse()

    def __reduce__(self) -> tuple[Any, ...]:
        return Purse, ()


class Loan:
    """One use of a weight: its values for forward, and again for the backward of the same graph."""

    def __init__(self, weight: Int8Weight | Int8Shard, purse: Purse) -> None:
        self.weight, self.purse = weight, purse
        self._version = weight.codes._version
        self._open = False

    def take(self) -> Tensor:
        """Return the values, with a gradient that goes to the 8-bit weight."""
        if self.weight.requires_grad and torch.is_grad_enabled():
            taken: Tensor = _Take.apply(self.weight, self)  # type: ignore[no-untyped-call]
            return taken
        return self.purse.open(self.weight).data

    def before_backward(self, _: Any = None) -> None:
        """Have the values ready.

        Raises:
            RuntimeError: the weight was written since forward.
        """
        if self.weight.codes._version != self._version:
            raise RuntimeError(
                "An 8-bit weight was updated between forward and backward, so its gradient would be wrong: call "
                "backward before the optimizer's step."
            )
        if not self._open:
            self._open = True
            self.purse.enter(self)

    def after_backward(self) -> None:
        """Give the values back."""
        if self._open:
            self._open = False
            self.purse.leave(self)


def before_backward_of(tensor: Tensor, loans: Sequence[Loan]) -> None:
    """Have loans ready when backward reaches what made a tensor.

    After the hooks of the tensor itself, by one of which FSDP2 gathers the weights of a module.
    """
    for loan in loans:
        if tensor.grad_fn is None:
            tensor.register_hook(loan.before_backward)  # type: ignore[no-untyped-call]
        else:
            tensor.grad_fn.register_prehook(loan.before_backward)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, loan: Loan) -> Tensor:
        ctx.loan = loan
        return loan.purse.open(loan.weight).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.loan.after_backward()
        return grad, None


class Uses:
    """What frozen weights are used for: backward needs them until it has reached every input of the module."""

    def __init__(self, loans: Sequence[Loan]) -> None:
        self.loans = [loan for loan in loans if not loan.weight.requires_grad]
        self._watched: dict[int, tuple[Tensor, Tensor]] = {}
        self._reached = 0

    def watch(self, value: Any) -> Any:
        """Return an input, watched if a gradient flows to it."""
        if not (isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled() and self.loans):
            return value
        if id(value) not in self._watched:  # attention asks whether its inputs are one tensor
            self._watched[id(value)] = value, _Watch.apply(value, self)  # type: ignore[no-untyped-call]
        return self._watched[id(value)][1]

    def forget_inputs(self) -> None:
        """Keep no input alive."""
        self._count = len(self._watched)
        self._watched.clear()

    def reach(self) -> None:
        """Note that backward is done with one input."""
        self._reached += 1
        if self._reached >= self._count:
            self._reached = 0
            for loan in self.loans:
                loan.after_backward()


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, uses: Uses) -> Tensor:
        ctx.uses = uses
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.uses.reach()
        return grad, None

"""One matrix on its way: what its update is computed from, and how this rank's part of it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..norms.chain import Chain
from ..update.feedback import Feedback
from ..update.kernels.choice import Verdict
from ..update.layout import Layout, layout_of
from ..update.rate import learning_rate
from ..update.reads import both, reads_at_once, where_usable
from ..update.width import width_factor
from ..update.write import Judged, Workspace, write_scaled_, write_update_
from ..weights.cuts import splits_of
from ..weights.noise import RoundingKey
from ..weights.stored import Lost, StoredWeight
from .placement import local_shard, part_of


@dataclass
class MatrixUpdate:
    r"""W <- (1 - lr weight_decay) W - lr lr_scale X for one parameter, X the normalised direction.

    A gradient that is zero or not finite leaves the weight unchanged, decay included. Of a layout of several matrices
    in one, each of them is a weight of its own in this.
    """

    param: Tensor
    gradient: Tensor
    """Cut over ranks as the parameter is."""
    group: Mapping[str, Any]
    """`lr` and its multiple, `lr_scale`, `width_rule`, `weight_decay`, `layout` and the fields of a chain."""
    key: RoundingKey | None = None
    """Of a weight that is rounded."""
    average: Callable[[], Tensor] | None = None
    """Takes the gradient into an average, once, and returns the direction that stands for it."""
    shared: bool = False
    """Whether replicas share the work on it."""
    stored_as: str = ""
    """The layout, where it is not that of the group."""
    allowed: Tensor | None = None
    """A flag on the device, where the weight stays as it is unless it is set."""
    feed: Lost | None = None
    """Takes into the average what the direction of stored rows lacked, see `Feedback`."""
    finite: Verdict = True
    """Whether the gradient was finite; known after the update."""

    def __post_init__(self) -> None:
        self.weight = local_shard(self.param)
        self.splits = splits_of(self.param)
        # What a mesh holds may not be what all processes hold.
        self.shared = self.shared and not isinstance(self.param, DTensor)
        self.chain = Chain.of(self.group)
        self.layout: Layout = layout_of(self.stored_as or self.group["layout"])

    @cached_property
    def direction(self) -> Tensor:
        """What is normalised, in the shape of the parameter; reading it moves the average that momentum keeps."""
        return self.average() if self.average else self.gradient

    def forget_direction(self) -> None:
        """Free a direction that is a tensor of its own."""
        self.__dict__.pop("direction", None)

    @property
    def part(self) -> Tensor:
        """This rank's part of the direction."""
        return local_shard(self.direction)

    @property
    def matrix(self) -> Tensor:
        """This rank's part of the direction as (..., out_features, in_features)."""
        return self.layout.as_matrix(self.part)

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of the parameter."""
        return self.splits is None or bool(self.splits)

    @property
    def shape_class(self) -> tuple[Any, ...]:
        """What updates have to share to be sent and computed together."""
        shape = None if self.layout.any_length else tuple(self.param.shape)
        cut = tuple((one.group.group_name, one.dim, one.pieces) for one in self.splits or ())
        return cut, shape, self.layout, self.gradient.dtype, self.gradient.device, self.chain

    @property
    def cuts(self) -> tuple[int | None, ...]:
        """How each split cuts the matrix: -2 between rows, -1 between columns, 0 in a stack, None otherwise."""
        return tuple(self.layout.cut_along(one.dim, self.param.ndim) for one in self.splits or ())

    def factors(self) -> tuple[Any, Any]:
        """Return the factor of X and that of W; as tensors on the device where the learning rate is one there."""
        lr, sizes, device = learning_rate(self.group), self.layout.sizes(self.param.shape), self.weight.device
        if isinstance(lr, Tensor) and not (reads_at_once(device) or reads_at_once(lr.device)):
            rate: Any = lr.reshape(()).to(device, torch.float32)
        else:
            rate = float(lr)
        width = width_factor(self.group.get("width_rule", "none"), *sizes) if sizes else 1.0
        return rate * (self.group["lr_scale"] * width), 1 - rate * self.group["weight_decay"]

    def allowed_factors(self) -> tuple[Any, Any]:
        """Return the factors for a kernel that knows of no `allowed`: 0 and 1 where nothing may move."""
        step_size, decay = self.factors()
        if self.allowed is None:
            return step_size, decay
        step_size, decay = (
            factor
            if isinstance(factor, Tensor)
            else torch.full((), factor, dtype=torch.float32, device=self.allowed.device)
            for factor in (step_size, decay)
        )
        return torch.where(self.allowed, step_size, 0), torch.where(self.allowed, decay, 1)

    def normalized(self, grad: Tensor) -> Tensor:
        """Return the normalised gradient in the shape of the given one (whole, or a part the chain allows)."""
        return self.layout.back(self.chain.normalize(self.layout.as_matrix(grad)), grad.shape)

    def write(self, update: Tensor, verdict: Judged, *, whole: bool = False) -> None:
        """Apply an update, if its norms allow it.

        Args:
            update: this rank's part, in the shape of the weight.
            verdict: on the whole update, by its norms.
            whole: the update is here as a whole.
        """
        may, usable = self._may_write(verdict)
        if may:
            part = part_of(update, self.param) if whole else update
            step_size, decay = self.factors()
            decay = decay_of(self.param, self.layout, decay, verdict.norms)
            write_update_(self.weight, part, step_size, decay, self.key, usable, self._feedback)

    def write_scaled(self, row: Tensor, column: Tensor, verdict: Judged, workspace: Workspace) -> None:
        """Apply diag(row) G diag(column), for this rank's part of G."""
        may, usable = self._may_write(verdict)
        if may:
            vectors, factors = (row, column), self.factors()
            fed, to = self._feedback, (self.layout, workspace)
            write_scaled_(self.weight, self.matrix, vectors, *factors, self.key, *to, usable, fed)

    @property
    def _feedback(self) -> Feedback | None:
        return Feedback(self.part, self.feed) if self.feed else None

    def _may_write(self, verdict: Judged) -> tuple[bool, Tensor | None]:
        """Take in a verdict; return whether there is anything to write, and the flag on the device that says more."""
        self.finite = verdict.finite
        usable = both(verdict.usable, self.allowed) if isinstance(verdict.usable, Tensor) else None
        return (usable is not None or bool(verdict.usable)) and self.weight.numel() > 0, usable


def decay_of(param: Tensor, layout: Layout, decay: float | Tensor, norms: Sequence[float] | Tensor) -> float | Tensor:
    """Return the factor of W, for this rank's part: a tensor where some of its matrices have no update and stay.

    Args:
        param: W.
        layout: how it lies.
        decay: the factor of a matrix that has an update.
        norms: of the update, from `Layout.norms`.
    """
    if isinstance(local_shard(param), StoredWeight) or (isinstance(norms, Tensor) and layout.blocks == 1):
        return decay
    if not isinstance(decay, Tensor) and (decay == 1 or (not isinstance(norms, Tensor) and all(norms))):
        return decay
    # Where `part_of` needs it: an offloaded shard is elsewhere.
    device = param.device_mesh.device_type if isinstance(param, DTensor) else param.device
    dtype = torch.promote_types(param.dtype, torch.float32)
    if isinstance(norms, Tensor):
        factors = torch.as_tensor(where_usable(norms > 0, decay, dtype)).to(device)
    else:
        factors = torch.tensor([decay if norm else 1.0 for norm in norms], dtype=dtype, device=device)
    return part_of(layout.spread(factors, param.shape), param)

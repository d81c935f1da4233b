"""One parameter whose update several ranks work on: which way they do, and how this rank's part is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..norms.chain import SINKHORN_CHAIN, multi_normalize
from ..update.rules import Workspace, as_matrix, write_scaled_, write_update_
from .placement import is_sharded, local_shard, split_of


_CHAIN = ("norms", "num_iterations", "whitening", "ns_steps", "ns_beta", "ns_dtype")
_ROW_NORMS = {"row_l2", "row_standardize", "sign"}
_COLUMN_NORMS = {"col_l2", "sign"}


@dataclass
class MatrixUpdate:
    """One parameter with a gradient, and the options of its group."""

    param: Tensor
    options: Mapping[str, Any]
    key: Tensor | None
    """Rounding key of a bf16 parameter."""
    direction: Tensor
    """The gradient, or what stands for it: cut over ranks as the parameter is."""
    finite: bool = True
    """Whether the gradient was finite; known after the update."""

    def __post_init__(self) -> None:
        self.weight, self.grad = local_shard(self.param), local_shard(self.direction)
        self.split = split_of(self.param)
        self.chain = {name: self.options[name] for name in _CHAIN}
        self.layout: str = self.options["layout"]

    @property
    def shape_class(self) -> tuple[Any, ...]:
        """What updates have to share to be sent and computed together; vectors of any length count as one shape."""
        shape = None if self.layout == "vector" else tuple(self.param.shape)
        cut = (self.split.group.group_name, self.split.dim) if self.split else None
        return (cut, shape, self.layout, self.grad.dtype, self.grad.device, *self.chain.values())

    def along(self) -> int | None:
        """Return how the matrix is cut: -2 by rows, -1 by columns, 0 between matrices of a stack, None otherwise."""
        assert self.split is not None
        if self.layout == "vector":
            return None
        if self.layout == "conv":
            return -2 if self.split.dim == 0 else None
        from_end = self.split.dim - self.param.ndim
        if from_end < -2:
            return 0
        return -3 - from_end if self.layout == "in_out" else from_end

    def way(self) -> str:
        """Return how the ranks work on this update."""
        if not is_sharded(self.param):
            return "replicated"
        if self.split is None:
            return "gathered"
        norms, along = set(self.chain["norms"]), self.along()
        if tuple(self.chain["norms"]) == SINKHORN_CHAIN and along is not None and self.layout != "conv":
            return "sinkhorn"
        local = along == 0 or (along == -2 and norms <= _ROW_NORMS) or (along == -1 and norms <= _COLUMN_NORMS)
        return "local" if local else "owned"

    def normalized(self, grad: Tensor) -> Tensor:
        """Return the multi-normalized gradient in the shape of the given one (whole, or a part the chain allows)."""
        dtype = torch.promote_types(grad.dtype, torch.float32)
        update = multi_normalize(as_matrix(grad, self.layout), dtype=dtype, **self.chain)
        return update.mT if self.layout == "in_out" else update.reshape(grad.shape)

    def write(self, update: Tensor, size: float) -> None:
        """Apply this rank's part of an update in the shape of the weight, if the norm of the whole is usable."""
        self.finite = size < float("inf")
        if not 0 < size < float("inf") or not self.weight.numel():
            return
        write_update_(self.weight, update, self._step_size, self._decay, self.key)

    def write_scaled(self, row: Tensor, column: Tensor, size: float, workspace: Workspace) -> None:
        """Apply diag(row) G diag(column), for this rank's part of G."""
        self.finite = size < float("inf")
        if not 0 < size < float("inf") or not self.weight.numel():
            return
        matrix = as_matrix(self.grad, self.layout)
        write_scaled_(self.weight, matrix, row, column, self._step_size, self._decay, self.key, self.layout, workspace)

    @property
    def _step_size(self) -> float:
        return float(self.options["lr"] * self.options["lr_scale"])

    @property
    def _decay(self) -> float:
        return float(1 - self.options["lr"] * self.options["weight_decay"])

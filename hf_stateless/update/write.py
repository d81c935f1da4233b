r"""Writing an update into a weight: W <- decay W - step_size X, whatever the weight is stored in.

bf16 weights are computed in float32 and written with stochastic rounding where there is a rounding key, else to
nearest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..norms.sinkhorn import row_blocks, scale_rows_
from ..weights.noise import RoundingKey
from ..weights.rounding import write_rounded_
from ..weights.stored import StoredWeight
from .kernels.choice import int8_kernel
from .layout import Layout


class Workspace:
    """Float buffers that the matrices of one step share: fresh pages for each would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, like: Tensor) -> Tensor:
        """Return an uninitialised tensor of the shape, order and device of `like`, in at least float32."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (name, dtype, like.device)
        if key not in self._buffers or self._buffers[key].numel() < like.numel():
            self._buffers[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        flat = self._buffers[key][: like.numel()]
        turned = like.ndim == 2 and not like.is_contiguous() and like.mT.is_contiguous()
        return flat.view(like.mT.shape).mT if turned else flat.view(like.shape)


def is_usable(size: float) -> bool:
    """Tell by the norm of an update whether it may be applied: it is neither zero nor made of a bad gradient.

    A gradient without signal must not become a full-size step, and not even a decay.

    Example:
        >>> from hf_stateless.update.write import is_usable
        >>> [is_usable(size) for size in (0.5, 0.0, float("inf"), float("nan"))]
        [True, False, False, False]
    """
    return 0 < size < math.inf


def write_update_(
    weight: Tensor, update: Tensor, step_size: float, decay: float | Tensor, key: RoundingKey | None
) -> None:
    """Apply W <- decay W - step_size X; the update is used as working space where the weight is bf16.

    The decay may be a tensor of the shape of W, but not for weights in a format of their own.
    """
    if isinstance(weight, StoredWeight):
        assert not isinstance(decay, Tensor)
        kernel = int8_kernel(weight, update)
        if kernel:
            kernel(weight, update, None, step_size, decay, key)
        else:
            weight.write_rows_(lambda rows: update[rows], step_size, decay, key)
        return
    exact = weight.to(update.dtype)  # the weight itself where the dtypes agree
    if isinstance(decay, Tensor) or decay != 1:
        exact.mul_(decay)
    exact.add_(update, alpha=-step_size)
    write_rounded_(weight, exact, key, scratch=update)


def write_scaled_(
    weight: Tensor,
    grad: Tensor,
    scalings: tuple[Tensor, Tensor],
    step_size: float,
    decay: float,
    key: RoundingKey | None,
    layout: Layout,
    workspace: Workspace,
) -> None:
    """Apply W <- decay W - step_size diag(r) G diag(c), with G viewed as a matrix and W as it is stored."""
    row, column = scalings
    if isinstance(weight, StoredWeight):
        kernel = int8_kernel(weight, grad, row)
        if kernel:
            kernel(weight, grad, scalings, step_size, decay, key)
        else:
            weight.write_rows_(lambda rows: _scaled(grad[rows], row[rows], column), step_size, decay, key)
        return
    blocks = row_blocks(grad) if layout.plain else [slice(0, grad.shape[0])]
    for rows in blocks:
        part = weight[rows] if len(blocks) > 1 else weight
        scratch = workspace.take("scratch", grad[rows])
        exact = part if part.dtype == scratch.dtype else workspace.take("exact", part).copy_(part)
        if decay != 1:
            exact.mul_(decay)
        scale_rows_(grad[rows], row[rows], scratch)
        layout.as_matrix(exact).addcmul_(scratch, column.unsqueeze(-2), value=-step_size)
        write_rounded_(part, exact, key, scratch=layout.as_matrix(scratch), first_row=rows.start)


def _scaled(grad: Tensor, row: Tensor, column: Tensor) -> Tensor:
    exact = torch.empty_like(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    return scale_rows_(grad, row, exact).mul_(column)

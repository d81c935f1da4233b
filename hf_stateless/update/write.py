r"""Writing an update into a weight: W <- decay W - step_size X, whatever the weight is stored in.

bf16 weights are computed in float32 and written with stochastic rounding where there is a rounding key, else to
nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..norms.sinkhorn import row_blocks, scale_rows_, scaled
from ..weights.noise import RoundingKey
from ..weights.rounding import write_rounded_
from ..weights.stored import StoredWeight
from .feedback import Feedback
from .kernels.choice import Verdict, int8_kernel
from .layout import Layout
from .reads import both, reads_at_once, where_usable


class Workspace:
    """Float buffers that the matrices of one step share: fresh pages for each would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self.notes: dict[str, Any] = {}
        """What is known from one step to the next, by who wrote it."""

    def free(self) -> None:
        """Give the buffers back; the notes stay."""
        self._buffers.clear()

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


@dataclass(frozen=True)
class Judged:
    """What the norms of an update say of it: numbers where the host reads at once, else flags on the device."""

    finite: Verdict
    """Whether the gradient was finite."""
    usable: bool | Tensor
    """Whether the update may be applied."""
    norms: Sequence[float] | Tensor
    """Of the blocks that the matrix is made of."""


def judged(norms: Tensor, device: torch.device) -> list[Judged]:
    """Judge updates by their norms.

    Args:
        norms: (updates, blocks).
        device: where the weights are; there the flags will be.

    Example:
        >>> import torch
        >>> from hf_stateless.update.write import judged
        >>> [one.usable for one in judged(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.device("cpu"))]
        [True, False]
    """
    if reads_at_once(device):
        sizes = [(sum(of_blocks), of_blocks) for of_blocks in norms.tolist()]
        return [Judged(size < math.inf, is_usable(size), of_blocks) for size, of_blocks in sizes]
    norms = norms.to(device)
    finite = (norms < math.inf).all(1)
    usable = finite & (norms > 0).any(1)
    return [Judged(*one) for one in zip(finite.unbind(), usable.unbind(), norms.unbind(), strict=True)]


def key_of_part(key: RoundingKey | None, part: int) -> RoundingKey | None:
    """Return the rounding key of one matrix of a stack."""
    return None if key is None else key + 7919 * part


def write_update_(
    weight: Tensor,
    update: Tensor,
    step_size: float | Tensor,
    decay: float | Tensor,
    key: RoundingKey | None,
    usable: Tensor | None = None,
    feedback: Feedback | None = None,
) -> None:
    """Apply W <- decay W - step_size X; the update is used as working space.

    Args:
        weight: W, updated in place.
        update: X.
        step_size: a number, or a tensor with one on the device.
        decay: the same, or a tensor of the shape of W, but not for weights in a format of their own.
        key: of stochastic rounding; None for rounding to nearest.
        usable: a flag on the device, where W stays as it is unless it is set, whatever X holds.
        feedback: takes in what rounding leaves out of a weight in a format of its own.
    """
    if isinstance(weight, StoredWeight):
        _write_stored_(weight, update, None, step_size, decay, key, usable, feedback)
        return
    exact = weight.to(update.dtype)  # the weight itself where the dtypes agree
    if usable is not None:
        update.masked_fill_(~usable, 0)
        decay = where_usable(usable, decay, exact.dtype)
    if isinstance(decay, Tensor) or decay != 1:
        exact.mul_(decay)
    if isinstance(step_size, Tensor):
        exact.addcmul_(update, step_size.to(exact.dtype), value=-1)
    else:
        exact.add_(update, alpha=-step_size)
    write_rounded_(weight, exact, key, scratch=update)


def write_scaled_(
    weight: Tensor,
    grad: Tensor,
    scalings: tuple[Tensor, Tensor],
    step_size: float | Tensor,
    decay: float | Tensor,
    key: RoundingKey | None,
    layout: Layout,
    workspace: Workspace,
    usable: Tensor | None = None,
    feedback: Feedback | None = None,
) -> None:
    """Apply W <- decay W - step_size diag(r) G diag(c), with G viewed as a matrix and W as it is stored."""
    if isinstance(weight, StoredWeight):
        _write_stored_(weight, grad, scalings, step_size, decay, key, usable, feedback, turned=layout.turned)
        return
    row, column = scalings if usable is None else (torch.where(usable, vector, 0) for vector in scalings)
    if usable is not None:
        decay = where_usable(usable, decay, torch.promote_types(weight.dtype, torch.float32))
    factor: float = 1 if isinstance(step_size, Tensor) else step_size
    column = column * step_size.to(column.dtype) if isinstance(step_size, Tensor) else column
    blocks = row_blocks(grad) if layout.plain else [slice(0, grad.shape[0])]
    for rows in blocks:
        part = weight[rows] if len(blocks) > 1 else weight
        scratch = workspace.take("scratch", grad[rows])
        exact = part if part.dtype == scratch.dtype else workspace.take("exact", part).copy_(part)
        if isinstance(decay, Tensor) or decay != 1:
            exact.mul_(decay)
        if usable is None:
            scale_rows_(grad[rows], row[rows], scratch)
        else:  # NaN times a row of zeros would be NaN
            scratch.copy_(torch.where(usable, grad[rows], 0)).mul_(row[rows].unsqueeze(-1))
        layout.as_matrix(exact).addcmul_(scratch, column.unsqueeze(-2), value=-factor)
        write_rounded_(part, exact, key, scratch=layout.as_matrix(scratch), first_row=rows.start)


def _write_stored_(
    weight: StoredWeight,
    update: Tensor,
    scalings: tuple[Tensor, Tensor] | None,
    step_size: float | Tensor,
    decay: float | Tensor,
    key: RoundingKey | None,
    usable: Tensor | None,
    feedback: Feedback | None,
    *,
    turned: bool = False,
) -> None:
    """Have a weight in a format of its own updated: by X, or by G where X = diag(r) G diag(c), which may be turned."""
    assert isinstance(step_size, Tensor) or not isinstance(decay, Tensor)
    if weight.ndim > 2:
        updates = update.flatten(0, -3)
        vectors = list(zip(*(vector.flatten(0, -2) for vector in scalings), strict=True)) if scalings else None
        for i, matrix in enumerate(weight.matrices()):
            one, signal = (vectors[i], vectors[i][0].any()) if vectors else (None, updates[i].any())
            if reads_at_once(signal.device) and not signal:
                continue  # without a gradient not even a decay
            may = None if reads_at_once(signal.device) else both(signal, usable)
            noise = key_of_part(key, weight.first_matrix + i)
            fed = feedback.of_matrix(i) if feedback else None
            _write_stored_(matrix, updates[i], one, step_size, decay, noise, may, fed, turned=turned)
        return
    stored = (update.mT, scalings[::-1]) if turned and scalings else (update, scalings)
    kernel = None if feedback else int8_kernel(weight, stored[0], stored[1][0] if stored[1] else None)
    flag = {} if usable is None else {"usable": usable}
    if kernel:
        kernel(weight, *stored, step_size, decay, key, **flag)
        return

    def rows_of(rows: slice) -> Tensor:
        if scalings and turned:  # by r first: G diag(c) may leave float32
            return scaled(update[:, rows], scalings[0], scalings[1][rows]).mT
        return scaled(update[rows], scalings[0][rows], scalings[1]) if scalings else update[rows]

    lost = feedback.lost(rows_of, step_size) if feedback else None
    weight.write_rows_(rows_of, step_size, decay, key, lost=lost, **flag)

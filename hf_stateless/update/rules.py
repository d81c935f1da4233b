r"""In-place updates of weights: pure functions of weight, gradient, state and hyperparameters.

All have the decoupled form W <- (1 - lr weight_decay) W - step X. bf16 weights are computed in float32 and written
with stochastic rounding when a rounding key is given, else to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..norms.chain import SINKHORN_CHAIN, multi_normalize
from ..norms.sinkhorn import row_blocks, scale_rows_, scalings_by_blocks, sinkhorn_scalings, sr_sinkhorn
from ..weights.int8.weight import Int8Weight
from ..weights.int8.write import write_int8_
from ..weights.rounding import write_rounded_
from .kernels.choice import use_triton
from .kernels.cpu_sinkgd import fits as fits_cpu
from .kernels.cpu_sinkgd import sinkgd_steps_
from .kernels.int8 import fits_int8, int8_update_
from .kernels.sinkgd import fits, sinkgd_update_


def as_matrix(tensor: Tensor, layout: str) -> Tensor:
    """View a weight or gradient as (..., out_features, in_features).

    Args:
        tensor: the stored tensor.
        layout: `out_in`, `in_out` (GPT-2's Conv1D, some experts), `conv` (out, in, kernel...) or `vector` (one row).

    Example:
        >>> import torch
        >>> from hf_stateless.update.rules import as_matrix
        >>> as_matrix(torch.zeros(8, 3, 2, 2), "conv").shape
        torch.Size([8, 12])
    """
    if layout == "conv":
        return tensor.flatten(1)
    if layout == "vector":
        return tensor.reshape(1, -1)
    return tensor.mT if layout == "in_out" else tensor


class Workspace:
    """Float buffers that the matrices of one step share: fresh pages for each would cost more than the arithmetic.

    Example:
        >>> import torch
        >>> from hf_stateless.update.rules import Workspace
        >>> Workspace().take("squares", torch.ones(2, 3, dtype=torch.bfloat16)).dtype
        torch.float32
    """

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


def takes_kernels(
    weights: Sequence[Tensor], *, layout: str, norms: Sequence[str], num_iterations: float, **_: Any
) -> bool:
    """Tell whether SinkGD kernels update weights of one shape by the gradients they hold, however many there are.

    Args:
        weights: as for `multinorm_update_`.
        layout: how the weights are stored.
        norms: the chain.
        num_iterations: how often it runs.

    Example:
        >>> import torch
        >>> from hf_stateless.update.rules import takes_kernels
        >>> W = torch.ones(2, 2)
        >>> W.grad = torch.ones(2, 2)
        >>> takes_kernels([W], layout="out_in", norms=("row_l2", "col_l2"), num_iterations=5)  # small, on CPU
        False
    """
    grads: list[Tensor] = [w.grad for w in weights]  # type: ignore[misc]
    return _kernel_of(weights, grads, layout, {"norms": norms, "num_iterations": num_iterations}) is not None


def _kernel_of(
    weights: Sequence[Tensor], grads: Sequence[Tensor], layout: str, chain: Mapping[str, Any]
) -> Callable[..., list[bool] | Tensor] | None:
    """Return what takes the SinkGD step of these weights of one shape in place of torch, if anything does."""
    if tuple(chain["norms"]) != SINKHORN_CHAIN:
        return None
    if use_triton((weights[0], grads[0])):
        return (
            partial(sinkgd_update_, layout=layout) if fits(weights, grads, layout, chain["num_iterations"]) else None
        )
    return sinkgd_steps_ if fits_cpu(weights, grads, layout, chain["num_iterations"]) else None


def multinorm_update_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    keys: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    lr_scale: float,
    weight_decay: float,
    layout: str,
    place: Callable[[Tensor, int], Tensor] | None = None,
    workspace: Workspace | None = None,
    **chain: Any,
) -> list[bool] | Tensor:
    r"""Update weights of one shape by their multi-normalized gradients: W <- (1 - lr wd) W - lr lr_scale X.

    X = multi_normalize(G) has entry RMS 1. A weight whose gradient is zero or not finite is left unchanged, decay
    included: a gradient without signal must not become a full-size step. State kept: none.

    Args:
        weights: (..., m, n) tensors of one shape, updated in place.
        grads: their gradients; stacked into one batch if there are several.
        keys: rounding keys for bf16 weights, or None for rounding to nearest.
        lr: learning rate (per step). Kernels read a tensor on their device there, so that a graph can be captured.
        lr_scale: factor on the learning rate of X, not of the decay.
        weight_decay: decoupled decay, per unit of learning rate.
        layout: how the weight is stored, see `as_matrix`.
        place: takes the update in the shape of the gradient and its position in the list, and returns the part that
            belongs to the weight; for weights of which only a shard is here.
        workspace: buffers shared with other calls of the same step.
        chain: `norms`, `num_iterations` and the whitening options of `multi_normalize`.

    Returns:
        For each weight, whether its gradient was finite: from kernels a tensor on the device, for which nobody waited.

    Example:
        >>> import torch
        >>> from hf_stateless.update.rules import multinorm_update_
        >>> W = torch.zeros(1, 2)
        >>> multinorm_update_([W], [torch.tensor([[3.0, -4.0]])], None, lr=0.1, lr_scale=1.0, weight_decay=0.0,
        ...                   layout="out_in", norms=("sign",), num_iterations=1)
        [True]
        >>> W
        tensor([[-0.1000,  0.1000]])

    References:
        https://huggingface.co/papers/2502.06742, Algorithms 2 (MNGD) and 4 (SinkGD).
    """
    kernel = None if place else _kernel_of(weights, grads, layout, chain)
    outcome: list[bool] | Tensor = [False] * len(weights)
    if kernel:
        rate = (
            lr.float() if isinstance(lr, Tensor) and lr.device == grads[0].device != torch.device("cpu") else float(lr)
        )
        factors = {"step_size": rate * lr_scale, "decay": 1 - rate * weight_decay}
        outcome = kernel(weights, grads, keys, **factors, num_iterations=int(chain["num_iterations"]))
        if isinstance(outcome, Tensor) or all(outcome):
            return outcome
    matrices = [as_matrix(grad, layout) for grad in grads]
    step_size, decay = float(lr) * lr_scale, 1 - float(lr) * weight_decay
    if kernel or (len(matrices) == 1 and tuple(chain["norms"]) == SINKHORN_CHAIN and not place and layout != "conv"):
        scalings = {"num_iterations": chain["num_iterations"], "workspace": workspace or Workspace()}
        return [
            done or _sinkhorn_update_(weight, matrix, keys[i] if keys else None, layout, step_size, decay, **scalings)
            for i, (weight, matrix, done) in enumerate(zip(weights, matrices, outcome, strict=True))
        ]
    batch = matrices[0] if len(matrices) == 1 else torch.stack(matrices)
    updates = multi_normalize(batch, dtype=torch.promote_types(batch.dtype, torch.float32), **chain)
    updates = updates.unsqueeze(0) if len(matrices) == 1 else updates
    sizes = torch.linalg.vector_norm(updates.flatten(1), dim=1).tolist()
    for i, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        if 0 < size < float("inf"):
            update = updates[i].mT if layout == "in_out" else updates[i].reshape(grads[i].shape)
            write_update_(weight, place(update, i) if place else update, step_size, decay, keys[i] if keys else None)
    return [size < float("inf") for size in sizes]


def _sinkhorn_update_(
    weight: Tensor,
    grad: Tensor,
    key: Tensor | None,
    layout: str,
    step_size: float,
    decay: float,
    *,
    num_iterations: int,
    workspace: Workspace,
) -> bool:
    """Apply the SinkGD step of one matrix from its two vectors, without forming the normalised gradient."""
    blocks = row_blocks(grad)
    if len(blocks) > 1:
        row, column = scalings_by_blocks(grad, num_iterations, blocks)
    else:
        row, column = sinkhorn_scalings(grad, num_iterations, scratch=workspace.take("scratch", grad))
    size = float(row.amax() + 0 * column.amax())  # sums of finite factors could overflow
    if 0 < size < float("inf"):
        write_scaled_(weight, grad, row, column, step_size, decay, key, layout, workspace)
    return size < float("inf")


def write_scaled_(
    weight: Tensor,
    grad: Tensor,
    row: Tensor,
    column: Tensor,
    step_size: float,
    decay: float,
    key: Tensor | None,
    layout: str,
    workspace: Workspace,
) -> None:
    """Apply W <- decay W - step_size diag(row) G diag(column), with G viewed as a matrix and W as it is stored."""
    if isinstance(weight, Int8Weight):
        if fits_int8(weight, grad) and row.dtype == torch.float32 and use_triton((weight, grad)):
            int8_update_(weight, grad, (row, column), step_size, decay, key)
        else:
            write_int8_(weight, lambda rows: _scaled(grad[rows], row[rows], column), step_size, decay, key)
        return
    for rows in row_blocks(grad) if layout == "out_in" else [slice(0, grad.shape[0])]:
        part = weight[rows] if layout == "out_in" else weight
        scratch = workspace.take("scratch", grad[rows])
        exact = part if part.dtype == scratch.dtype else workspace.take("exact", part).copy_(part)
        if decay != 1:
            exact.mul_(decay)
        scale_rows_(grad[rows], row[rows], scratch)
        as_matrix(exact, layout).addcmul_(scratch, column.unsqueeze(-2), value=-step_size)
        write_rounded_(part, exact, key, scratch=as_matrix(scratch, layout), first_row=rows.start)


def _scaled(grad: Tensor, row: Tensor, column: Tensor) -> Tensor:
    exact = torch.empty_like(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    return scale_rows_(grad, row, exact).mul_(column)


def write_update_(weight: Tensor, update: Tensor, step_size: float, decay: float, key: Tensor | None) -> None:
    """Apply W <- decay W - step_size X; the update is used as working space where the weight is bf16."""
    if isinstance(weight, Int8Weight):
        if fits_int8(weight, update) and use_triton((weight, update)):
            int8_update_(weight, update, None, step_size, decay, key)
        else:
            write_int8_(weight, lambda rows: update[rows], step_size, decay, key)
        return
    exact = weight.to(update.dtype)  # the weight itself where the dtypes agree
    if decay != 1:
        exact.mul_(decay)
    exact.add_(update, alpha=-step_size)
    write_rounded_(weight, exact, key, scratch=update)


def sinkhorn_momentum_update_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    key: Tensor | None,
    *,
    lr: float,
    lr_scale: float,
    weight_decay: float,
    momentum: float,
    num_iterations: float,
    row_threshold: float,
) -> None:
    r"""Sinkhorn-balanced Nesterov momentum for embedding tables W in R^{V x d}: one buffer instead of AdamW's two.

    B <- mu B + (1 - mu) G; N = (1 - mu) G + mu B; rows with a norm of at most `row_threshold` times the mean row norm
    are masked, then SR-Sinkhorn with an odd number of half steps (it starts and ends on rows), so that every active
    row has the norm sqrt(d); W <- (1 - lr wd) W - lr lr_scale X. State kept: the buffer, in the parameter's dtype.

    Args:
        param: (V, d) weight, updated in place.
        grad: its gradient.
        momentum_buffer: B, updated in place.
        key: rounding key of a bf16 weight, or None.
        lr: learning rate.
        lr_scale: gamma of the report, 0.18.
        weight_decay: decoupled decay, per unit of learning rate.
        momentum: mu, 0.95.
        num_iterations: 5.5 for eleven half steps.
        row_threshold: tau, 1e-3: tokens that were not seen for long get no step.

    Example:
        >>> import torch
        >>> from hf_stateless.update.rules import sinkhorn_momentum_update_
        >>> W, B = torch.zeros(2, 2), torch.zeros(2, 2)
        >>> sinkhorn_momentum_update_(W, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), B, None, lr=1.0, lr_scale=0.18,
        ...                           weight_decay=0.0, momentum=0.95, num_iterations=5.5, row_threshold=1e-3)
        >>> W
        tensor([[-0.1800, -0.1800],
                [ 0.0000,  0.0000]])

    References:
        The optimizer of embedding tables in the DeepSeek-V4.1-Flash report, after
        https://huggingface.co/papers/2502.06742, Algorithm 3.
    """
    exact_grad = grad.to(torch.promote_types(param.dtype, torch.float32))
    buffer = momentum_buffer.to(exact_grad.dtype).lerp(exact_grad, 1 - momentum)
    direction = exact_grad.lerp(buffer, momentum)
    momentum_buffer.copy_(buffer)
    row_norms = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    direction.masked_fill_(row_norms <= row_threshold * row_norms.mean(-2, keepdim=True), 0)
    update = sr_sinkhorn(direction, num_iterations)
    write_update_(param, update, lr * lr_scale, 1 - lr * weight_decay, key)

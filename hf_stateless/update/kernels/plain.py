"""Updates of plain weights by one kernel for all of a shape: from two vectors and the gradient, or from X itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...norms.parts import as_batch
from ...weights.noise import RoundingKey
from ...weights.stored import StoredWeight
from ..layout import Layout
from .launch import DTYPES, aligned, element, on_device, pointer_table, power_of_two, start


# Tiles of a weight, and where it lies across memory: then the first dimension is the contiguous one.
_TILE, _TURNED_TILE = 4096, (64, 64)


def fits_plain(weights: Sequence[Tensor], updates: Tensor, layout: Layout) -> bool:
    """Tell whether the kernel can apply updates to plain weights of one shape; the torch twin takes the others.

    Example:
        >>> import torch
        >>> from hf_stateless.update.kernels.plain import fits_plain
        >>> from hf_stateless.update.layout import layout_of
        >>> fits_plain([torch.ones(2, 3)], torch.ones(1, 2, 3), layout_of("out_in"))
        True
    """
    return (
        layout.scales
        and layout.blocks == 1
        and updates.dtype in DTYPES
        and updates[0].numel() > 0
        and 1 in updates.stride()[-2:]
        and not any(isinstance(weight, StoredWeight) for weight in weights)
        and all(weight.dtype in DTYPES and is_stack(weight, layout) for weight in weights)
        and len({(weight.stride(), weight.dtype) for weight in weights}) == 1
    )


def plain_update_(
    weights: Sequence[Tensor],
    updates: Tensor,
    usable: Tensor,
    keys: Sequence[RoundingKey] | None,
    *,
    step_size: float | Tensor,
    decay: float | Tensor,
    layout: Layout,
) -> None:
    r"""W <- decay W - step_size X for weights of one shape, in one launch and one for each sixteen of them.

    Args:
        weights: for which `fits_plain` is true, updated in place.
        updates: X of each, (weights, ..., m, n) with m = out_features.
        usable: for each weight a flag on the device, where it keeps every byte unless it is set.
        keys: rounding keys, or None for rounding to nearest.
        step_size: factor of X; a one-element float32 tensor is read on the device.
        decay: factor of W, of the same kind.
        layout: how the weights are stored.
    """
    with on_device(updates):
        stack = as_stack(weights[0], layout).shape
        each, states = updates.unbind(), usable.to(torch.int32).repeat_interleave(stack[0])
        values = None if keys is None else torch.cat([key.value for key in keys])
        launch_update(
            weights, each, each[0].reshape(stack), pointer_table(each), None, states, values, (step_size, decay),
            range(states.numel()), layout,
        )  # fmt: skip


def launch_update(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    update: Tensor,
    update_table: Tensor,
    vectors: tuple[Tensor, Tensor] | None,
    states: Tensor,
    keys: Tensor | None,
    factors: tuple[float | Tensor, float | Tensor],
    part: range,
    layout: Layout,
) -> None:
    """Write some matrices of some weights; with `vectors` r and c, what is given as X is G, and X = diag(r) G diag(c).

    Args:
        weights: of one shape and the same strides.
        updates: of each weight.
        update: the first of them as a stack (matrices, m, n).
        update_table: their addresses.
        vectors: r and c of all matrices, or None.
        states: what is known of each matrix, maybe in several parts: a weight moves where the largest of its own is 1.
        keys: one int32 for each weight, or None.
        factors: of X and of W; as tensors they are read on the device.
        part: numbers of the matrices, counted over all weights.
        layout: how the weights are stored.
    """
    from .triton_sinkgd import apply_update

    weight = as_stack(weights[0], layout)
    stack, m, n = weight.shape
    if weight.stride(-1) != 1 and weight.stride(-2) == 1:
        block_m, block_n = power_of_two(m, _TURNED_TILE[0]), power_of_two(n, _TURNED_TILE[1])
    else:
        block_n = power_of_two(n, 1024)
        block_m = power_of_two(m, _TILE // block_n)
    tiles_m, tiles_n = -(-m // block_m), -(-n // block_n)
    row, column = vectors or (None, None)
    start(
        apply_update, len(part) * tiles_m * tiles_n,
        update_table, pointer_table(weights), row, column, states, keys, *factors,
        part.start, stack, update.stride(0), weight.stride(0), *update.stride()[1:], *weight.stride()[1:], m, n,
        states.numel() // len(weights), tiles_m, tiles_n,
        GRAD=element(update.dtype), WEIGHT=element(weight.dtype), SCALED=vectors is not None,
        ALIGNED=aligned(updates) and aligned(weights), HYPER_ON_DEVICE=isinstance(factors[0], Tensor),
        STOCHASTIC=keys is not None and weight.dtype == torch.bfloat16, TURNED=layout.turned,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
    )  # fmt: skip


def is_stack(tensor: Tensor, layout: Layout) -> bool:
    """Tell whether a tensor is a stack of matrices at equal distances."""
    if layout.any_length:
        return tensor.is_contiguous()
    return tensor.ndim in (2, 3) or (tensor.ndim > 3 and tensor.is_contiguous())


def as_stack(tensor: Tensor, layout: Layout) -> Tensor:
    """View a tensor as (matrices, m, n), m = out_features."""
    if layout.any_length:
        return tensor.view(1, 1, -1)
    return layout.as_matrix(as_batch(tensor))

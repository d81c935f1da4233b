"""Updates of 8-bit weights by a kernel, so that no float matrix exists; groups may have any length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...weights.noise import RoundingKey
from ...weights.stored import StoredWeight
from .launch import DTYPES, element, on_device, pointer_table, power_of_two, start


# Weights that a program holds in float32, and its groups at most.
_TILE, _GROUPS = 4096, 64


def fits_int8(weight: StoredWeight, update: Tensor) -> bool:
    """Tell whether the kernel can apply an update to an 8-bit weight; the torch twin takes the others.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.int8.weight import Int8Weight
        >>> from hf_stateless.update.kernels.int8 import fits_int8
        >>> weight = Int8Weight(torch.zeros(1, 2, dtype=torch.int8), torch.ones(1, 1, dtype=torch.bfloat16))
        >>> fits_int8(weight, torch.ones(1, 2)), fits_int8(weight, torch.ones(1, 2, dtype=torch.float64))
        (True, False)
    """
    return (
        all(t.is_contiguous() for t in weight.stored)
        and update.dtype in DTYPES
        and update.ndim == 2
        and update.numel() > 0
    )


def int8_update_(
    weight: StoredWeight,
    update: Tensor,
    scalings: tuple[Tensor, Tensor] | None,
    step_size: float | Tensor,
    decay: float | Tensor,
    key: RoundingKey | None,
    usable: Tensor | None = None,
) -> None:
    r"""W <- decay W - step_size X on codes and scales, in one launch; a group without change keeps every byte.

    Args:
        weight: (out, in) for which `fits_int8` is true, updated in place.
        update: X, or G with X = diag(r) G diag(c).
        scalings: r and c, or None where X itself is given.
        step_size: factor of X; a one-element float32 tensor is read on the device.
        decay: factor of W, of the same kind.
        key: rounding key, or None for rounding to nearest.
        usable: a flag on the device; the weight keeps every byte unless it is set.
    """
    with on_device(update):
        states = None if usable is None else usable.to(torch.int32).view(1, 1)
        vectors = (*(scalings or (None, None)), states)
        value = None if key is None else key.value
        launch_int8([weight], pointer_table([update]), update, vectors, value, step_size, decay, slice(0, 1))


def launch_int8(
    weights: Sequence[StoredWeight],
    update_table: Tensor,
    update: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
    keys: Tensor | None,
    step_size: float | Tensor,
    decay: float | Tensor,
    part: slice,
) -> None:
    """Launch the update of some weights of one shape.

    Args:
        weights: in int8; of those that are cut over ranks one at a time.
        update_table: addresses of X or G for each.
        update: one of them, for its dtype and strides.
        vectors: r, c and the states of gradients, (weights, ...) each, or None.
        keys: rounding keys, (weights,), or None.
        step_size: factor of X.
        decay: factor of W.
        part: which of the weights.
    """
    from .triton_int8 import apply_int8

    (m, n), groups = update.shape, weights[0].stored[1].shape[1]
    row, column, states = vectors
    length = n // groups
    block_length = power_of_two(length, 1 << 30)
    block_groups = power_of_two(m * groups, max(1, min(_TILE // block_length, _GROUPS)))
    programs = -(-m * groups // block_groups)
    start(
        apply_int8, (part.stop - part.start) * programs,
        *(pointer_table([t.data for t in tensors]) for tensors in zip(*(w.stored for w in weights), strict=True)),
        update_table, row, column, states, keys, step_size, decay, part.start, weights[0].first_row, *update.stride(),
        m, n, groups, length, 0 if states is None else states.shape[1], programs,
        UPDATE=element(update.dtype), SCALED=row is not None, CHECKED=states is not None,
        HYPER_ON_DEVICE=isinstance(step_size, Tensor), STOCHASTIC=keys is not None,
        BLOCK_GROUPS=block_groups, BLOCK_LENGTH=block_length, num_warps=8 if block_length > _TILE else 4,
    )  # fmt: skip

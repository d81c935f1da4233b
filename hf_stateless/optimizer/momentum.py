r"""Momentum before the normalisation: a moving average of gradients that stands for the gradient, in 8 bits if wanted.

B <- mu B + (1 - mu) G;  D = (1 - mu) G + mu B (Nesterov);  X = multi_normalize(D). In int8, B takes one byte and
a bfloat16 scale for up to 128 entries of a row. It is rounded stochastically, so that E[B] is exact and gradients
below half a code still count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..ranks.placement import local_shard
from ..weights.int8.codes import dequantize_matrix, group_length, requantize_
from ..weights.noise import RoundingKey
from ..weights.rounding import write_rounded_


_NAMES = ("momentum_buffer", "momentum_scale")
_GROUP = 128
# Elements that are in float32 at once, in whole rows.
_BLOCK = 1 << 22
# The noise of what is fed back is apart from that of the average before it.
_FED = 1 << 30


def has_momentum(group: Mapping[str, Any]) -> bool:
    """Tell whether the matrices of a parameter group are updated by an average of their gradients."""
    return "norms" in group and bool(group.get("momentum"))


def momentum_state(param: Tensor, dtype: str) -> dict[str, Tensor]:
    """Return the average of no gradient yet: zeros of the shape of a parameter, cut over ranks as it is.

    Args:
        param: (..., rows, columns); 8-bit weights too.
        dtype: `int8`, `bfloat16` or `float32`.

    Raises:
        ValueError: int8 for a parameter whose rows are cut over ranks.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.momentum import momentum_state
        >>> {name: (tuple(t.shape), t.dtype) for name, t in momentum_state(torch.ones(3, 256), "int8").items()}
        {'momentum_buffer': ((3, 256), torch.int8), 'momentum_scale': ((3, 2), torch.bfloat16)}
    """
    buffer = _zeros(param, getattr(torch, dtype))
    if dtype != "int8":
        return {"momentum_buffer": buffer}
    if isinstance(param, DTensor) and any(p.is_shard(param.ndim - 1) for p in param.placements):
        raise ValueError(
            f"momentum_dtype=int8 has scales for whole groups of a row, but rows are cut over ranks "
            f"({param.placements}): shard along the first dimension, or type momentum_dtype=bfloat16."
        )
    groups = param.shape[-1] // group_length(param.shape[-1], _GROUP)
    return {"momentum_buffer": buffer, "momentum_scale": _zeros(param.narrow(-1, 0, groups), torch.bfloat16)}


def momentum_bytes(shape: Sequence[int], dtype: str) -> int:
    """Count the bytes of `momentum_state`.

    Example:
        >>> from hf_stateless.optimizer.momentum import momentum_bytes
        >>> momentum_bytes((3, 256), "int8"), momentum_bytes((3, 256), "bfloat16")
        (780, 1536)
    """
    scales = math.prod(shape) // group_length(shape[-1], _GROUP) if dtype == "int8" else 0
    return math.prod(shape) * int(getattr(torch, dtype).itemsize) + 2 * scales


def momentum_direction_(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    key: RoundingKey | None,
    momentum: float,
    *,
    still: Tensor | None = None,
    usable: Tensor | None = None,
) -> Tensor:
    r"""Take a gradient into the average, and return the direction that stands for it: D = (1 - mu) G + mu B.

    The gradient itself is not modified. With a key what is stored is B in expectation, without one B to nearest; the
    direction is made of what was read and of G, so the rounding reaches it in the next step only.

    Args:
        param: for how it is cut over ranks; all arguments may be DTensors.
        grad: cut like the parameter; finite, unless `usable` says that it is not.
        state: of `momentum_state`, updated in place.
        key: rounding key, or None for rounding to nearest.
        momentum: mu, in [0, 1).
        still: where B stays and D is zero: what this rank holds of a mask of the parameter's shape.
        usable: a flag on the device, where all of B stays and D is zero unless it is set.

    Returns:
        D in the shape and dtype of the gradient, a DTensor where the parameter is one.

    Raises:
        ValueError: the gradient is spread over ranks in another way than the parameter.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.momentum import momentum_direction_, momentum_state
        >>> W, state = torch.zeros(1, 2), momentum_state(torch.zeros(1, 2), "float32")
        >>> momentum_direction_(W, torch.tensor([[1.0, -2.0]]), state, None, 0.9)
        tensor([[ 0.1900, -0.3800]])
        >>> state["momentum_buffer"]
        tensor([[ 0.1000, -0.2000]])

    References:
        Momentum before the orthogonalisation as in Muon, https://huggingface.co/papers/2502.16982, section 2.1.
    """
    if isinstance(param, DTensor) and (not isinstance(grad, DTensor) or grad.placements != param.placements):
        raise ValueError(
            f"momentum needs gradients that are spread over ranks as their weights are ({param.placements}), got "
            f"{getattr(grad, 'placements', 'a plain tensor')}: redistribute them, or leave out momentum."
        )
    part = local_shard(grad)
    direction = torch.empty(part.shape, dtype=part.dtype, device=part.device)
    if part.numel():
        matrix = part.reshape(-1, part.shape[-1])
        mask = None if still is None else still.to(part.device).reshape(matrix.shape)
        if usable is not None:
            mask = (~usable).expand(matrix.shape) if mask is None else mask | ~usable
        _take_in_(_stored_rows(state), matrix, direction.view(matrix.shape), key, momentum, mask)
    if not isinstance(param, DTensor):
        return direction
    return DTensor.from_local(
        direction, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def feed_back_(
    state: Mapping[str, Tensor], key: RoundingKey | None, momentum: float, rows: slice, lacked: Tensor
) -> None:
    r"""Put into the average what a direction lacked, so that the directions to come have all of it together.

    B <- B + (1 - mu) / mu^2 E: the next directions have (1 - mu) mu^k E, k = 0, 1, ..., whose sum is E.

    Args:
        state: of `momentum_state`, updated in place.
        key: rounding key of this step, or None for rounding to nearest.
        momentum: mu, in (0, 1).
        rows: of what this rank holds, counted through all matrices of a stack.
        lacked: E of these rows in float32.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.momentum import feed_back_, momentum_state
        >>> state = momentum_state(torch.zeros(1, 2), "float32")
        >>> feed_back_(state, None, 0.5, slice(0, 1), torch.tensor([[1.0, -2.0]]))
        >>> state["momentum_buffer"]
        tensor([[ 2., -4.]])

    References:
        ECO, https://huggingface.co/papers/2601.22101, for momentum that is not normalised.
    """
    held = _stored_rows(state)
    average = _read(held, rows, torch.float32).add(lacked, alpha=(1 - momentum) / momentum**2)
    if "momentum_scale" in held or held["momentum_buffer"].dtype != average.dtype:
        _write_(held, rows, average, None if key is None else key + (_FED + rows.start))
    else:
        held["momentum_buffer"][rows] = average


def fit_momentum_(state: dict[str, Any], param: Tensor, group: Mapping[str, Any]) -> None:
    """Give the average in a loaded state the dtype that its group asks for, or drop it where there is no momentum.

    Args:
        state: of one parameter, changed in place.
        param: the parameter.
        group: its group.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.momentum import fit_momentum_
        >>> state = {"momentum_buffer": torch.ones(1, 2)}
        >>> group = {"norms": ("sign",), "momentum": 0.9, "momentum_dtype": "int8"}
        >>> fit_momentum_(state, torch.zeros(1, 2), group)
        >>> state["momentum_buffer"]
        tensor([[126, 126]], dtype=torch.int8)
    """
    if "norms" not in group or "momentum_buffer" not in state:
        return
    wanted = getattr(torch, group["momentum_dtype"]) if has_momentum(group) else None
    if state["momentum_buffer"].dtype == wanted:
        return
    old = _stored_rows({name: state.pop(name) for name in _NAMES if name in state})
    if wanted is None:
        return
    state.update(momentum_state(param, group["momentum_dtype"]))
    new, exact = _stored_rows(state), _read(old, slice(None), torch.float32)
    if "momentum_scale" not in new:
        new["momentum_buffer"].copy_(exact)
    elif exact.numel():
        requantize_(new["momentum_buffer"], new["momentum_scale"], exact, None)


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _stored_rows(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """View what this rank holds of the average as matrices."""
    local = {name: local_shard(state[name]) for name in _NAMES if name in state}
    return {name: tensor.view(-1, tensor.shape[-1]) for name, tensor in local.items()}


def _take_in_(
    rows: Mapping[str, Tensor],
    grad: Tensor,
    direction: Tensor,
    key: RoundingKey | None,
    momentum: float,
    still: Tensor | None,
) -> None:
    """Update average and direction, some rows at a time: no float32 copy of a large matrix is ever whole."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    at_once = max(1, _BLOCK // grad.shape[1])
    for number, first in enumerate(range(0, len(grad), at_once)):
        part = slice(first, first + at_once)
        exact = grad[part].to(wide)
        average = _read(rows, part, wide)
        if still is not None:
            exact = torch.where(still[part], average, exact)  # the average of B and B is B
        average.lerp_(exact, 1 - momentum)
        direction[part] = exact.lerp(average, momentum)
        if still is not None:
            direction[part].masked_fill_(still[part], 0)
        # The weight of this step is rounded with the key itself.
        _write_(rows, part, average, None if key is None else key + (1 + number))


def _read(rows: Mapping[str, Tensor], part: slice, dtype: torch.dtype) -> Tensor:
    """Return rows of the average in a float dtype; the buffer itself where that is its own."""
    buffer = rows["momentum_buffer"][part]
    return (
        dequantize_matrix(buffer, rows["momentum_scale"][part], dtype)
        if "momentum_scale" in rows
        else buffer.to(dtype)
    )


def _write_(rows: Mapping[str, Tensor], part: slice, exact: Tensor, key: RoundingKey | None) -> None:
    """Store rows of the average; they are lost."""
    buffer = rows["momentum_buffer"][part]
    if "momentum_scale" in rows:
        requantize_(buffer, rows["momentum_scale"][part], exact.float(), key)
    else:
        write_rounded_(buffer, exact, key)

r"""Rules for embeddings and heads that keep a second moment for each row, each column, or both, and no first moment.

A table of V tokens and n features has V n gradients, but the size of a gradient depends mostly on its token and its
feature. So V, n or V + n averages of squares do for AdamW's V n, and a row that a batch lacks costs nothing: neither
its averages nor its weights move.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..ranks.placement import local_shard, sum_over_cut, zeros_along
from ..update.kernels.choice import Verdict
from ..update.rate import learning_rate
from ..update.reads import reads_at_once
from ..update.write import Workspace
from ..weights.noise import RoundingKey
from ..weights.rounding import write_rounded_
from ..weights.stored import StoredWeight
from .options import OPTIONS
from .rule import Entry, Host, Rule, counter, keys_of


# Elements that are worked on at once, in whole rows: on a CPU what its caches hold.
_BLOCK, _BLOCK_ON_CPU = 1 << 24, 1 << 18


def moments_state(param: Tensor, *, rows: bool, columns: bool) -> dict[str, Tensor]:
    """Return averages of no gradient yet: for each row, each column, or both, cut over ranks as the parameter is.

    Args:
        param: (V, n) table.
        rows: keep an average for each row, and how many gradients are in it.
        columns: keep an average for each column, and how many gradients are in all of them.

    Raises:
        ValueError: a parameter that has not two dimensions.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.table_moments import moments_state
        >>> state = moments_state(torch.ones(5, 3), rows=True, columns=True)
        >>> {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.numel() > 1}
        {'row_moment': (5, 1), 'row_weight': (5, 1), 'column_moment': (1, 3)}
    """
    if param.ndim != 2:
        raise ValueError(
            f"Moments of rows and columns are for tables of two dimensions, got the shape {tuple(param.shape)}: "
            "type algorithm='adamw' for its group."
        )
    dtype, state = torch.promote_types(param.dtype, torch.float32), {"step": counter(param)}
    if rows:
        state |= {name: zeros_along(param, 0, dtype) for name in ("row_moment", "row_weight")}
    if columns:
        one = torch.zeros(1, dtype=dtype, device=param.device)
        state |= {"column_moment": zeros_along(param, 1, dtype), "column_weight": one}
    return state | ({"table_moment": one.clone()} if rows and columns else {})


def moments_update_(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    key: RoundingKey | None,
    workspace: Workspace,
    *,
    lr: float | Tensor,
    weight_decay: float,
    table_beta2: float,
    eps: float,
) -> Verdict:
    r"""Divide a gradient by the root of averages of its squares, in the rows that have one: no first moment.

    With r_i the mean square of row i and c_j that of column j over the rows that have a gradient, W_ij moves by
    lr G_ij / (sqrt(V_ij) + eps), where V_ij is R_i, C_j, or R_i C_j / mean(C); with both, eps is added to sqrt(R_i).

    An average takes a square in by v <- v + (x - v) / s with s <- 1 + beta2 s. This is AdamW's average after its bias
    correction, for which each row would need the number of its gradients. So s is the one number more that it keeps.

    A row without gradient is left alone: no step, no decay, no change of averages. So is the whole table if its
    gradient has NaN, infinity, or squares beyond float32.

    Args:
        param: (V, n) table, updated in place; under FSDP2 a DTensor, and this a collective.
        grad: its gradient.
        state: of `moments_state`, updated in place.
        key: rounding key of a bf16 weight, or None.
        workspace: for float32 copies of some rows.
        lr: learning rate.
        weight_decay: decoupled decay, per unit of learning rate.
        table_beta2: beta2 of the averages.
        eps: what is added to the root.

    Returns:
        Whether the gradient could be used: a flag on the device, unless that is the CPU.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.table_moments import moments_state, moments_update_
        >>> from hf_stateless.update.write import Workspace
        >>> W = torch.ones(3, 2)
        >>> grad = torch.tensor([[3.0, -3.0], [0.0, 0.0], [0.0, 5.0]])
        >>> moments_update_(W, grad, moments_state(W, rows=True, columns=False), None, Workspace(), lr=0.1,
        ...                 weight_decay=0.0, table_beta2=0.99, eps=1e-8)
        True
        >>> W  # the second row had no gradient
        tensor([[0.9000, 1.1000],
                [1.0000, 1.0000],
                [1.0000, 0.8586]])

    References:
        Row and column averages as in Adafactor, https://huggingface.co/papers/1804.04235, Algorithm 4; without first
        moment for embeddings and heads, Ember, https://huggingface.co/papers/2607.01455.
    """
    if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    weight, part = local_shard(param), local_shard(grad)
    usable, of_rows, of_columns = _take_in_(param, part, state, table_beta2, eps, workspace)
    at_once = reads_at_once(weight.device)
    if at_once and not usable:
        return False
    if isinstance(weight, StoredWeight):
        _write_stored_(weight, part, (of_rows, of_columns), key, lr, weight_decay, usable)
        return True if at_once else usable
    keep = 1 - lr * weight_decay * (of_rows > 0).to(of_rows.dtype) if weight_decay else None
    for rows in _blocks(weight):
        now = weight[rows]
        update = part[rows] if at_once else part[rows].where(usable, 0)
        if of_columns is not None:
            update = torch.mul(update, of_columns, out=workspace.take("scratch", now))
        exact = now if now.dtype == of_rows.dtype else workspace.take("exact", now).copy_(now)
        if keep is not None:
            exact.mul_(keep[rows])
        if isinstance(lr, Tensor):
            exact.addcmul_(update, of_rows[rows] * lr, value=-1)
        else:
            exact.addcmul_(update, of_rows[rows], value=-lr)
        write_rounded_(now, exact, key, first_row=rows.start)
    return True if at_once else usable


def _write_stored_(
    weight: StoredWeight,
    grad: Tensor,
    factors: tuple[Tensor, Tensor | None],
    key: RoundingKey | None,
    lr: float | Tensor,
    weight_decay: float,
    usable: bool | Tensor,
) -> None:
    """Write the step of a table in a format of its own; the decay of its rows is a part of the update."""
    of_rows, of_columns = factors

    def update(rows: slice) -> Tensor:
        step = grad[rows].to(of_rows.dtype)
        step = step if isinstance(usable, bool) else step.where(usable, 0)
        step = step * of_rows[rows] if of_columns is None else step.mul(of_columns).mul_(of_rows[rows])
        if weight_decay:
            step.addcmul_(weight.rows(rows), (of_rows[rows] > 0).to(step.dtype), value=weight_decay)
        return step

    weight.write_rows_(update, lr, 1.0, key, usable=None if isinstance(usable, bool) else usable)


def _take_in_(
    param: Tensor, grad: Tensor, state: Mapping[str, Tensor], beta2: float, eps: float, workspace: Workspace
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take the squares of a gradient into the averages, unless they are too large.

    Returns:
        Whether they are not, and the factors on the gradient: (V, 1), zero in rows that are left alone, and (1, n) if
        columns have averages.
    """
    moments = {name: local_shard(tensor).to(grad.device) for name, tensor in state.items()}
    row_sums, column_sums = _sums_of_squares(grad, "column_moment" in state, workspace)
    wide, limits = row_sums.dtype, torch.finfo(row_sums.dtype)
    squares = sum_over_cut(row_sums, param, 1).div_(param.shape[1]).unsqueeze(1)
    present = squares >= limits.tiny
    counted = torch.stack([squares.sum(), present.sum().to(wide)])
    sums = sum_over_cut(torch.cat([column_sums, counted]), param, 0)
    total, count = sums[-2], sums[-1]
    # Averages of what is larger would be infinite for good.
    usable = total <= limits.max * 2.0**-40
    present &= usable
    of_rows, of_columns = present.to(wide), None
    if "row_moment" in state:
        _average_(moments["row_moment"], _counted_(moments["row_weight"], present, beta2), squares, present)
        of_rows *= (moments["row_moment"].clamp_min(limits.tiny).sqrt() + eps).reciprocal().to(wide)
    if "column_moment" in state:
        means = {"column_moment": sums[:-2] / count, "table_moment": total / count}
        roots = _roots_of_columns(moments, means, usable & (count > 0), beta2)
        of_columns = (roots + (0 if "row_moment" in state else eps)).reciprocal().to(wide)
    for name, tensor in state.items():
        local_shard(tensor).copy_(moments[name])  # nothing where it is the same tensor
    return usable, of_rows, of_columns


def _roots_of_columns(
    moments: Mapping[str, Tensor], means: Mapping[str, Tensor], seen: Tensor, beta2: float
) -> Tensor:
    """Take mean squares of columns into their averages; return the roots, over that of the table if it is kept."""
    weight = _counted_(moments["column_weight"], seen, beta2)
    for name, mean in means.items():
        if name in moments:
            _average_(moments[name], weight, mean, seen)
    columns = moments["column_moment"] / moments.get("table_moment", 1)
    # A column without any gradient so far has none now: whatever divides it.
    return columns.where(columns >= torch.finfo(columns.dtype).tiny, 1).sqrt_()


def _sums_of_squares(grad: Tensor, columns: bool, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Return the sums of the squares of each row and, if they are asked for, of each column."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    of_rows, of_columns = (torch.zeros(size, dtype=wide, device=grad.device) for size in grad.shape)
    for rows in _blocks(grad):
        part = grad[rows]
        if columns:
            squares = workspace.take("scratch", part)
            exact = part if part.dtype == wide else squares.copy_(part)
            torch.mul(exact, exact, out=squares)
            torch.sum(squares, -1, out=of_rows[rows])
            of_columns += squares.sum(0)
        else:
            of_rows[rows] = torch.linalg.vector_norm(part, dim=-1, dtype=wide).square_()
    return of_rows, of_columns


def _counted_(weight: Tensor, seen: Tensor, beta2: float) -> Tensor:
    """Count one more gradient in the averages that have one: earlier ones count less and less."""
    return weight.copy_(torch.where(seen, 1 + beta2 * weight, weight))


def _average_(moment: Tensor, weight: Tensor, value: Tensor, seen: Tensor) -> None:
    """Take values into averages, where there are some."""
    moment.add_(torch.where(seen, (value - moment) / weight, 0))


def _blocks(table: Tensor) -> list[slice]:
    at_once = max(1, (_BLOCK_ON_CPU if table.device.type == "cpu" else _BLOCK) // max(1, table.shape[1]))
    return [slice(first, min(first + at_once, len(table))) for first in range(0, len(table), at_once)]


def _update(entries: list[Entry], host: Host) -> None:
    verdicts: list[Verdict] = []
    for entry, key in zip(entries, keys_of(entries, host.cache), strict=True):
        options = {name: entry.group[name] for name in ("weight_decay", "table_beta2", "eps")}
        options["lr"] = learning_rate(entry.group)
        verdicts.append(moments_update_(entry.param, entry.grad, entry.state, key, host.workspace, **options))
    host.count(entries, verdicts)


def _state(param: Tensor, group: Mapping[str, Any], *, rows: bool, columns: bool) -> dict[str, Tensor]:
    return moments_state(param, rows=rows, columns=columns)


def _bytes(shape: Sequence[int], dtype: torch.dtype, group: Mapping[str, Any], *, rows: bool, columns: bool) -> int:
    numbers = (2 * shape[0] + columns) * rows + (shape[1] + 1) * columns
    return 4 + numbers * torch.promote_types(dtype, torch.float32).itemsize


def _rule(*, rows: bool = False, columns: bool = False) -> Rule:
    state = functools.partial(_state, rows=rows, columns=columns)
    count = functools.partial(_bytes, rows=rows, columns=columns)
    options = {"eps": OPTIONS["adamw_eps"].default}
    return Rule(_update, state, count, options, has_moments=lambda group: False, for_tables=True, by_rows=True,
                takes_stored=True)  # fmt: skip


ROW_MOMENT = _rule(rows=True)
COLUMN_MOMENT = _rule(columns=True)
FACTORED = _rule(rows=True, columns=True)

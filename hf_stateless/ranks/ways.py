r"""Updates of matrices that several ranks work on together: the same numbers as one process would get.

What a chain of norms needs decides how: SR-Sinkhorn sends vectors (`sharded_sinkhorn`), a chain that is local to what
a rank holds sends one number per matrix, every other chain sends whole matrices to their owners (`owners`), and what
is cut in more than one dimension is gathered by all. Which way is taken depends on what all ranks know alike, never
on a rank's own data, so that all of them meet in the same collectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..update.batches import BATCH_BYTES, alike, bounded
from ..update.rules import Workspace, as_matrix, multinorm_update_
from .matrix_update import MatrixUpdate
from .owners import Exchange, assign_owners, same_on_replicas, shared_updates, whitening_cost
from .placement import Split, is_sharded, part_of, whole_matrix
from .sinkhorn import ShardedMatrices, iterate, keep_squares


# Bytes of whole gradients that an owner takes at once.
_EXCHANGE_BYTES = 1 << 30


def update_together_(updates: Sequence[MatrixUpdate], workspace: Workspace | None = None) -> None:
    """Apply updates that ranks share the work of; all ranks of a mesh have to call this with the same parameters.

    Args:
        updates: in the same order on all ranks; `finite` is set.
        workspace: buffers shared with other calls of the same step.

    Example:
        >>> from hf_stateless.ranks.ways import update_together_
        >>> update_together_([])
    """
    workspace = workspace or Workspace()
    ways: dict[str, list[MatrixUpdate]] = {}
    for update in updates:
        ways.setdefault(update.way(), []).append(update)
    for of_group in alike(ways.get("sinkhorn", []), lambda update: _split(update).group.group_name):
        _sinkhorn(of_group, workspace)
    for of_class in alike(ways.get("local", []), lambda update: update.shape_class):
        _local(of_class)
    load: dict[str, list[int]] = {}
    for of_class in alike(ways.get("owned", []), lambda update: update.shape_class):
        split = _split(of_class[0])
        for some in bounded(of_class, _whole_bytes, _EXCHANGE_BYTES * split.ranks):
            if len(some) > 1:
                _owned(some, load.setdefault(split.group.group_name, [0] * split.ranks))
            else:  # an owner would send it to the others while they wait: they may as well compute it
                _gathered(some[0], workspace)
    if "replicated" in ways:
        _replicated(ways["replicated"], workspace)
    for update in ways.get("gathered", []):
        _gathered(update, workspace)


def shares_whitening(options: Mapping[str, Any]) -> bool:
    """Tell whether replicas share the work on a matrix: asked for, a whitening, and other processes to share it with.

    Example:
        >>> from hf_stateless.ranks.ways import shares_whitening
        >>> shares_whitening({"split_whitening": True, "norms": ("spectral",)})
        False
    """
    return (
        bool(options["split_whitening"])
        and "spectral" in options["norms"]
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    )


def _sinkhorn(updates: Sequence[MatrixUpdate], workspace: Workspace) -> None:
    """Run SR-Sinkhorn on all matrices of a process group: one all-reduce per iteration, for vectors and flags."""
    batches, held = [], 0
    stacks = [
        stack
        for of_class in alike(updates, lambda update: update.shape_class)
        for stack in bounded(of_class, _whole_bytes, BATCH_BYTES if of_class[0].grad.device.type != "cpu" else 0)
    ]
    for stack in stacks:
        matrices = [as_matrix(update.grad, update.layout) for update in stack]
        rows, columns = stack[0].param.shape[-2:]
        sizes = (columns, rows) if stack[0].layout == "in_out" else (rows, columns)
        keep = keep_squares(held, matrices)
        held += sum(matrix.numel() for matrix in matrices) if keep else 0
        along = stack[0].along()
        assert along is not None
        batches.append(ShardedMatrices(matrices, _split(stack[0]), along, sizes, keep_squares=keep))
    iterate(batches, [stack[0].chain["num_iterations"] for stack in stacks])
    sizes_of_all = torch.cat([batch.size.to(batches[0].size.device) for batch in batches]).tolist()
    for stack, batch in zip(stacks, batches, strict=True):
        for update, row, column in zip(stack, *batch.scalings(), strict=True):
            update.write_scaled(row, column, sizes_of_all.pop(0), workspace)


def _local(updates: Sequence[MatrixUpdate]) -> None:
    """Normalise what this rank holds, and agree on which gradients were zero or not finite: one small all-reduce."""
    split = _split(updates[0])
    parts = [update.normalized(update.grad) if update.grad.numel() else update.grad for update in updates]
    sizes = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]).to(split.device)
    dist.all_reduce(sizes, group=split.group)
    for update, part, size in zip(updates, parts, sizes.tolist(), strict=True):
        update.write(part, size)


def _owned(updates: Sequence[MatrixUpdate], load: list[int]) -> None:
    """Let one rank normalise each matrix: one all-to-all of gradients, and one of updates."""
    owners = assign_owners([whitening_cost(tuple(update.param.shape)) for update in updates], load)
    exchange = Exchange([_split(update) for update in updates], owners)
    whole = exchange.to_owners([update.grad for update in updates])
    normalized = _normalize([updates[i] for i in exchange.mine], whole)
    parts, sizes = exchange.to_parts(normalized, [update.grad for update in updates])
    for update, part, size in zip(updates, parts, sizes, strict=True):
        update.write(part, size)


def _replicated(updates: Sequence[MatrixUpdate], workspace: Workspace) -> None:
    """Let each replica normalise some of the matrices, if all have the same gradients, and share the updates."""
    group = dist.group.WORLD
    grads = [update.grad for update in updates]
    if group is None or not same_on_replicas(grads, group):
        for update in updates:
            _gathered(update, workspace)
        return

    def compute(positions: list[int]) -> list[Tensor]:
        return _normalize([updates[i] for i in positions], [grads[i] for i in positions])

    shapes = [tuple(grad.shape) for grad in grads]
    for i, part in shared_updates(shapes, compute, group, like=grads[0], batch_bytes=BATCH_BYTES):
        updates[i].write(part, float(torch.linalg.vector_norm(part)))


def _gathered(update: MatrixUpdate, workspace: Workspace) -> None:
    """Normalise the whole matrix on every rank, for cuts along several dimensions; without a cut nothing is sent."""
    options = ("lr", "lr_scale", "weight_decay", "layout")
    finite = multinorm_update_(
        [update.weight],
        [whole_matrix(update.direction)],
        None if update.key is None else [update.key],
        workspace=workspace,
        place=(lambda whole, _: part_of(whole, update.param)) if is_sharded(update.param) else None,
        **{name: update.options[name] for name in options},
        **update.chain,
    )
    update.finite = bool(finite[0])


def _normalize(updates: Sequence[MatrixUpdate], grads: Sequence[Tensor]) -> list[Tensor]:
    """Normalise whole gradients; on an accelerator, matrices of one shape and chain as one batch."""
    if not grads or grads[0].device.type == "cpu":
        return [update.normalized(grad) for update, grad in zip(updates, grads, strict=True)]
    done: dict[int, Tensor] = {}
    for positions in alike(range(len(grads)), lambda i: (updates[i].shape_class, grads[i].shape)):
        if updates[positions[0]].layout in ("out_in", "in_out"):
            batch = updates[positions[0]].normalized(torch.stack([grads[i] for i in positions]))
            done |= dict(zip(positions, batch, strict=True))
        else:
            done |= {i: updates[i].normalized(grads[i]) for i in positions}
    return [done[i] for i in range(len(grads))]


def _split(update: MatrixUpdate) -> Split:
    assert update.split is not None
    return update.split


def _whole_bytes(update: MatrixUpdate) -> int:
    """Return the size of the whole gradient: the same number on all ranks, whatever they hold of it."""
    return update.param.numel() * update.grad.element_size()

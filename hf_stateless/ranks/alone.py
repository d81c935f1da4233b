"""The update of matrices that a rank has as a whole: on one GPU, under DDP, and of what FSDP2 does not shard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..norms.scale import factor_of_scaled
from ..norms.sinkhorn import row_blocks, scalings_by_blocks, sinkhorn_scalings
from ..update.batches import BATCH_BYTES, alike, bounded
from ..update.feedback import of_part
from ..update.kernels.choice import Kernel, choose, plain_kernel
from ..update.reads import both, reads_at_once
from ..update.write import Workspace, judged, key_of_part
from ..weights.stored import StoredWeight
from .matrix_update import MatrixUpdate


class Alone:
    """The way of a matrix that this rank has as a whole: nothing is sent. A kernel takes it, or torch."""

    def takes(self, update: MatrixUpdate) -> bool:
        """Tell whether an update can go this way."""
        return not update.is_sharded and not update.shared

    def run(self, updates: Sequence[MatrixUpdate], workspace: Workspace) -> None:
        """Apply the updates; `finite` is set."""
        for same in alike(updates, _class_of):
            for batch, kernel in self._batches(same):
                self._update(batch, kernel, workspace)
                for update in batch:
                    update.forget_direction()

    def _batches(self, same: list[MatrixUpdate]) -> Iterator[tuple[list[MatrixUpdate], Kernel | None]]:
        """Cut updates of one shape into batches: kernels take any number, torch on a GPU stacks up to a limit.

        With momentum directions are copies, of which only some may be there at once: a kernel is asked for each batch.
        """
        first = same[0]
        kernel = None if first.average else _kernel_of(same)
        if kernel:
            yield same, kernel
            return
        limit = 0 if first.weight.device.type == "cpu" else BATCH_BYTES
        for batch in bounded(same, lambda update: update.param.nbytes, limit):
            yield batch, _kernel_of(batch) if first.average else None

    def _update(self, batch: list[MatrixUpdate], kernel: Kernel | None, workspace: Workspace) -> None:
        first = batch[0]
        if is_stored_stack(first):
            for update in batch:
                self._by_parts(update, workspace)
            return
        # A kernel may leave weights to torch: those that its arithmetic cannot hold.
        left = self._by_kernel(kernel, batch) if kernel else batch
        one_by_one = kernel or len(left) == 1
        if one_by_one and first.chain.is_sinkhorn and first.layout.scales:
            for update in left:
                self._by_vectors(update, workspace)
        elif left:
            self._by_chain(left)

    def _by_parts(self, update: MatrixUpdate, workspace: Workspace) -> None:
        """Update a stack of stored weights one matrix after the other, so that only one is in float at a time."""
        finite = cast(Any, True)
        for part in matrices_of(update):
            self._update([part], _kernel_of([part]), workspace)
            finite = finite & part.finite
        update.finite = finite

    def _by_kernel(self, kernel: Kernel, batch: list[MatrixUpdate]) -> list[MatrixUpdate]:
        """Let a kernel update a batch, and return what it has left alone."""
        first, keys = batch[0], [update.key for update in batch]
        step_size, decay = first.allowed_factors()
        verdicts = kernel(
            [update.weight for update in batch],
            [update.part for update in batch],
            None if None in keys else keys,
            step_size=step_size,
            decay=decay,
            layout=first.layout,
            num_iterations=int(first.chain.num_iterations),
        )
        for update, verdict in zip(batch, verdicts, strict=True):
            update.finite = verdict
        return [update for update in batch if update.finite is None]

    def _by_vectors(self, update: MatrixUpdate, workspace: Workspace) -> None:
        """Apply the SinkGD step of one matrix from its two vectors, without forming the normalised gradient."""
        grad, num_iterations = update.matrix, update.chain.num_iterations
        blocks = row_blocks(grad)
        if len(blocks) > 1:
            row, column = scalings_by_blocks(grad, num_iterations, blocks)
        else:
            row, column = sinkhorn_scalings(grad, num_iterations, scratch=workspace.take("scratch", grad))
        if update.chain.scale == "operator":
            row = row * factor_of_scaled(grad, row, column, blocks).unsqueeze(-1)
        size = row.amax() + 0 * column.amax()  # sums of finite factors could overflow
        update.write_scaled(row, column, judged(size.view(1, 1), update.weight.device)[0], workspace)

    def _by_chain(self, batch: list[MatrixUpdate]) -> None:
        """Normalise matrices of one shape as one batch."""
        matrices = [update.matrix for update in batch]
        stacked = matrices[0].unsqueeze(0) if len(batch) == 1 else torch.stack(matrices)
        first, normalized = batch[0], batch[0].chain.normalize(stacked)
        # One norm for each, or for each of the blocks that it is made of.
        blocks = normalized.flatten(0, 1) if first.layout.blocks > 1 else normalized
        norms = torch.linalg.vector_norm(blocks.flatten(1), dim=1).view(len(batch), -1)
        kernel = plain_kernel([update.weight for update in batch], normalized, first.layout)
        if kernel:
            self._by_plain_kernel(kernel, batch, normalized, norms.squeeze(1))
            return
        verdicts = judged(norms, first.weight.device)
        for update, matrix, verdict in zip(batch, normalized, verdicts, strict=True):
            update.write(update.layout.back(matrix, update.part.shape), verdict)

    def _by_plain_kernel(
        self, kernel: Callable[..., None], batch: list[MatrixUpdate], normalized: Tensor, norms: Tensor
    ) -> None:
        """Write the updates of a batch together, where the norms allow it."""
        first, keys = batch[0], [update.key for update in batch]
        finite, (step_size, decay) = norms < math.inf, first.factors()
        usable = both(finite & (norms > 0), first.allowed)
        kernel(
            [update.weight for update in batch],
            normalized,
            usable,
            None if None in keys else keys,
            step_size=step_size,
            decay=decay,
            layout=first.layout,
        )
        for update, flag in zip(batch, finite.unbind(), strict=True):
            update.finite = flag


class Apart(Alone):
    """The way of stacks of stored weights that are cut between their matrices: a rank updates those that it has.

    One after the other as on one process, so that the bytes are the same. A flag for each stack is sent.
    """

    def takes(self, update: MatrixUpdate) -> bool:
        """Tell whether an update can go this way."""
        return is_stored_stack(update) and bool(update.splits) and set(update.cuts) == {0}

    def run(self, updates: Sequence[MatrixUpdate], workspace: Workspace) -> None:
        """Apply the updates; `finite` is set, to the same on all ranks."""
        for of_class in alike(updates, lambda update: update.shape_class):
            for update in of_class:
                self._by_parts(update, workspace)
                update.forget_direction()
            splits = of_class[0].splits or ()
            finite = torch.stack([torch.as_tensor(update.finite).int().to(splits[0].device) for update in of_class])
            for split in splits:
                dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=split.group)
            read = reads_at_once(of_class[0].weight.device)
            for update, flag in zip(of_class, finite.bool().tolist() if read else finite.bool().unbind(), strict=True):
                update.finite = flag


def is_stored_stack(update: MatrixUpdate) -> bool:
    """Tell whether an update is of a stack in a format of its own, whose matrices are updated one by one."""
    return isinstance(update.weight, StoredWeight) and update.weight.ndim > 2


def matrices_of(update: MatrixUpdate) -> Iterator[MatrixUpdate]:
    """Yield the updates of the matrices that this rank has of a stack of stored weights."""
    assert isinstance(update.weight, StoredWeight)
    grads = update.part.flatten(0, -3)
    for i, matrix in enumerate(update.weight.matrices()):
        key, feed = key_of_part(update.key, update.weight.first_matrix + i), of_part(update.feed, i * matrix.shape[0])
        yield replace(update, param=matrix, gradient=grads[i], average=None, key=key, feed=feed)


def _kernel_of(batch: list[MatrixUpdate]) -> Kernel | None:
    if batch[0].feed:  # kernels do not tell what rounding leaves out
        return None
    first = batch[0]
    return choose([update.weight for update in batch], [update.part for update in batch], first.chain, first.layout)


def _class_of(update: MatrixUpdate) -> tuple[Any, ...]:
    """Return what updates share that are computed together; vectors of one length, which may be stacked."""
    return id(update.group), update.param.dtype, update.param.shape, update.shape_class, id(update.allowed)

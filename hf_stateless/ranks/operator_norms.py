r"""Operator norms of SinkGD updates whose parts lie on several ranks: two all-reduces of vectors for all of them.

Of X = diag(r) G diag(c) each rank forms its own part X_k, one batch at a time. Cut by rows W = X^T X V is the sum of
X_k^T X_k V over ranks, and then ||X w||^2 that of ||X_k w||^2. Cut by columns X V and X w are sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..norms.scale import operator_factor, start_vectors
from ..norms.sinkhorn import scaled
from .sinkhorn import ShardedMatrices


class _Estimate:
    """The estimate for one batch of matrices of one shape."""

    def __init__(self, batch: ShardedMatrices) -> None:
        self.batch = batch
        self._row, self._column = batch.scalings()
        self._sizes = (batch.rows, batch.columns)
        vectors = start_vectors(self._sizes, self._row)
        self._vectors = vectors[:, batch.first_column :][:, : self._column.shape[-1]] if batch.along == -1 else vectors
        self._w = self._squares = self._images = vectors

    def first(self) -> Tensor:
        """Return what the ranks have to add up: of X^T X V, or of X V where columns are cut."""
        x = self._part()
        images = self._vectors @ x.mT
        return images if self.batch.along == -1 else images @ x

    def second(self, total: Tensor) -> Tensor:
        """Take that sum, and return what the ranks have to add up for the norms of w and of X w."""
        x = self._part()
        self._w = total @ x if self.batch.along == -1 else total
        images, squares = self._w @ x.mT, self._w.square().sum(-1)
        if self.batch.along == -1:
            return torch.cat([images, squares.unsqueeze(-1)], -1)
        self._squares = squares
        return images.square().sum(-1)

    def factor(self, total: Tensor) -> Tensor:
        """Take that sum, and return the factors of the matrices."""
        if self.batch.along != -1:
            return operator_factor(total, self._squares, self._sizes)
        return operator_factor(total[..., :-1].square().sum(-1), total[..., -1], self._sizes)

    def _part(self) -> Tensor:
        parts = zip(self.batch.grads, self._row, self._column, strict=True)
        return torch.stack([scaled(*part) for part in parts])


def operator_factors(batches: Sequence[ShardedMatrices]) -> list[Tensor]:
    """Return the factors of the matrices of one process group, after the last iteration (a collective).

    Args:
        batches: the parts of this rank, in an order that is the same on all ranks.

    Returns:
        For each batch the factors of `hf_stateless.norms.scale.operator_factor`, in the shape of the row vectors
        without their last dimension.
    """
    if not batches:
        return []
    estimates = [_Estimate(batch) for batch in batches]
    totals = _summed(batches, [estimate.first() for estimate in estimates])
    totals = _summed(batches, [e.second(total) for e, total in zip(estimates, totals, strict=True)])
    return [estimate.factor(total) for estimate, total in zip(estimates, totals, strict=True)]


def _summed(batches: Sequence[ShardedMatrices], parts: Sequence[Tensor]) -> list[Tensor]:
    """Add up over ranks what is cut, in one all-reduce; matrices of a stack are whole on one rank."""
    split = batches[0].split
    sent = [part for batch, part in zip(batches, parts, strict=True) if batch.along != 0]
    if not sent:
        return list(parts)
    dtype = max((part.dtype for part in sent), key=lambda dtype: dtype.itemsize)
    flat = torch.cat([part.flatten().to(split.device, dtype) for part in sent])
    dist.all_reduce(flat, group=split.group)
    sums = iter(flat.split_with_sizes([part.numel() for part in sent]))
    return [
        part if batch.along == 0 else next(sums).view(part.shape).to(part)
        for batch, part in zip(batches, parts, strict=True)
    ]

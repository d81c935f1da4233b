"""Parts of matrices that a core's cache holds: several passes over them cost a CPU little more than one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


# Entries of a part: a quarter of a MiB in float32.
_CACHED = 1 << 16


def parts_in_cache(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield indices of matrices and rows, for (b, m, n): several small matrices at once, or rows of a large one.

    Example:
        >>> import torch
        >>> from hf_stateless.norms.parts import parts_in_cache
        >>> list(parts_in_cache(torch.empty(2, 100, 1000)))  # doctest: +NORMALIZE_WHITESPACE
        [(slice(0, 1, None), slice(0, 65, None)), (slice(0, 1, None), slice(65, 130, None)),
         (slice(1, 2, None), slice(0, 65, None)), (slice(1, 2, None), slice(65, 130, None))]
    """
    count, m, n = x.shape
    rows = max(1, min(m, _CACHED // max(1, n)))
    matrices = max(1, _CACHED // max(1, m * n))
    for first in range(0, count, matrices):
        for top in range(0, m, rows):
            yield slice(first, first + matrices), slice(top, top + rows)


def as_batch(x: Tensor) -> Tensor:
    """Return (..., m, n) as (b, m, n).

    Example:
        >>> import torch
        >>> from hf_stateless.norms.parts import as_batch
        >>> as_batch(torch.empty(2, 3)).shape, as_batch(torch.empty(4, 5, 2, 3)).shape
        (torch.Size([1, 2, 3]), torch.Size([20, 2, 3]))
    """
    return x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)

"""What rounding left out of a weight, as what the direction of its update lacked: for momentum to make good later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights.stored import Lost


# What a row takes back in one step, at most, as a part of the norm of its direction. Without a limit the losses fill
# the direction where steps are much smaller than the spacing of the codes, since an update has one size in any case.
LIMIT = 0.3


@dataclass(frozen=True)
class Feedback:
    r"""Turns losses of rows of W into what their direction D lacked, at the scale that D had in the update X.

    For W <- decay W - step_size X a row that has lost e lacks (||D|| / ||X||) e / step_size, at most 0.3 ||D||.

    Example:
        >>> import torch
        >>> from hf_stateless.update.feedback import Feedback
        >>> direction, told = torch.tensor([[3.0, 4.0]]), []
        >>> feedback = Feedback(direction, lambda rows, lacked: told.append(lacked))
        >>> feedback.lost(lambda rows: direction / 5, 0.1)(slice(0, 1), torch.tensor([[0.01, 0.02]]))
        >>> told
        [tensor([[0.5000, 1.0000]])]
    """

    direction: Tensor
    """D as the weight is stored, (..., rows, columns); this rank's part."""
    feed: Lost
    """Takes a slice of rows, counted through all matrices of a stack, and what they lacked in float32."""

    def of_matrix(self, number: int) -> Feedback:
        """Return that of one matrix of a stack."""
        matrix = self.direction.flatten(0, -3)[number]
        feed = of_part(self.feed, number * matrix.shape[0])
        assert feed is not None
        return Feedback(matrix, feed)

    def lost(self, update: Callable[[slice], Tensor], step_size: float | Tensor) -> Lost:
        """Return what takes in the losses of one matrix.

        Args:
            update: takes a slice of rows and returns those of X.
            step_size: factor of X; nothing is lost where it is 0.
        """

        def take(rows: slice, error: Tensor) -> None:
            of_error, of_update, of_direction = (
                torch.linalg.vector_norm(part.float(), dim=1, keepdim=True)
                for part in (error, update(rows), self.direction[rows])
            )
            scale = torch.where(of_update > 0, of_direction / of_update, 0)
            lacked = (of_error * scale / step_size).nan_to_num(0, torch.inf)
            size = torch.minimum(lacked, LIMIT * of_direction).nan_to_num(0, 0)  # a norm may leave float32
            smallest = torch.finfo(of_error.dtype).tiny
            self.feed(rows, error.div_(of_error.clamp_min(smallest)).mul_(size))

        return take


def of_part(feed: Lost | None, first_row: int) -> Lost | None:
    """Return what takes in rows of one matrix of a stack, which are counted on from those before it."""
    if feed is None:
        return None
    return lambda rows, values: feed(slice(first_row + rows.start, first_row + rows.stop), values)

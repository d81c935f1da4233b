"""The update of matrices by the road that the optimizer takes, from plain arguments."""

from hf_stateless.ranks.matrix_update import MatrixUpdate
from hf_stateless.ranks.ways import apply_
from hf_stateless.update.write import Workspace


def multinorm_update_(weights, grads, keys, **group):
    """Update weights by their gradients alone on a rank; return for each whether its gradient was finite."""
    keys = keys or [None] * len(weights)
    updates = [MatrixUpdate(*one[:2], group, key=one[2]) for one in zip(weights, grads, keys, strict=True)]
    apply_(updates, Workspace())
    return [update.finite for update in updates]

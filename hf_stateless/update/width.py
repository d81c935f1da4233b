"""How the step of a matrix depends on its shape, so that one learning rate serves narrow and wide models."""

from __future__ import annotations

import math


WIDTH_RULES = ("none", "spectral", "fan_in")
"""The first is the default."""
# Features of the square matrix whose step no rule changes.
_BASE = 256


def width_factor(rule: str, out_features: int, in_features: int) -> float:
    r"""Return the factor on the step of W in R^{m x n} by which the size of its change of W x stays that of 256 x 256.

    A step X with entries of root mean square 1 changes W x by up to ||X||_2 ||x||, and the entries of W x keep their
    size over all widths if ||X||_2 is sqrt(m / n). How far X is from that depends on its singular values:

        spectral: all equal, as a whitening leaves them: ||X||_2 = sqrt(max(m, n)), factor sqrt(256 min(m, n)) / n
        fan_in:   a fixed number of large ones, as SinkGD or signs leave them: ||X||_2 ~ sqrt(m n), factor 256 / n
        none:     1; for a whitened X the scale `0.2 sqrt(max(m, n))` of Muon, with lr_scale = 0.2

    For m >= n `spectral` is the older scale sqrt(max(1, m / n)) of Muon, up to a constant.

    Args:
        rule: one of `WIDTH_RULES`.
        out_features: m.
        in_features: n.

    Example:
        >>> from hf_stateless.update.width import width_factor
        >>> [width_factor(rule, 1024, 1024) for rule in ("none", "spectral", "fan_in")]
        [1.0, 0.5, 0.25]

    References:
        A spectral condition for feature learning, https://huggingface.co/papers/2310.17813, section 2; the rule of
        Adam in https://huggingface.co/papers/2203.03466, table 3.
    """
    if rule == "spectral":
        return math.sqrt(_BASE * min(out_features, in_features)) / in_features
    return _BASE / in_features if rule == "fan_in" else 1.0

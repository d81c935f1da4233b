"""The published optimizers as data: a chain of norm projections, how often it runs, and the scale of its step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MultiNormPreset:
    """One row of the table of optimizers.

    Example:
        >>> from hf_stateless import PRESETS
        >>> PRESETS["sinkgd"].norms, PRESETS["sinkgd"].num_iterations
        (('row_l2', 'col_l2'), 5)
    """

    norms: tuple[str, ...]
    """Norm projections, applied from left to right."""
    num_iterations: int
    """How often the chain runs (L in the paper)."""
    lr_scale: float
    """Factor on the learning rate of matrices; see trainer/README.md for how it was chosen."""
    paper: str
    """Where the method is defined."""


PRESETS: dict[str, MultiNormPreset] = {
    "swan": MultiNormPreset(
        norms=("row_standardize", "spectral"),
        num_iterations=1,
        lr_scale=2.0,
        paper="https://huggingface.co/papers/2412.13148",
    ),
    "sinkgd": MultiNormPreset(
        norms=("row_l2", "col_l2"),
        num_iterations=5,
        lr_scale=0.4,
        paper="https://huggingface.co/papers/2502.06742",
    ),
    "multinorm": MultiNormPreset(
        norms=("row_l2", "spectral"),
        num_iterations=1,
        lr_scale=2.0,
        paper="https://huggingface.co/papers/2502.06742",
    ),
}

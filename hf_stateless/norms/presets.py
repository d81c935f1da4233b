"""The published optimizers as data: a chain of norm projections, how often it runs, its step scale and its paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .chain import Chain


_SWAN_PAPER = """@inproceedings{ma2025swan,
  title     = {{SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training}},
  author    = {Ma, Chao and Gong, Wenbo and Scetbon, Meyer and Meeds, Edward},
  booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
  year      = {2025},
  url       = {https://proceedings.mlr.press/v267/ma25g.html}
}"""
_MULTI_NORMALIZATION_PAPER = """@inproceedings{scetbon2025gradient,
  title     = {{Gradient Multi-Normalization for Efficient LLM Training}},
  author    = {Scetbon, Meyer and Ma, Chao and Gong, Wenbo and Meeds, Edward},
  booktitle = {Advances in Neural Information Processing Systems 38},
  year      = {2025},
  url       = {https://openreview.net/forum?id=oanhUGY6un}
}"""
_POLAR_EXPRESS_PAPER = """@misc{amsel2025polar,
  title         = {{The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon Algorithm}},
  author        = {Amsel, Noah and Persson, David and Musco, Christopher and Gower, Robert M.},
  year          = {2025},
  eprint        = {2505.16932},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2505.16932}
}"""


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
    title: str
    """What readers call it."""
    paper: str
    """Where the method is defined."""
    citation: str
    """BibTeX of the paper, or of several."""
    whitening: str = "polar_express"
    """How `spectral` is computed."""
    ns_steps: int | None = None
    """Iterations of the whitening; None for its own default."""
    scale: str = "rms"
    """What the size of an update is measured by, see `hf_stateless.norms.scale`."""

    @property
    def chain(self) -> Chain:
        """The chain that it runs, unless options say more."""
        return Chain.of(vars(self))

    def group(self) -> dict[str, Any]:
        """Return what a parameter group holds of it, to make one by hand.

        Example:
            >>> from hf_stateless import PRESETS
            >>> PRESETS["swan"].group()
            {'norms': ('row_standardize', 'spectral'), 'num_iterations': 1}
        """
        values, usual = vars(self.chain), vars(Chain())
        always = ("norms", "num_iterations")
        return {name: value for name, value in values.items() if name in always or value != usual[name]}


PRESETS: dict[str, MultiNormPreset] = {
    "swan": MultiNormPreset(
        norms=("row_standardize", "spectral"),
        num_iterations=1,
        lr_scale=2.0,
        title="SWAN",
        paper="https://huggingface.co/papers/2412.13148",
        citation=_SWAN_PAPER,
    ),
    "sinkgd": MultiNormPreset(
        norms=("row_l2", "col_l2"),
        num_iterations=5,
        lr_scale=0.8,
        title="SinkGD",
        paper="https://huggingface.co/papers/2502.06742",
        citation=_MULTI_NORMALIZATION_PAPER,
    ),
    "sinkgd_polar": MultiNormPreset(
        norms=("row_l2", "col_l2", "spectral"),
        num_iterations=1,
        lr_scale=1.0,
        title="SinkGD with a Polar Express step",
        paper="https://huggingface.co/papers/2502.06742",
        citation=f"{_MULTI_NORMALIZATION_PAPER}\n{_POLAR_EXPRESS_PAPER}",
        ns_steps=1,
    ),
    "multinorm": MultiNormPreset(
        norms=("row_l2", "spectral"),
        num_iterations=1,
        lr_scale=2.0,
        title="gradient multi-normalization",
        paper="https://huggingface.co/papers/2502.06742",
        citation=_MULTI_NORMALIZATION_PAPER,
    ),
}


def in_words(field: str) -> str:
    """Return what the presets have in a field that has a default: that, and which have something else.

    Example:
        >>> from hf_stateless.norms.presets import in_words
        >>> in_words("ns_steps")
        'of the whitening, `1` (`sinkgd_polar`)'
    """
    usual = MultiNormPreset.__dataclass_fields__[field].default
    others = [(name, getattr(preset, field)) for name, preset in PRESETS.items() if getattr(preset, field) != usual]
    return ", ".join(
        ["of the whitening" if usual is None else f"`{usual}`", *(f"`{value}` (`{name}`)" for name, value in others)]
    )

"""SWAN, SinkGD and gradient multi-normalization as optimizer names of the Hugging Face stack."""

from .factory import MultiNormFactory, SinkGDFactory, SwanFactory, create_optimizer
from .multi_norm import multi_normalize
from .norms import NORMS
from .optimizer import StatelessOptimizer
from .presets import PRESETS, MultiNormPreset
from .registration import register


__version__ = "0.1.0"
__all__ = [
    "NORMS",
    "PRESETS",
    "MultiNormFactory",
    "MultiNormPreset",
    "SinkGDFactory",
    "StatelessOptimizer",
    "SwanFactory",
    "create_optimizer",
    "multi_normalize",
]

register()

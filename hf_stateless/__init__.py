"""SWAN, SinkGD and gradient multi-normalization as optimizer names of the Hugging Face stack."""

from .callbacks import attach_memory_report
from .export import export_model
from .factory import MultiNormFactory, SinkGDFactory, SwanFactory, create_optimizer
from .int8.hf_quantizer import Int8TrainingConfig, dequantize, quantize
from .lora_factory import create_lora_optimizer
from .multi_norm import multi_normalize
from .norms import NORMS
from .optimizer import StatelessOptimizer
from .presets import PRESETS, MultiNormPreset
from .registration import register


__version__ = "0.1.0"
__all__ = [
    "NORMS",
    "PRESETS",
    "Int8TrainingConfig",
    "MultiNormFactory",
    "MultiNormPreset",
    "SinkGDFactory",
    "StatelessOptimizer",
    "SwanFactory",
    "attach_memory_report",
    "create_lora_optimizer",
    "create_optimizer",
    "dequantize",
    "export_model",
    "multi_normalize",
    "quantize",
]

register()

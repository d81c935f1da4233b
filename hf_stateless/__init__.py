"""SWAN, SinkGD and gradient multi-normalization as optimizer names of the Hugging Face stack."""

from .norms.chain import multi_normalize
from .norms.presets import PRESETS, MultiNormPreset
from .norms.projections import NORMS
from .optimizer.optimizer import StatelessOptimizer
from .reports.callback import attach_memory_report
from .trainer.factory import MultiNormFactory, SinkGDFactory, SwanFactory, create_optimizer
from .trainer.lora_factory import create_lora_optimizer
from .trainer.names import register
from .weights.int8.export import export_model
from .weights.int8.hf_quantizer import Int8TrainingConfig, dequantize, quantize


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

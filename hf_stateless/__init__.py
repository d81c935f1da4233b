"""SWAN, SinkGD and gradient multi-normalization as optimizer names of the Hugging Face stack.

Importing it registers the names and the 8-bit format with transformers; what makes optimizers, reports and exports is
loaded when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .trainer.names import register as _register
from .weights.int8.config import Int8TrainingConfig
from .weights.int8.hf_quantizer import dequantize, quantize


if TYPE_CHECKING:
    from .norms.chain import multi_normalize
    from .norms.presets import PRESETS, MultiNormPreset
    from .norms.projections import NORMS
    from .optimizer.optimizer import StatelessOptimizer
    from .reports.callback import attach_memory_report
    from .reports.card.attach import attach_model_card
    from .reports.card.during_training import attach_push
    from .trainer.factory import (
        MultiNormFactory,
        SinkGDFactory,
        SinkGDPolarFactory,
        SwanFactory,
        create_lora_optimizer,
        create_optimizer,
    )
    from .weights.int8.export import export_model

__version__ = "0.1.0"
__all__ = [
    "NORMS",
    "PRESETS",
    "Int8TrainingConfig",
    "MultiNormFactory",
    "MultiNormPreset",
    "SinkGDFactory",
    "SinkGDPolarFactory",
    "StatelessOptimizer",
    "SwanFactory",
    "attach_memory_report",
    "attach_model_card",
    "attach_push",
    "create_lora_optimizer",
    "create_optimizer",
    "dequantize",
    "export_model",
    "multi_normalize",
    "quantize",
]

# Where the names are that are loaded when they are first asked for.
_PLACES = {
    "NORMS": ".norms.projections",
    "PRESETS": ".norms.presets",
    "MultiNormFactory": ".trainer.factory",
    "MultiNormPreset": ".norms.presets",
    "SinkGDFactory": ".trainer.factory",
    "SinkGDPolarFactory": ".trainer.factory",
    "StatelessOptimizer": ".optimizer.optimizer",
    "SwanFactory": ".trainer.factory",
    "attach_memory_report": ".reports.callback",
    "attach_model_card": ".reports.card.attach",
    "attach_push": ".reports.card.during_training",
    "create_lora_optimizer": ".trainer.factory",
    "create_optimizer": ".trainer.factory",
    "export_model": ".weights.int8.export",
    "multi_normalize": ".norms.chain",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PLACES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register()

"""Memory of a training run: predicted before anything is downloaded, allocated or rented."""

from .command import main, report
from .estimate import estimate
from .model import build_model, load_config
from .state import known_optimizers, optimizer_state_bytes
from .table import Estimate, Settings


__all__ = [
    "Estimate",
    "Settings",
    "build_model",
    "estimate",
    "known_optimizers",
    "load_config",
    "main",
    "optimizer_state_bytes",
    "report",
]

"""The old place of `optim_args` and of `hf_stateless.optimizer.options`; delete when nothing imports from here."""

from ..optimizer.options import EMBEDDINGS, LAYERWISE, LORA, MOMENTUM_DTYPES
from .optim_args import optimizer_names, parse_options, valid_keys


__all__ = [
    "EMBEDDINGS",
    "LAYERWISE",
    "LORA",
    "MOMENTUM_DTYPES",
    "optimizer_names",
    "parse_options",
    "valid_keys",
]

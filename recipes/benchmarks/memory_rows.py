"""The optimizers that `memory.py` measures, and the peaks that `hf-stateless memory` predicts for them."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import LlamaConfig

import hf_stateless
from hf_stateless.reports.files import GIB
from hf_stateless.reports.predicted import Settings, build_model, estimate


@dataclass(frozen=True)
class Row:
    """One optimizer: what `hf-stateless memory` calls it, and how it is made from a model."""

    optim: str
    options: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""
    """The package of others that has it."""

    def __call__(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a model."""
        if self.optim == "adamw_torch_fused":
            return torch.optim.AdamW(model.parameters(), fused=True)
        if self.optim == "adamw_bnb_8bit":
            return _adamw_8bit(model)
        return hf_stateless.create_optimizer(model, self.optim, lr=1e-3, **self.options)

    def is_here(self) -> bool:
        """Return whether its package is installed."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None


def _adamw_8bit(model: torch.nn.Module) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):  # as the Trainer does
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    optimizer: torch.optim.Optimizer = AdamW8bit(model.parameters())
    return optimizer


BASELINE = "AdamW (fused)"
STATELESS = {"release": "all", "embeddings": "stateless"}
ROWS = {
    BASELINE: Row("adamw_torch_fused"),
    "AdamW8bit (bitsandbytes)": Row("adamw_bnb_8bit", needs="bitsandbytes"),
    "sinkgd": Row("sinkgd"),
    "sinkgd_layerwise": Row("sinkgd_layerwise"),
    "sinkgd_layerwise, release=all": Row("sinkgd_layerwise", {"release": "all"}),
    "swan": Row("swan"),
    "swan_layerwise, release=all": Row("swan_layerwise", {"release": "all"}),
    "sinkgd_layerwise, stateless": Row("sinkgd_layerwise", STATELESS),
    "sinkgd_layerwise, int8, stateless": Row("sinkgd_layerwise", STATELESS),
}
DEFAULT_ROWS = [BASELINE, "sinkgd", "sinkgd_layerwise", "sinkgd_layerwise, release=all"]
INT8_ROWS = list(ROWS)[-2:]


def predicted_gib(rows: Iterable[str], config: LlamaConfig, args: argparse.Namespace) -> dict[str, float]:
    """Return the peaks of rows on a GPU in GiB, as `hf-stateless memory` predicts them."""
    config.architectures = ["LlamaForCausalLM"]
    peaks = {}
    for name in rows:
        dtype = "int8" if "int8" in name else {"bfloat16": "bf16", "float32": "fp32"}[args.dtype]
        settings = Settings(dtype, batch=args.batch_size, seq=args.length, checkpointing=args.checkpointing)
        model = build_model(config, settings)
        peaks[name] = estimate(model, [ROWS[name].optim], settings, ROWS[name].options)[0].peak / GIB
    return peaks

"""The hint for pretraining: what is said of a model that nobody has trained yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..optimizer.rates import SCALES
from ..ranks.placement import local_shard


NOTE = (
    "This model looks untrained: pretraining wants higher learning rates for embeddings, heads and norms than for "
    'matrices. Type optim_args="rates=pretraining" (or rates=finetuning to keep one rate, without this line).'
)
# Who sets one of them has thought of the rates.
_OF_RATES = ("rates", "adamw_lr", *SCALES)
# Rows of an embedding that are looked at, and how far from independent entries their statistics may be.
_ROWS, _NEAR = 1024, 3.0


def untrained_note(model: nn.Module, given: Mapping[str, Any]) -> str:
    """Return the line that says what to type for pretraining; empty where a model is trained, or rates were chosen.

    Args:
        model: all of it.
        given: the options of the run, of which none about rates may be set.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_stateless.trainer.untrained import untrained_note
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=2, vocab_size=32)
        >>> untrained_note(LlamaForCausalLM(config), {})[:26]
        'This model looks untrained'
    """
    return "" if any(key in given for key in _OF_RATES) or not is_untrained(model) else NOTE


@torch.no_grad()
def is_untrained(model: nn.Module) -> bool:
    """Tell whether a model is plainly new: two norms or more, all as they begin, and embeddings that look drawn.

    It has no adapters, nothing but tables is frozen, and its weights are here to be looked at. Read once, without any
    word to other ranks: of a sharded weight the part of this rank counts.

    Args:
        model: all of it.
    """
    modules = list(model.modules())
    tables = [m.weight for m in modules if isinstance(m, nn.Embedding)]
    known = {id(table) for table in tables}
    if any((not p.requires_grad and id(p) not in known) or p.is_meta for p in model.parameters()):
        return False
    norms = [m for m in modules if "Norm" in type(m).__name__ and any(True for _ in m.parameters(recurse=False))]
    trained = [table for table in tables if table.requires_grad and table.ndim == 2]
    if len(norms) < 2 or not trained or not all(map(_begins, norms)):
        return False
    return _looks_drawn(max(trained, key=Tensor.numel))


def _begins(norm: nn.Module) -> bool:
    """Tell whether a norm is as it was made: biases 0, gains 1, or 0 where the class adds 1 to them (Gemma)."""
    parts = [(name, local_shard(p)) for name, p in norm.named_parameters(recurse=False)]
    return all(
        bool((part == 0).all()) or ("bias" not in name and bool((part == 1).all()))
        for name, part in parts
        if part.numel()
    )


def _looks_drawn(table: Tensor) -> bool:
    """Tell whether the entries of a table are independent of each other, as an initialisation draws them.

    Rows of a trained one have a direction in common and lengths that differ. Both statistics are about 1 where entries
    are independent, whatever they are drawn from.
    """
    rows = local_shard(table)[:_ROWS].float()
    rows = rows[rows.any(-1)]  # that of padding is zero
    squares = rows.square()
    if rows.shape[0] < 2 or rows.shape[1] < 2 or not bool(squares.std() > 0):
        return False
    common = rows.shape[0] * rows.mean(0).square().mean() / squares.mean()
    lengths = rows.shape[1] * squares.mean(1).var() / squares.var()
    return bool(common < _NEAR) and bool(lengths < _NEAR)

"""`save_pretrained` of a model whose 8-bit weights are cut over ranks: the folder that one process would write."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import PreTrainedModel

from ..cuts import whole_tensor
from .sharded import shard_of


def is_cut(model: nn.Module) -> bool:
    """Tell whether 8-bit weights of a model are cut over ranks."""
    return any(shard_of(p) is not None for p in model.parameters())


def whole_state(model: PreTrainedModel) -> dict[str, Any]:
    """Return the state of a model that is cut over ranks: what `save_pretrained` was given, or all ranks gather it.

    The first rank has it, on the host; the others may have nothing. What is tied is there once, so that it is written
    once.
    """
    given: dict[str, Any] | None = getattr(model.hf_quantizer, "given_state", None)
    if given is None:
        given = {}
        for name, part in get_model_state_dict(model).items():
            whole = whole_tensor(part) if isinstance(part, Tensor) else part
            if dist.get_rank() == 0:
                given[name] = whole.cpu() if isinstance(whole, Tensor) else whole
    names = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    first = {key: name for name, key in reversed(names.items())}
    return {name: given.get(first.get(names.get(name, 0), name), tensor) for name, tensor in given.items()}


def _noting_state(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `save_pretrained`, which asks the quantizer for a state even where the caller has gathered one already."""

    @functools.wraps(original)
    def save_pretrained(
        self: PreTrainedModel,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        quantizer = getattr(self, "hf_quantizer", None)
        if quantizer is None or not is_cut(self):
            original(self, save_directory, is_main_process, state_dict, *args, **kwargs)
            return
        quantizer.given_state = state_dict
        try:
            original(self, save_directory, is_main_process, state_dict, *args, **kwargs)
        finally:
            quantizer.given_state = None

    return save_pretrained


PreTrainedModel.save_pretrained = _noting_state(PreTrainedModel.save_pretrained)

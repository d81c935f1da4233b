"""How many bytes each optimizer keeps, and needs on top during a step, from shapes, dtypes and roles alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...optimizer.rules import RULES as OUR_RULES
from ...trainer.factory import parameter_groups
from ...trainer.optim_args import optimizer_names, parse_options
from ...trainer.partition import partition_parameters


# bitsandbytes' defaults: smaller tensors keep float32 state; a maximum per block; a table of 256 float32 values.
_BNB_SMALLEST, _BNB_BLOCK, _BNB_TABLE = 4096, 256, 1024
# Optimizers of transformers that are known to work on parts of matrices: entry by entry.
_BY_ENTRY = ("adamw_torch", "adamw_torch_fused")
# transformers' default rank of GaLore.
_GALORE_RANK = 128


@dataclass(frozen=True)
class Parameter:
    """What an optimizer's memory depends on: one trainable tensor, or the part of it that a rank holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str
    """One of `hf_stateless.trainer.partition.ROLES`."""
    layout: str = "out_in"
    """How it is stored, see `hf_stateless.trainer.partition.PartitionedParameter`."""

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def is_projected(self) -> bool:
        """Whether GaLore projects its gradient: it takes plain linear layers only."""
        return self.role == "matrix" and self.layout == "out_in" and len(self.shape) == 2

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, and of its gradient."""
        return self.numel * self.dtype.itemsize


def shard(shape: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Return the shape of the largest part of a tensor that FSDP2 cuts along its first dimension."""
    return (-(-shape[0] // ranks), *shape[1:]) if shape and ranks > 1 else tuple(shape)


def _adamw_torch(p: Parameter, _: int) -> int:
    return 2 * p.nbytes + 4  # two moments in the parameter's dtype and a float32 step


def _bnb(moments: int, bits: int) -> Callable[[Parameter, int], int]:
    def state(p: Parameter, _: int) -> int:
        # transformers keeps embeddings at 32 bits under every 8-bit optimizer.
        if bits == 32 or p.numel < _BNB_SMALLEST or p.role == "embedding":
            return moments * 4 * p.numel
        return moments * (p.numel + 4 * -(-p.numel // _BNB_BLOCK))

    return state


def _adafactor(p: Parameter, _: int) -> int:
    # Float32 row and column sums, or the whole second moment; transformers adds the root mean square of the weight.
    factors = math.prod(p.shape[:-1]) + math.prod(p.shape[:-2]) * p.shape[-1] if len(p.shape) > 1 else p.numel
    return 4 * factors + 4


def _galore(p: Parameter, rank: int) -> int:
    if not p.is_projected:
        return 2 * p.nbytes
    rank = min(rank, *p.shape)
    # Its projection is a view of all singular vectors where the decomposition already has the gradient's dtype.
    kept = min(p.shape) if p.dtype == torch.float32 else rank
    return (2 * rank * max(p.shape) + kept * min(p.shape)) * p.dtype.itemsize


def _largest(copies: float, params: Sequence[Parameter]) -> int:
    return int(copies * max((p.nbytes for p in params), default=0))


def _foreach_adamw(params: Sequence[Parameter], device: str) -> int:
    # On a GPU all square roots at once, on a CPU those of one tensor and their quotient.
    return _largest(2, params) if device == "cpu" else sum(p.nbytes for p in params)


def _adafactor_temporary(params: Sequence[Parameter], _: str) -> int:
    # Squared gradient and update in float32; half weights and gradients are converted too.
    return max((4 * p.numel * (2 if p.dtype.itemsize == 4 else 4) for p in params), default=0)


def _galore_temporary(params: Sequence[Parameter], _: str) -> int:
    svd = [4 * (2 * p.numel + min(p.shape) * sum(p.shape)) for p in params if p.is_projected]
    return max([_largest(2, params), *svd])


@dataclass(frozen=True)
class Rule:
    """What one optimizer of transformers takes."""

    state: Callable[[Parameter, int], int]
    """Bytes kept for a parameter; the second argument is the rank of low-rank methods."""
    temporary: Callable[[Sequence[Parameter], str], int] = lambda params, device: 0
    """Bytes that `step()` needs on top, from all parameters and the device (`cuda` or `cpu`)."""
    tables: int = 0
    """Code tables, 1 KiB each, that all 8-bit states share."""


RULES: dict[str, Rule] = {
    "adamw_torch": Rule(_adamw_torch, _foreach_adamw),
    "adamw_torch_fused": Rule(_adamw_torch),
    "adamw_bnb_8bit": Rule(_bnb(2, 8), tables=2),
    "adamw_8bit": Rule(_bnb(2, 8), tables=2),
    "lion_32bit": Rule(_bnb(1, 32)),
    "lion_8bit": Rule(_bnb(1, 8), tables=1),
    "adafactor": Rule(_adafactor, _adafactor_temporary),
    "galore_adamw": Rule(_galore, _galore_temporary),
    "sgd": Rule(lambda p, rank: 0),
}
"""The optimizers of transformers whose memory is known; ours come from their parameter groups."""


def known_optimizers() -> tuple[str, ...]:
    """Return every name whose memory can be predicted."""
    return (*optimizer_names(), *RULES)


def is_ours(name: str) -> bool:
    """Tell an optimizer of this package from one of transformers.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    if name not in known_optimizers():
        raise ValueError(f"Unknown optimizer {name!r}. Known: {', '.join(known_optimizers())}.")
    return name in optimizer_names()


def known_in_parts(names: Sequence[str]) -> list[str]:
    """Return those of some optimizers that are known to work on parts of matrices."""
    return [name for name in names if name in _BY_ENTRY or is_ours(name)]


def refuse_unknown_in_parts(names: Sequence[str], flag: str) -> None:
    """Refuse optimizers that are not known to work on parts of matrices.

    Raises:
        ValueError: with the flag that cuts them, and what is known.
    """
    unknown = next((name for name in names if name not in known_in_parts(names)), None)
    if unknown:
        raise ValueError(f"{flag}: expected {', '.join(_BY_ENTRY)} or an optimizer of ours, got {unknown}.")


def optimizer_groups(model: nn.Module, name: str, optim_args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parameter groups that one of our optimizers would get for a model."""
    # A LoRA factor keeps the same in a pair as alone, and has temporaries of about its size either way.
    options = replace(parse_options(name, optim_args), lora="separate")
    return parameter_groups(model, options, lr=1e-3)


def trained_parameters(model: nn.Module, ranks: int = 1) -> list[Parameter]:
    """Return the trainable parameters of a model with their roles; of each the part that one of the ranks holds."""
    return [
        Parameter(shard(entry.parameter.shape, ranks), entry.parameter.dtype, entry.role, entry.layout)
        for entry in partition_parameters(model)
    ]


def optimizer_state_bytes(
    model: nn.Module, name: str, optim_args: Mapping[str, Any] | None = None, ranks: int = 1
) -> int:
    """Predict the bytes of an optimizer's state after its first step, without making the optimizer.

    Args:
        model: the model that is trained, on any device, the meta device included.
        name: one of `known_optimizers()`.
        optim_args: options of the optimizer, strings or Python values.
        ranks: number of ranks over which FSDP2 shards every tensor.

    Raises:
        ValueError: an unknown name, or what `parse_options` and `partition_parameters` refuse.

    Example:
        >>> import torch
        >>> from hf_stateless.reports.predicted.state import optimizer_state_bytes
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False))
        >>> optimizer_state_bytes(model, "sinkgd"), optimizer_state_bytes(model, "adamw_torch_fused")
        (4, 1028)
    """
    optim_args = optim_args or {}
    if is_ours(name):
        groups = optimizer_groups(model, name, optim_args)
        kept = [(OUR_RULES[group["algorithm"]], group, p) for group in groups for p in group["params"]]
        return sum(rule.state_bytes(shard(p.shape, ranks), p.dtype, group) for rule, group, p in kept)
    if unknown := set(optim_args) - ({"rank"} if name == "galore_adamw" else set()):
        raise ValueError(f"optim_args for optim={name!r}: {min(unknown)!r} does not change its memory; leave it out.")
    try:
        rank = int(optim_args.get("rank", _GALORE_RANK))
    except (TypeError, ValueError):
        rank = 0
    if rank < 1:
        raise ValueError(f"optim_args for optim={name!r}: rank={optim_args['rank']!r} is no integer of at least 1.")
    return rule_bytes(name, trained_parameters(model, ranks), rank)


def rule_bytes(name: str, params: Sequence[Parameter], rank: int = _GALORE_RANK) -> int:
    """Predict the bytes of the state of an optimizer of transformers from its parameters alone."""
    rule = RULES[name]
    shared = rule.tables * _BNB_TABLE * any(p.numel >= _BNB_SMALLEST and p.role != "embedding" for p in params)
    return sum(rule.state(p, rank) for p in params) + shared

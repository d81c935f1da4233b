"""What a rule is: how the parameters of some groups are updated, and what is kept for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ranks.placement import local_shard, shard_number
from ..update.kernels.choice import Verdict
from ..update.layout import Layout, layout_at
from ..update.write import Workspace
from ..weights.noise import RoundingKey, TensorCache, rounding_keys
from ..weights.stored import StoredWeight, is_rounded


@dataclass
class Entry:
    """One parameter with a gradient, in the step of an optimizer."""

    index: int
    """Its position among all parameters of the optimizer, on which its rounding noise depends."""
    param: Tensor
    group: dict[str, Any]
    state: dict[str, Tensor]
    in_backward: bool = False
    """Whether it is updated in backward, where replicas cannot share the work on it."""
    position: int = 0
    """Its place in the group."""
    filled: bool = False
    """Whether this rank has no gradient, and zero stands for it since other ranks may have one."""
    usable: Tensor | None = None
    """A flag on the device that the host has not read: unless it is set, weight, averages and counter stay as they
    are. None where nothing holds it back, as on CPU, where what is held back is left out."""

    @property
    def layout(self) -> Layout:
        """How the matrix lies, or the matrices, of a group that has a `layout`."""
        return layout_at(self.group, self.position)

    @property
    def grad(self) -> Tensor:
        """The gradient; zero where there is none."""
        return torch.zeros_like(self.param) if self.param.grad is None else self.param.grad

    @property
    def step(self) -> Tensor:
        """The one-element counter of its steps."""
        return self.state["step"]


class Host(Protocol):
    """What a rule may use of the optimizer."""

    workspace: Workspace
    cache: TensorCache

    def count(self, entries: Sequence[Entry], verdicts: Sequence[Verdict]) -> None:
        """Count the step of each parameter that is usable and whose gradient was finite; warn where it was not."""

    def entry(self, index: int, *, in_backward: bool = False) -> Entry:
        """Return a parameter by its position, whether it has a gradient or not."""


@dataclass(frozen=True)
class Rule:
    """How the parameters of the groups that name it are updated. `RULES` holds all of them.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.rules import RULES
        >>> RULES["adamw"].state_bytes((4, 8), torch.float32, {})  # two moments and a counter
        260
    """

    update: Callable[[list[Entry], Host], None]
    """Updates parameters of one or several groups; under FSDP2 and for replicas that share work, a collective."""
    state: Callable[[Tensor, Mapping[str, Any]], dict[str, Tensor]]
    """Makes the state of a parameter of a group; it has a one-element `step`."""
    state_bytes: Callable[[Sequence[int], torch.dtype, Mapping[str, Any]], int]
    """Counts the bytes of that state for a shape, a dtype and a group."""
    options: Mapping[str, Any]
    """What its groups hold beside the rows of `OPTIONS` that name the rule, with defaults. Plain values: they are
    saved with the optimizer and read back by torch.load(weights_only=True)."""
    released: str = "all"
    """From which value of `release` on it is updated in backward: `matrices`, `all`, or `never`."""
    has_moments: Callable[[Mapping[str, Any]], bool] = lambda group: True
    """Whether gradients go into averages, which one that is not finite would spoil for good: then it gets none."""
    decays: bool = True
    """Whether the weight decay of the run reaches its groups."""
    takes_complex: bool = False
    """Whether it can update complex parameters; norms are of real matrices."""
    for_tables: bool = False
    """Whether `embeddings=` may name it for embeddings and heads."""
    takes_stored: bool = False
    """Whether it can update weights in a format of their own, such as int8."""
    by_rows: bool = False
    """Whether a row is one token to it. Rows of the low-rank factors of an embedding are not: AdamW updates those."""


def state_on_meta(rule: Rule, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what a rule keeps for a whole parameter as tensors without contents, by shape, dtype and strides."""
    if type(param) in (Tensor, torch.nn.Parameter):
        return rule.state(torch.empty_like(param, device="meta"), group)
    return rule.state(torch.empty(param.shape, dtype=param.dtype, device="meta"), group)


def keys_of(entries: Sequence[Entry], cache: TensorCache) -> list[RoundingKey | None]:
    """Return the rounding keys of parameters that are rounded stochastically, None for the others.

    They are the same on all replicas, and different for each shard and each step.
    """
    rounded = [e for e in entries if e.group["stochastic_rounding"] and is_rounded(local_shard(e.param))]
    # Rows of a weight in a format of its own know their places in the whole matrix, and draw the noise of these.
    placed = [isinstance(local_shard(e.param), StoredWeight) for e in rounded]
    shards = [0 if known else shard_number(e.param) for e, known in zip(rounded, placed, strict=True)]
    keys = dict(zip((e.index for e in rounded), _keys(rounded, shards, cache), strict=True))
    return [keys.get(e.index) for e in entries]


def key_of(entry: Entry, cache: TensorCache) -> RoundingKey | None:
    """Return the rounding key for what a parameter keeps, whatever its own dtype; None for rounding to nearest."""
    return _keys([entry], [shard_number(entry.param)], cache)[0] if entry.group["stochastic_rounding"] else None


def _keys(entries: Sequence[Entry], shards: Sequence[int], cache: TensorCache) -> list[RoundingKey]:
    if not entries:
        return []
    seeds = [int(e.group["seed"]) + 0x01000193 * shard for e, shard in zip(entries, shards, strict=True)]
    return rounding_keys(seeds, [e.index for e in entries], [e.step.to(e.param.device) for e in entries], cache)


def counter(param: Tensor) -> Tensor:
    """Return the counter of a matrix: without any state FSDP2 could not save it.

    In float32 whatever torch's default is: bfloat16 would stop counting at 256.
    """
    return torch.zeros(1, dtype=torch.float32, device=param.device)

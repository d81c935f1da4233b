"""What stands in a model while `from_pretrained` reads its weights, and how it stores those that are in float."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from .awaited import expect
from .convert import quantize_layer, quantize_stack_of
from .holder import Int8Holder, mix
from .linear import Int8Linear
from .parallel import cut_like, quantize_part
from .tables import Int8Table, quantize_table


def await_parts(
    model: PreTrainedModel,
    names: Collection[str],
    stacks: Collection[str],
    tables: Mapping[str, nn.Module],
    group_size: int | None,
) -> None:
    """Put modules that hold 8-bit weights into a model that transformers will cut: it hooks their `forward`.

    Args:
        model: without weights yet.
        names: of the linear layers whose weights are read in float.
        stacks: names of the parameters that modules compute with by themselves.
        tables: the embedding and the head that are stored in 8 bits, by name.
        group_size: see `stored_length`.
    """
    for name in stacks:
        mix(model.get_submodule(name.rpartition(".")[0]), Int8Holder)
    for table in tables.values():
        mix(table, Int8Table)
    for name in names:
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear):
            empty = Int8Linear.like(linear, group_size)
            empty.expect_float()
            model.set_submodule(name, empty)


def expect_stacks(
    model: PreTrainedModel, stacks: Collection[str], group_size: int | None, *, in_parts: bool
) -> Iterator[str]:
    """Make room for the stacks of a folder; yield the names of what may be cut as they are.

    Args:
        model: without weights yet.
        stacks: names of the parameters.
        group_size: see `stored_length`.
        in_parts: transformers will cut the model.
    """
    for name in stacks:
        path, _, own = name.rpartition(".")
        rooms = [f"{path}.{room}" for room in expect(model.get_submodule(path), own, group_size, in_parts=in_parts)]
        if in_parts:
            cut_like(model, name, rooms)
            yield from rooms


class QuantizeLayer(ConversionOps):  # type: ignore[misc]
    """Called with each float weight of a checkpoint as it is read."""

    def __init__(self, group_size: int | None, stacks: Collection[str], tables: Collection[str]) -> None:
        self.group_size, self.stacks = group_size, stacks
        self.tables = {f"{name}.weight" for name in tables}

    def convert(self, input_dict: dict[str, Any], *, model: PreTrainedModel, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Put 8-bit layers into the model, and return their parameters."""
        weights: dict[str, torch.Tensor] = {}
        for name, weight in input_dict.items():
            path, _, own = name.rpartition(".")
            module = model.get_submodule(path)
            read = nn.Parameter(weight[0] if isinstance(weight, list) else weight, requires_grad=True)
            place = getattr(module, own)
            if isinstance(place, DTensor):
                weights[name] = quantize_part(place, read.detach(), self.group_size)
                continue
            setattr(module, own, read)
            if name in self.tables:
                weights[name] = quantize_table(module, self.group_size)
            elif name in self.stacks:
                weights[name] = quantize_stack_of(model, name, self.group_size)
            else:
                weights[name] = quantize_layer(model, path, self.group_size).weight
        return weights

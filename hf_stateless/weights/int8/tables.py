"""Embeddings and heads in 8 bits: rows are made as they are looked up, scores for some tokens at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

from .checks import check_gathered, note_scale
from .codes import checked_codes, dequantize_matrix, quantize_stack, stored_length
from .holder import Int8Holder, mix, put, scale_name
from .parallel import adopt_part, store_part
from .sharded import Int8Shard, shard_of
from .weight import Int8Weight


# Weights of a head that are in float at once.
_BLOCK = 1 << 25


class Int8Table(Int8Holder):
    """A table (tokens, features) in 8 bits. A head that is tied to an embedding has its weight, and no scales beside.

    Codes are saved under the name of the weight, so that what transformers knows of tied names stays true.
    """

    @property
    def _hf_quantized_needs_local_tp(self) -> bool:
        """Have `forward` see this rank's parts under tensor parallelism of transformers, without DTensors."""
        return True

    def codes_name(self, name: str) -> str:
        """Return the name of the weight."""
        return name

    @classmethod
    def bases(cls, kind: type[nn.Module]) -> tuple[type, ...]:
        """Return the class for embeddings or heads; behind a class of its own, whose code calls the plain table's."""
        mixin = Int8Embedding if issubclass(kind, nn.Embedding) else Int8Head
        return (mixin,) if kind in (nn.Embedding, nn.Linear) else (kind, mixin)

    def _held_weight(self) -> Any:
        """Return the weight to compute with: whole, or this rank's part where the module shall compute with that."""
        weight, scale = self._parameters["weight"], self._parameters.get(scale_name("weight"))
        assert weight is not None
        check_gathered(weight)
        if scale is not None:  # a tied head has none
            note_scale(weight, scale)
        return weight


class Int8Embedding(Int8Table, nn.Embedding):
    """Looks up the rows of a table in 8 bits."""

    weight: Int8Weight

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of tokens, (..., features)."""
        weight, padding, elsewhere = self._held_weight(), self.padding_idx, None
        if isinstance(weight, Int8Shard) and not weight.place.beside:
            # This rank has the rows of some tokens; the others are zero here, and the ranks add up.
            first = weight.first_row
            padding = None if padding is None or padding < first else padding - first
            elsewhere = (input < first) | (input >= first + len(weight))
            input = (input - first).masked_fill(elsewhere, 0)
        rows: Tensor = _Lookup.apply(  # type: ignore[no-untyped-call]
            weight, weight.codes, weight.scale, input, padding, self.scale_grad_by_freq
        )
        return rows if elsewhere is None else rows.masked_fill(elsewhere.unsqueeze(-1), 0)


class Int8Head(Int8Table, nn.Linear):
    """Y = X W^T + b with a row of W for each token, of which only some are in float at once."""

    weight: Int8Weight

    def forward(self, input: Tensor) -> Tensor:
        """Return the scores, (..., tokens)."""
        device, weight = input.device.type, self._held_weight()
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        scores: Tensor = _Scores.apply(input, weight, weight.codes, weight.scale)  # type: ignore[no-untyped-call]
        return scores if self.bias is None else scores + self.bias.to(scores.dtype)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, codes: Tensor, scale: Tensor, tokens: Tensor, padding: int | None, by_frequency: bool
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.options = codes.shape[0], -1 if padding is None else padding, by_frequency
        some = tokens.reshape(-1)
        return dequantize_matrix(codes[some], scale[some], weight.dtype).view(*tokens.shape, codes.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_weight = None
        if ctx.needs_input_grad[0]:
            of_weight = torch.ops.aten.embedding_dense_backward(grad, *ctx.saved_tensors, *ctx.options)
        return of_weight, None, None, None, None, None


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(input, codes, scale)
        scores = input.new_empty(*input.shape[:-1], len(codes))
        for rows in _blocks(codes):
            scores[..., rows] = functional.linear(input, dequantize_matrix(codes[rows], scale[rows], input.dtype))
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, codes, scale = ctx.saved_tensors
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            wide = torch.promote_types(grad.dtype, torch.float32)
            summed = torch.zeros(input.shape, dtype=wide, device=input.device)
            for rows in _blocks(codes):
                summed += grad[..., rows].matmul(dequantize_matrix(codes[rows], scale[rows], grad.dtype))
            of_input = summed.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = grad.reshape(-1, grad.shape[-1]).mT.matmul(input.reshape(-1, input.shape[-1]))
        return of_input, of_weight, None, None


def _blocks(table: Tensor) -> list[slice]:
    at_once = max(1, _BLOCK // max(1, table.shape[1]))
    return [slice(first, first + at_once) for first in range(0, len(table), at_once)]


def tables_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the embedding of a model and its head, by name, as far as they can be stored in 8 bits."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    return {names[id(table)]: table for table in tables if id(table) in names and _is_plain(table)}


def _is_plain(table: Any) -> bool:
    if isinstance(table, Int8Table):
        return True
    looked_up = isinstance(table, nn.Embedding) and table.max_norm is None and not table.sparse
    return (looked_up or type(table) is nn.Linear) and min(table.weight.shape) > 1


def quantize_table(table: nn.Module, group_size: int | None) -> nn.Parameter:
    """Store an embedding or a head in 8 bits, in place; nothing is done where it is stored so already.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    weight = table._parameters["weight"]
    assert weight is not None
    if isinstance(weight, Int8Weight) or shard_of(weight) is not None:
        return weight
    stored = quantize_stack(weight.detach(), group_size)
    return put(mix(table, Int8Table), "weight", *stored, weight.dtype, weight.requires_grad)


def finish_tables(tables: Mapping[str, nn.Module], group_size: int | None) -> None:
    """Take over what was read for tables, store in 8 bits what was not, and keep tied ones tied.

    Args:
        tables: by name, an embedding before the head that is tied to it.
        group_size: see `stored_length`.

    Raises:
        ValueError: codes or scales are missing or damaged, or a weight is NaN or infinite.
    """
    for name, table in tables.items():
        before = table._parameters["weight"]
        try:
            if "_float_dtype" in table.__dict__:
                _adopt(table)
            store_part(table, "weight", group_size)
            weight = quantize_table(table, group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for other in tables.values():
            if other is not table and other._parameters["weight"] is before:
                mix(other, Int8Table)._parameters["weight"] = weight


def expect_tables(tables: Mapping[str, nn.Module], group_size: int | None, *, in_parts: bool = False) -> None:
    """Make room, without memory, for what a file names, until `finish_tables`; for tied tables in one of them.

    Args:
        tables: by name.
        group_size: see `stored_length`.
        in_parts: the rooms may be cut over ranks, so that they have the dimensions of the weights.
    """
    for table in tables.values():
        weight = table._parameters["weight"]
        assert weight is not None
        (tokens, features), holder = weight.shape, mix(table, Int8Table)
        groups = features // stored_length(features, group_size)
        holder.__dict__["_float_dtype"] = weight.dtype
        of_codes = weight.shape if in_parts else (tokens, groups, features // groups)
        for name, size in {"weight": of_codes, scale_name("weight"): (tokens, groups)}.items():
            dtype = torch.int8 if name == "weight" else torch.bfloat16
            room = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)
            holder._parameters[name] = room


def _adopt(table: nn.Module) -> None:
    codes, scale = table._parameters["weight"], table._parameters[scale_name("weight")]
    dtype = table.__dict__.pop("_float_dtype")
    assert codes is not None
    assert scale is not None
    if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in (codes, scale)):
        raise ValueError("its codes and scales are missing.")
    if isinstance(scale, DTensor):
        adopt_part(table, "weight", codes, scale, codes.shape, dtype)
        return
    tokens, groups, length = codes.shape
    checked = checked_codes(codes.detach(), scale.detach(), (tokens, groups * length), length)
    put(table, "weight", checked, scale.detach(), dtype, True)

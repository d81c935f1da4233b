"""`Int8Linear`: a linear layer that makes its float weight when it is needed, and forgets it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from .checks import check_gathered, note_scale, refuse_to_float
from .codes import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    checked_codes,
    dequantize_matrix,
    group_length,
    quantize_matrix,
    stored_length,
)
from .packed import PER_WORD, unpack, words
from .parallel import adopt_part, store_part
from .product import int8_product
from .sharded import check_scale, shard_of
from .sharded_layer import codes_of, load_sharded, move_sharded
from .weight import Int8Weight, Scale


_STORED = ("weight", "weight_scale", "weight_packed", "weight_shape")
_IN_FLOAT = ("weight",)


class Int8Linear(nn.Linear):
    r"""Y = X W^T + b with W in R^{out x in} stored as int8 codes and bfloat16 scales, trainable.

    Forward and backward each make the float weight for the moment of their product. The gradient of the weight goes to
    the parameter as for any layer: layer-wise updates take it at once, otherwise it accumulates. A state dict holds
    `weight` (int8, one group of codes beside the other) and `weight_scale`. No plain layer takes a `weight` of that
    shape, so that who does not know the format gets an error and no wrong weights. `weight_packed`, which
    `save_pretrained` writes in its place, is loaded too, and a float `weight` is quantised when it is loaded.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        bias: whether there is one, in float.
        group_size: weights of a row that share a scale, see `stored_length`; None for one scale per row.
        device: where the codes are.
        dtype: of the gradient, of the bias, and of the layer where no input says otherwise.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.int8.linear import Int8Linear
        >>> layer = Int8Linear.from_float(torch.nn.Linear(256, 8, bias=False), group_size=128)
        >>> layer(torch.ones(1, 256)).sum().backward()
        >>> {name: (t.dtype, tuple(t.shape)) for name, t in layer.state_dict().items()}
        {'weight': (torch.int8, (8, 2, 128)), 'weight_scale': (torch.bfloat16, (8, 2))}
        >>> layer.weight.grad.dtype
        torch.float32
    """

    weight: Int8Weight
    weight_scale: Scale
    ours: bool = True
    """Whether every group was written by `requantize_`; those of other programs need not have a code of 126 or 127."""
    from_conv1d: bool = False
    """Whether it stands for a `Conv1D` of GPT-2, whose float weight is (in, out); codes are (out, in) all the same."""
    _read_as: tuple[str, ...] = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int | None = 128,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        if self.bias is not None:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        self.group_size = group_size
        groups = in_features // stored_length(in_features, group_size)
        codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        # The smallest scale that requantize_ writes: what a group of zeros has.
        scale = torch.full((out_features, groups), SMALLEST_SCALE, dtype=torch.bfloat16, device=device)
        self.store(codes, scale, dtype or torch.get_default_dtype())

    @classmethod
    def from_float(cls, linear: nn.Linear | Conv1D, group_size: int | None = 128) -> Int8Linear:
        """Return the 8-bit layer nearest to a linear layer or a `Conv1D`; the bias is shared with it.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        layer = cls.like(linear, group_size)
        layer.bias = linear.bias
        weight = linear.weight.T if layer.from_conv1d else linear.weight
        layer.store(*quantize_matrix(weight, group_size), linear.weight.dtype)
        layer.weight.requires_grad_(linear.weight.requires_grad)
        return layer.train(linear.training)

    @classmethod
    def like(cls, linear: nn.Module, group_size: int | None) -> Int8Linear:
        """Return the layer that can hold a linear layer or a `Conv1D` of GPT-2, without memory."""
        weight = linear.weight
        assert isinstance(weight, Tensor)
        layer = cls(*sizes_of(linear), linear.bias is not None, group_size, "meta", weight.dtype)
        layer.from_conv1d = isinstance(linear, Conv1D)
        return layer

    def store(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """Take over codes and scales as they are; the parameters are made anew."""
        self.float_dtype = dtype
        self.weight_scale = Scale(scale.detach())
        self.weight = Int8Weight(codes.detach(), self.weight_scale, dtype)

    def name_of_scale(self, name: str) -> str:
        """Return how the scales of a weight are called."""
        return "weight_scale"

    @property
    def _hf_quantized_needs_local_tp(self) -> bool:
        """Have `forward` see this rank's parts under tensor parallelism of transformers, without DTensors."""
        return True

    @property
    def length(self) -> int:
        """How many weights share a scale."""
        if self._read_as == _IN_FLOAT:
            return stored_length(self.in_features, self.group_size)
        return self.in_features // max(1, self.weight_scale.shape[1])

    @property
    def is_awaited(self) -> bool:
        """Whether there is no memory yet for what a file holds, until `adopt`."""
        return bool(self._read_as)

    def expect_float(self) -> None:
        """Make room, without memory, for a float weight, which may be cut over ranks before it is read."""
        self._read_as = _IN_FLOAT
        room = torch.empty(self.out_features, self.in_features, dtype=self.float_dtype, device="meta")
        self._parameters["weight"], self._parameters["weight_scale"] = nn.Parameter(room), None

    def expect(self, *, packed: bool, ours: bool, in_parts: bool = False) -> None:
        """Make room, without memory, for what a file names, until `adopt`.

        Args:
            packed: it has `weight_packed` and `weight_shape` in place of `weight`.
            ours: this package wrote it.
            in_parts: the room may be cut over ranks.
        """
        self.ours, self._length = ours, self.length
        self._read_as = ("weight_packed", "weight_scale", "weight_shape") if packed else ("weight", "weight_scale")
        # Scales of any float dtype are whole in float32.
        self._parameters["weight_scale"] = _room(self.weight_scale.shape, torch.float32)
        if packed:
            self._parameters["weight"] = None
            # What a model initialises in every layer, before it is known that a file held it: already done, no memory.
            self.__dict__["weight"] = stand_in = torch.empty(self.out_features, self.in_features, device="meta")
            stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
            self.weight_packed = _room((self.out_features, words(self.in_features)), torch.int32)
            self.weight_shape = _room((2,), torch.int64)
        elif in_parts:
            self._parameters["weight"] = _room(self._shape, torch.int8)

    def adopt(self) -> bool:
        """Take over what `from_pretrained` has read; False if it found nothing, and the weight is still to be made.

        Raises:
            ValueError: codes or scales are missing or damaged.
        """
        if self._read_as == _IN_FLOAT:
            self._adopt_float()
            return True
        tensors = {name: self._parameters[name] for name in self._read_as}
        read = [getattr(tensor, "_is_hf_initialized", False) for tensor in tensors.values()]
        if any(read) and not all(read):
            raise ValueError(f"only its {'codes' if read[0] else 'scales'} are there.")
        for name in {"weight_packed", "weight_shape"} & tensors.keys():
            del self._parameters[name]
        self.__dict__.pop("weight", None)
        self._read_as = ()
        if all(read):
            codes, scale, *shape = (tensor.detach() for tensor in tensors.values() if tensor is not None)
            if isinstance(scale, DTensor):
                read_as = PER_WORD if shape else 1
                adopt_part(self, "weight", codes, scale, self._shape, self.float_dtype, self._as_ours, read_as=read_as)
                return True
            if shape and not shape[0].is_meta and shape[0].tolist() != list(self._shape):
                raise ValueError(f"its weight_shape is {shape[0].tolist()}, expected {list(self._shape)}.")
            self.store(*self._as_ours(codes, scale, self._shape), self.float_dtype)
        return all(read)

    def _adopt_float(self) -> None:
        """Store what was read in float, or initialised; of what is cut over ranks most is stored as it is read."""
        weight, length = self._parameters["weight"], self.length
        assert weight is not None
        self._read_as = ()
        if isinstance(weight, DTensor):
            store_part(self, "weight", length)
        elif not isinstance(weight, Int8Weight):
            self.store(*quantize_matrix(weight, length), self.float_dtype)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _as_ours(self, codes: Tensor, scale: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return what was read in our dtypes; codes of another program are made anew if a scale is no bfloat16."""
        codes = unpack(codes, shape[1]) if codes.dtype == torch.int32 else codes
        short = scale.bfloat16()
        if not self.ours:
            if not bool(((scale >= 0) & (scale <= LARGEST_SCALE)).all()):
                raise ValueError(
                    "a scale is NaN, infinite or negative, so the file is damaged: copy the folder again."
                )
            short.clamp_(min=SMALLEST_SCALE)
        codes = checked_codes(codes, short, shape, self._length, ours=self.ours)
        if self.ours or torch.equal(short.float(), scale.float().clamp(min=SMALLEST_SCALE)):
            return codes, short
        self.ours = True
        return quantize_matrix(dequantize_matrix(codes, scale.float()), self._length)

    def to_float(self, dtype: torch.dtype) -> nn.Linear | Conv1D:
        """Return the plain layer with the dequantised weight, of the kind that it was made from."""
        refuse_to_float(self.weight)
        weight, sizes = self.weight.dequantize(dtype), (self.in_features, self.out_features)
        linear: nn.Linear | Conv1D
        with torch.device("meta"):
            linear = Conv1D(*sizes[::-1]) if self.from_conv1d else nn.Linear(*sizes, self.bias is not None)
        weight = weight.T.contiguous() if self.from_conv1d else weight
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return X W^T + b in the dtype of X, or of autocast."""
        check_gathered(self.weight)
        check_scale(self.weight_scale)
        note_scale(self.weight, self.weight_scale)
        device = input.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        output = int8_product(input, self.weight, self.weight.codes, self.weight_scale)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"{super().extra_repr()}, group_size={self.group_size}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        if self._read_as:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        weight, scale = self.weight, self.weight_scale
        self._parameters["weight"] = self._parameters["weight_scale"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"], self._parameters["weight_scale"] = weight, scale
        if shard_of(weight) is not None:
            move_sharded(self, "weight", fn)
        elif not (weight.is_meta or fn(torch.empty(0, device=weight.device)).is_meta):
            scale.data = scale.data.to(fn(scale.data).device)  # moved, never cast
            weight.move_(fn)
        else:  # what has no memory, or loses it, cannot keep its identity
            scale_data = fn(scale.data).to(scale.dtype)
            self.store(fn(weight.codes), scale_data, fn(torch.empty((), dtype=weight.dtype)).dtype)
            self.weight.requires_grad_(weight.requires_grad)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        codes = destination.get(f"{prefix}weight")
        if shard_of(self.weight) is not None and not keep_vars:
            destination[f"{prefix}weight"] = codes_of(self.weight)
        elif codes is not None and codes.dtype == torch.int8 and not keep_vars and not self._read_as:
            destination[f"{prefix}weight"] = codes.view(*self.weight_scale.shape, -1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: list[str]
    ) -> None:
        taken = {n: state_dict.pop(prefix + n) for n in _STORED if prefix + n in state_dict}
        missing, unexpected, errors = lists
        stored = {name: taken.get(name) for name in ("weight", "weight_scale")}
        try:
            if "weight_packed" in taken:
                stored["weight"] = unpack(taken["weight_packed"], self.in_features)
            self._load_stored(stored["weight"], stored["weight_scale"])
        except ValueError as error:
            errors.append(f"{prefix}weight: {error}")
        # Out of the way of nn.Linear, at their places: the order of parameters decides their rounding noise.
        expected = {name: self._parameters[name] for name in stored}
        self._parameters.update(dict.fromkeys(stored))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)  # type: ignore[no-untyped-call]
        self._parameters.update(expected)
        state_dict.update({prefix + name: tensor for name, tensor in taken.items()})
        if not taken.keys() & {"weight", "weight_packed"}:
            missing.append(f"{prefix}weight")
        if "weight_scale" not in taken and not ("weight" in taken and taken["weight"].is_floating_point()):
            missing.append(f"{prefix}weight_scale")

    def _load_stored(self, weight: Tensor | None, scale: Tensor | None) -> None:
        """Copy codes and scales, or the codes and scales of a float weight."""
        if weight is None or (scale is None and not weight.is_floating_point()):
            return
        if shard_of(self.weight) is not None:
            load_sharded(self, "weight", weight, scale, ours=self.ours)
            return
        if weight.is_floating_point():
            weight, scale = quantize_matrix(weight.T if self.from_conv1d else weight, self.length)
        assert scale is not None
        divisor = group_length(self.in_features, self.group_size)
        by_divisor = tuple(scale.shape) == (self.out_features, self.in_features // divisor)
        length = divisor if by_divisor else self.length
        weight = checked_codes(weight, scale, self._shape, length, ours=self.ours)
        if self.weight.is_meta:
            self.store(weight, scale, self.weight.dtype)
            return
        self.weight.codes.copy_(weight)
        if scale.shape == self.weight_scale.shape:
            self.weight_scale.data.copy_(scale)
        else:  # rows that the group size does not divide may come in groups of another length
            self.weight_scale.data = scale.to(self.weight_scale.device, copy=True)


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """Return the lengths of inputs and outputs of a linear layer, or of a `Conv1D`."""
    return linear.weight.shape if isinstance(linear, Conv1D) else linear.weight.shape[::-1]  # type: ignore


def _room(shape: Sequence[int], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device="meta"), requires_grad=False)

"""`Int8Linear`: a linear layer that makes its float weight when it is needed, and forgets it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .codes import SMALLEST_SCALE, checked_codes, dequantize_matrix, group_length, quantize_matrix
from .weight import Int8Weight, Scale


class Int8Linear(nn.Linear):
    r"""Y = X W^T + b with W in R^{out x in} stored as int8 codes and bfloat16 scales, trainable.

    Forward and backward each make the float weight for the moment of their product. The gradient of the weight goes to
    the parameter as for any layer: layer-wise updates take it at once, otherwise it accumulates. A state dict holds
    `weight` (int8, one group of codes beside the other) and `weight_scale`. No plain layer takes a `weight` of that
    shape, so that who does not know the format gets an error and no wrong weights. A float `weight` is quantised when
    it is loaded.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        bias: whether there is one, in float.
        group_size: weights of a row that share a scale, see `group_length`; None for one scale per row.
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
        groups = in_features // group_length(in_features, group_size)
        codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        # The smallest scale that requantize_ writes: what a group of zeros has.
        scale = torch.full((out_features, groups), SMALLEST_SCALE, dtype=torch.bfloat16, device=device)
        self.store(codes, scale, dtype or torch.get_default_dtype())

    @classmethod
    def from_float(cls, linear: nn.Linear, group_size: int | None = 128) -> Int8Linear:
        """Return the 8-bit layer nearest to a linear layer; the bias is shared with it.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        layer = cls(linear.in_features, linear.out_features, False, group_size, "meta", linear.weight.dtype)
        layer.bias = linear.bias
        layer.store(*quantize_matrix(linear.weight, group_size), linear.weight.dtype)
        layer.weight.requires_grad_(linear.weight.requires_grad)
        return layer.train(linear.training)

    def store(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """Take over codes and scales as they are; the parameters are made anew."""
        self._dtype = dtype
        self.weight_scale = Scale(scale.detach())
        self.weight = Int8Weight(codes.detach(), self.weight_scale, dtype)

    def adopt(self) -> bool:
        """Take over the codes and scales that `from_pretrained` has read; False if it found none and made new weights.

        Raises:
            ValueError: codes or scales are missing or damaged.
        """
        weight, scale = self._parameters["weight"], self._parameters["weight_scale"]
        if weight is None or scale is None or isinstance(weight, Int8Weight):
            return True
        read = [getattr(tensor, "_is_hf_initialized", False) for tensor in (weight, scale)]
        if all(read):
            self.store(self._checked(weight.detach(), scale.detach()), scale.detach(), self._dtype)
        elif any(read):
            raise ValueError(f"only its {'codes' if read[0] else 'scales'} are there.")
        else:
            self.store(*quantize_matrix(weight, self.group_size), self._dtype)
        return any(read)

    def to_float(self, dtype: torch.dtype) -> nn.Linear:
        """Return the plain layer with the dequantised weight."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.dequantize(dtype), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return X W^T + b in the dtype of X, or of autocast."""
        if type(self.weight) is not Int8Weight:
            raise RuntimeError(
                f"The weight of an 8-bit layer has become a {type(self.weight).__name__}. FSDP and other wrappers "
                "that replace parameters are not supported with 8-bit weights: type distributed_type: MULTI_GPU in "
                "the accelerate config (DDP), or load the model without quantization_config."
            )
        device = input.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        output: Tensor = _Int8Product.apply(input, self.weight, self.weight.codes, self.weight.scale)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"{super().extra_repr()}, group_size={self.group_size}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        weight, scale = self.weight, self.weight_scale
        self._parameters["weight"] = self._parameters["weight_scale"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"], self._parameters["weight_scale"] = weight, scale
        if not (weight.is_meta or fn(torch.empty(0, device=weight.device)).is_meta):
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
        if codes is not None and codes.dtype == torch.int8 and not keep_vars:
            destination[f"{prefix}weight"] = codes.view(*self.weight_scale.shape, -1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: list[str]
    ) -> None:
        stored = {name: state_dict.pop(prefix + name, None) for name in ("weight", "weight_scale")}
        missing, unexpected, errors = lists
        try:
            self._load_stored(stored["weight"], stored["weight_scale"])
        except ValueError as error:
            errors.append(f"{prefix}weight: {error}")
        # Out of the way of nn.Linear, at their places: the order of parameters decides their rounding noise.
        expected = {name: self._parameters[name] for name in stored}
        self._parameters.update(dict.fromkeys(stored))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)  # type: ignore[no-untyped-call]
        self._parameters.update(expected)
        for name, tensor in stored.items():
            if tensor is not None:
                state_dict[prefix + name] = tensor
            elif name == "weight" or stored["weight"] is None or not stored["weight"].is_floating_point():
                missing.append(prefix + name)

    def _checked(self, codes: Tensor, scale: Tensor) -> Tensor:
        return checked_codes(codes, scale, (self.out_features, self.in_features), self.group_size)

    def _load_stored(self, weight: Tensor | None, scale: Tensor | None) -> None:
        """Copy codes and scales, or the codes and scales of a float weight."""
        if weight is None or (scale is None and not weight.is_floating_point()):
            return
        if weight.is_floating_point():
            weight, scale = quantize_matrix(weight, self.group_size)
        assert scale is not None
        weight = self._checked(weight, scale)
        if self.weight.is_meta:
            self.store(weight, scale, self.weight.dtype)
        else:
            self.weight.codes.copy_(weight)
            self.weight_scale.data.copy_(scale)


class _Int8Product(torch.autograd.Function):
    """X W^T from codes and scales; the codes are arguments so that autograd notices when they change too early."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(input, codes, scale)
        return functional.linear(input, dequantize_matrix(codes, scale, input.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, codes, scale = ctx.saved_tensors
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            of_input = grad.matmul(dequantize_matrix(codes, scale, grad.dtype))
        if ctx.needs_input_grad[1]:
            of_weight = grad.reshape(-1, grad.shape[-1]).mT.matmul(input.reshape(-1, input.shape[-1]))
        return of_input, of_weight, None, None

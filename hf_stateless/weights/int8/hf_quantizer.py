"""8-bit training through transformers' own extension point: a quantization config and its `HfQuantizer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .convert import int8_layers, layers_to_quantize, quantize_layer, to_float
from .folder import check_folder, is_own_class
from .linear import Int8Linear
from .weight import Int8Weight


METHOD = "hf_stateless_int8"
"""What `quant_method` in the `config.json` of a saved model says."""


@register_quantization_config(METHOD)
class Int8TrainingConfig(QuantizationConfigMixin):  # type: ignore[misc]
    r"""Linear layers stored in 8 bits and trained as such: `from_pretrained(..., quantization_config=...)`.

    W[i, j] = code[i, j] scale[i, j // g] with int8 codes and bfloat16 scales: 1 + 2/g bytes per weight (counted).
    Loading quantises one layer at a time. Embeddings, the head, tied layers, norms and biases stay in float, and so do
    GPT-2's `Conv1D` and stacks of experts. The optimizers of this package train such a model; others cannot.

    Args:
        group_size: g, how many weights of a row share a scale (128: 1.016 bytes per weight, 64: 1.031); None for one
            scale per row. Where it does not divide the row, the nearest divisor is taken.
        modules_to_not_convert: names of further modules that stay in float, as for transformers' other quantizers.

    Raises:
        ValueError: a group size that is no positive integer, or modules that are no list of names.

    Example:
        >>> from hf_stateless import Int8TrainingConfig
        >>> Int8TrainingConfig(group_size=64).to_dict()
        {'quant_method': 'hf_stateless_int8', 'group_size': 64, 'modules_to_not_convert': None}
    """

    def __init__(
        self, group_size: int | None = 128, modules_to_not_convert: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        kwargs.pop("quant_method", None)
        if kwargs:
            raise ValueError(
                f"Int8TrainingConfig has no option {min(kwargs)!r}. Valid: group_size, modules_to_not_convert."
            )
        if group_size is not None and (type(group_size) is not int or group_size < 1):
            raise ValueError(
                f"group_size={group_size!r}: type a positive integer such as 64 or 128, or None for one scale per row."
            )
        names = modules_to_not_convert
        if names is not None and not (
            isinstance(names, list | tuple | set) and all(isinstance(n, str) for n in names)
        ):
            raise ValueError(
                f"modules_to_not_convert={names!r}: type a list of names of modules, such as ['lm_head']."
            )
        self.quant_method, self.group_size = METHOD, group_size
        self.modules_to_not_convert = None if names is None else list(names)


@register_quantizer(METHOD)
class Int8TrainingQuantizer(HfQuantizer):  # type: ignore[misc]
    """What `from_pretrained`, `save_pretrained` and the Trainer ask about a model with 8-bit layers."""

    requires_calibration = False
    _names: frozenset[str] = frozenset()

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Tell whether a weight that is read in float becomes 8-bit."""
        module, _, name = param_name.rpartition(".")
        return name == "weight" and module in self._names

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Return the bytes per element that a parameter will take."""
        return 1 if self.param_needs_quantization(model, param_name) else float(param.element_size())

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that turns one float weight into an 8-bit layer."""
        return _QuantizeLayer(self.quantization_config.group_size)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Codes and scales are saved as plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The layers have gradients."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """They are trained without adapters: what the Trainer asks for before it trains quantised weights."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        names = layers_to_quantize(model, self.quantization_config.modules_to_not_convert)
        self._names = frozenset(names)
        if self.pre_quantized:
            files = [file for file in kwargs.get("checkpoint_files") or () if str(file).endswith(".safetensors")]
            check_folder(files, model, self.quantization_config.group_size, self._names)
            for name in names:
                linear = model.get_submodule(name)
                sizes = (linear.in_features, linear.out_features, linear.bias is not None)
                empty = Int8Linear(*sizes, self.quantization_config.group_size, "meta", linear.weight.dtype)
                model.set_submodule(name, empty)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name in self._names:
            layer = model.get_submodule(name)
            if isinstance(layer, Int8Linear):
                try:
                    if not layer.adopt() and is_own_class(model):
                        raise ValueError("its codes and scales are missing.")
                except ValueError as error:
                    raise ValueError(f"{model.name_or_path}: {name}: {error}") from None
            else:  # the checkpoint does not hold it, so that it was initialised in float
                quantize_layer(model, name, self.quantization_config.group_size)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return to_float(model, dtype or torch.bfloat16)


class _QuantizeLayer(ConversionOps):  # type: ignore[misc]
    """Called with each float weight of a checkpoint as it is read."""

    def __init__(self, group_size: int | None) -> None:
        self.group_size = group_size

    def convert(self, input_dict: dict[str, Any], *, model: PreTrainedModel, **kwargs: Any) -> dict[str, Int8Weight]:
        """Put 8-bit layers into the model, and return their parameters."""
        weights = {}
        for name, weight in input_dict.items():
            module = name.removesuffix(".weight")
            linear = model.get_submodule(module)
            linear.weight = nn.Parameter(weight[0] if isinstance(weight, list) else weight, requires_grad=True)
            weights[name] = quantize_layer(model, module, self.group_size).weight
        return weights


def quantize(model: PreTrainedModel, config: Int8TrainingConfig | None = None) -> PreTrainedModel:
    r"""Store the linear layers of a model in 8 bits, in place, one at a time; the model can then be trained and saved.

    For a model that is made from a config, to be pretrained; a saved one is better quantised as it is loaded, by
    `from_pretrained(..., quantization_config=Int8TrainingConfig())`, so that it never stands whole in float.

    Args:
        model: a transformers model.
        config: group size and what stays in float.

    Returns:
        The same model.

    Raises:
        ValueError: no linear layer to store, a weight that is NaN or infinite, or a model quantised otherwise.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import hf_stateless
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=2, vocab_size=32)
        >>> model = hf_stateless.quantize(LlamaForCausalLM(config))
        >>> model.model.layers[0].mlp.up_proj
        Int8Linear(in_features=8, out_features=16, bias=False, group_size=128)
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"The model is quantised already ({getattr(model, 'quantization_method', 'unknown method')}): "
            "load it in float, with dtype=torch.bfloat16 and without quantization_config."
        )
    config = config or Int8TrainingConfig()
    for name in layers_to_quantize(model, config.modules_to_not_convert):
        quantize_layer(model, name, config.group_size)
    model.hf_quantizer = Int8TrainingQuantizer(config, pre_quantized=False)
    model.is_quantized, model.quantization_method = True, METHOD
    model.hf_quantizer.postprocess_model(model)
    return model


def dequantize(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    r"""Turn a model with 8-bit layers into a plain one with W = codes scale, in place, one layer at a time.

    What is saved afterwards loads anywhere, and converts to any format that plain models convert to.

    Args:
        model: from `quantize`, or loaded with an `Int8TrainingConfig`; a PEFT model over one can be merged afterwards.
        dtype: of all parameters; the weights are rounded to it once.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no 8-bit layer of this package.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import hf_stateless
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=2, vocab_size=32)
        >>> model = hf_stateless.dequantize(hf_stateless.quantize(LlamaForCausalLM(config)))
        >>> model.model.layers[0].mlp.up_proj, model.dtype
        (Linear(in_features=8, out_features=16, bias=False), torch.bfloat16)
    """
    if not any(True for _ in int8_layers(model)):
        raise ValueError(
            f"{type(model).__name__} has no 8-bit layer of hf_stateless: pass a model that was loaded with "
            "quantization_config=hf_stateless.Int8TrainingConfig(), or made by hf_stateless.quantize(model)."
        )
    model.dequantize(dtype)
    model.config.dtype = dtype
    return model

"""8-bit training through transformers' own extension point: the `HfQuantizer` of `Int8TrainingConfig`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from .awaited import adopt, is_expected
from .codes import group_length, stored_length
from .compressed import Group, stored_layers
from .config import DEFAULT_GROUP_SIZE, METHOD, Int8TrainingConfig
from .convert import (
    int8_layers,
    int8_weights,
    keep_own_names,
    layers_to_quantize,
    packed_state,
    quantize_layer,
    quantize_stack_of,
    stacks_to_quantize,
    to_float,
)
from .folder import check_folder, is_own_class
from .linear import Int8Linear, sizes_of
from .parallel import check_plan, is_loaded_in_parts, store_part
from .reading import QuantizeLayer, await_parts, expect_stacks
from .sharded_folder import is_cut, whole_state
from .tables import expect_tables, finish_tables, tables_of


@register_quantizer(METHOD)
class Int8TrainingQuantizer(HfQuantizer):  # type: ignore[misc]
    """What `from_pretrained`, `save_pretrained` and the Trainer ask about a model with 8-bit layers."""

    requires_calibration = False
    _names: frozenset[str] = frozenset()
    _tables: Mapping[str, nn.Module] = {}
    """Embedding and head, where they are stored in 8 bits."""
    _stacks: frozenset[str] = frozenset()
    """Parameters in modules that compute with them by themselves."""
    _rooms: frozenset[str] = frozenset()
    """What is in their places until parts of it are read."""

    def __init__(self, quantization_config: Int8TrainingConfig, **kwargs: Any) -> None:
        # A copy: it will describe this model, and the user's object may be passed for another one.
        super().__init__(copy.copy(quantization_config), **kwargs)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Tell whether a weight that is read in float becomes 8-bit."""
        module, _, name = param_name.rpartition(".")
        weights = self._stacks | self._rooms
        return (name == "weight" and module in self._names | self._tables.keys()) or param_name in weights

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Return the bytes per element that a parameter will take."""
        return 1 if self.param_needs_quantization(model, param_name) else float(param.element_size())

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that turns one float weight into an 8-bit layer."""
        return QuantizeLayer(self.quantization_config.group_size, self._stacks, self._tables)

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

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Return what `save_pretrained` writes: codes are packed one layer at a time, into memory of the host."""
        self.quantization_config.describe(model)
        model.config.quantization_config = self.quantization_config
        keep_own_names(model)
        of_adapters = getattr(model, "_hf_peft_config_loaded", False)
        packed = self.quantization_config.is_packed and not of_adapters
        whole = whole_state(model) if is_cut(model) else None
        return (packed_state(model, whole) if packed else whole), {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_plan(model)
        config, in_parts = self.quantization_config, is_loaded_in_parts(model)
        if not self.pre_quantized:
            self._names = frozenset(layers_to_quantize(model, config.modules_to_not_convert))
            self._stacks = frozenset(stacks_to_quantize(model, config.modules_to_not_convert))
            self._tables = self._tables_of(model)
            if in_parts:
                await_parts(model, self._names, self._stacks, self._tables, config.group_size)
            return model
        layout = config.layout_of_folder()
        layers = stored_layers(model, layout) if layout else self._layers_by_group_size(model)
        self._names = frozenset(layers)
        files = [file for file in kwargs.get("checkpoint_files") or () if str(file).endswith(".safetensors")]
        check_folder(files, model, layers)
        if config.has_stacks:
            self._stacks = frozenset(stacks_to_quantize(model, config.modules_to_not_convert))
        self._rooms = frozenset(expect_stacks(model, self._stacks, config.group_size, in_parts=in_parts))
        self._tables = self._tables_of(model)
        if config.has_tables:
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            read = {name: table for name, table in self._tables.items() if f"{name}.weight" not in tied}
            expect_tables(read, config.group_size, in_parts=in_parts)
        for name, group in layers.items():
            empty = Int8Linear.like(model.get_submodule(name), group.group_size)
            # Without files it is a state dict that is read, in which codes are not packed.
            empty.expect(packed=group.packed and bool(files), ours=group.ours, in_parts=in_parts)
            model.set_submodule(name, empty)
        if in_parts:
            await_parts(model, (), (), self._tables, config.group_size)
        return model

    def _tables_of(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return the embedding and the head that are stored in 8 bits."""
        left_out = self.quantization_config.modules_to_not_convert or []
        tables = tables_of(model) if self.quantization_config.embeddings else {}
        found = {name: table for name, table in tables.items() if should_convert_module(name, left_out)}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        # What is tied is stored in one way or the other.
        return {} if len(found) < len(tables) and any(f"{name}.weight" in tied for name in tables) else found

    def _layers_by_group_size(self, model: PreTrainedModel) -> dict[str, Group]:
        """Return the layers of a folder whose config does not list them, in groups that divide their rows."""
        size, layers = self.quantization_config.group_size, {}
        left_out = self.quantization_config.modules_to_not_convert
        for name in layers_to_quantize(model, left_out, with_routers=not self.quantization_config.has_stacks):
            columns = sizes_of(model.get_submodule(name))[0]
            length = group_length(columns, size)
            layers[name] = Group((), None if length == columns else length, packed=False, ours=True)
        return layers

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name in sorted(self._names):  # the same one is refused on all ranks
            layer = model.get_submodule(name)
            if not isinstance(layer, Int8Linear):  # the checkpoint does not hold it: it was initialised in float
                quantize_layer(model, name, self.quantization_config.group_size)
                continue
            try:
                if layer.is_awaited and not layer.adopt():
                    if is_own_class(model):
                        raise ValueError("its codes and scales are missing.")
                    self._renew(model, name, layer)
            except ValueError as error:
                raise ValueError(f"{model.name_or_path}: {name}: {error}") from None
        for name in sorted(self._stacks):
            self._finish_stack(model, name)
        try:
            finish_tables(self._tables, self.quantization_config.group_size)
        except ValueError as error:
            raise ValueError(f"{model.name_or_path}: {error}") from None
        if self.quantization_config.layout_of_folder():
            self._agree(model)
        self.quantization_config.describe(model)
        if self.pre_quantized and keep_own_names(model):
            model.__dict__["_float_conversions"] = None
        return model

    def _finish_stack(self, model: PreTrainedModel, name: str) -> None:
        """Take over what was read for a weight that a module computes with, or store what was initialised."""
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        try:
            if is_expected(module, own) and not adopt(module, own):
                raise ValueError("its codes and scales are missing.")
            store_part(module, own, self.quantization_config.group_size)
        except ValueError as error:
            raise ValueError(f"{model.name_or_path}: {name}: {error}") from None
        quantize_stack_of(model, name, self.quantization_config.group_size)

    def _renew(self, model: PreTrainedModel, name: str, layer: Int8Linear) -> None:
        """Initialise a layer that this class of model has and the folder lacks."""
        device = next(model.parameters()).device if layer.bias is None else layer.bias.device
        linear = nn.Linear(layer.in_features, layer.out_features, False, device=device, dtype=layer.float_dtype)
        linear.bias = layer.bias
        model._init_weights(linear)
        renewed = Int8Linear.from_float(linear, layer.length)
        renewed.from_conv1d = layer.from_conv1d
        model.set_submodule(name, renewed)

    def _agree(self, model: PreTrainedModel) -> None:
        """Do what the user's config asks of layers that have a layout already: keep some in float, or refuse.

        Raises:
            ValueError: another group size is asked for than the folder has.
        """
        config = self.quantization_config
        asked, left_out = config.group_size, config.modules_to_not_convert or []
        head = model.get_output_embeddings()
        for name, layer in list(int8_layers(model)):
            if layer is head or not should_convert_module(name, left_out):
                model.set_submodule(name, layer.to_float(layer.weight.dtype))
            elif asked != DEFAULT_GROUP_SIZE and layer.length not in (
                stored_length(layer.in_features, asked),
                group_length(layer.in_features, asked),
            ):
                raise ValueError(
                    f"{model.name_or_path}: got group_size={asked}, and {name} is stored with a scale for "
                    f"{layer.length} weights: leave group_size out."
                )

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return to_float(model, dtype or torch.bfloat16)


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
    for name in stacks_to_quantize(model, config.modules_to_not_convert):
        quantize_stack_of(model, name, config.group_size)
    model.hf_quantizer = Int8TrainingQuantizer(config, pre_quantized=False)
    finish_tables(model.hf_quantizer._tables_of(model), config.group_size)
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
    if not any(True for _ in int8_weights(model)):
        raise ValueError(
            f"{type(model).__name__} has no 8-bit layer of hf_stateless: pass a model that was loaded with "
            "quantization_config=hf_stateless.Int8TrainingConfig(), or made by hf_stateless.quantize(model)."
        )
    model.dequantize(dtype)
    model.config.dtype = dtype
    return model

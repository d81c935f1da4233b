"""`Int8TrainingConfig`: what a user types to train weights in 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import compressed
from .convert import can_be_packed
from .holder import Int8Holder
from .tables import Int8Table


METHOD = "hf_stateless_int8"
"""The `quant_method` of what is trained in 8 bits; folders in our own layout name it in `config.json`."""
DEFAULT_GROUP_SIZE = 128


@register_quantization_config(METHOD)
class Int8TrainingConfig(QuantizationConfigMixin):  # type: ignore[misc]
    r"""Linear layers stored in 8 bits and trained as such: `from_pretrained(..., quantization_config=...)`.

    W[i, j] = code[i, j] scale[i, j // g] with int8 codes and bfloat16 scales: 1 + 2/g bytes per weight (counted).
    Stacks of experts and the projections of `nn.MultiheadAttention` are stored so too. Loading quantises one of them
    at a time. Norms, biases, routers and, by default, embeddings and heads stay in float. The optimizers of this
    package train such a model; others cannot.

    A folder that is in 8 bits already, as this package or another program wrote it in the layout of
    `compressed-tensors`, keeps its codes, scales and groups.

    Args:
        group_size: g, how many weights of a row share a scale (128: 1.016 bytes per weight, 64: 1.031); None for one
            scale per row. Where it does not divide the row, the next of 128, 64 and 32 that does is taken, else the
            nearest divisor.
        modules_to_not_convert: names of further modules that stay in float, as for transformers' other quantizers.
        embeddings: store the token embedding and the head in 8 bits too. AdamW cannot update them: `embeddings=` of
            the optimizer has to be `stateless`, `factored`, `row_moment` or `column_moment`.

    Raises:
        ValueError: a group size that is no positive integer, or modules that are no list of names.

    Example:
        >>> from hf_stateless import Int8TrainingConfig
        >>> Int8TrainingConfig(group_size=64).to_dict()
        {'quant_method': 'hf_stateless_int8', 'group_size': 64, 'modules_to_not_convert': None, 'embeddings': False}
    """

    layout: compressed.Layout | None = None
    """How the folder that is loaded stores its layers, where `compressed-tensors` could load it too."""
    has_stacks: bool = False
    """Whether the folder that is loaded has weights in 8 bits in modules that compute with them by themselves."""
    has_tables: bool = True
    """Whether the folder that is loaded has embeddings in 8 bits, if its config says so."""
    _described: dict[str, Any] | None = None

    def __init__(
        self,
        group_size: int | None = DEFAULT_GROUP_SIZE,
        modules_to_not_convert: Sequence[str] | None = None,
        embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("quant_method", None)
        layout = kwargs.pop("layout", None)  # of a folder that is not packed
        self.has_stacks = kwargs.pop("stacks", None) is True
        if kwargs:
            raise ValueError(
                f"Int8TrainingConfig has no option {min(kwargs)!r}. Valid: embeddings, group_size, "
                "modules_to_not_convert."
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
        if not isinstance(embeddings, bool):
            raise ValueError(f"embeddings={embeddings!r}: type True for embeddings and heads in 8 bits, or False.")
        self.quant_method, self.group_size, self.embeddings = METHOD, group_size, embeddings
        self.modules_to_not_convert = None if names is None else list(names)
        if layout is not None:
            self.layout = compressed.read_layout(layout)

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` says: the layout of `compressed-tensors`, or the arguments of a new config."""
        return self._arguments() if self._described is None else copy.deepcopy(self._described)

    def _arguments(self) -> dict[str, Any]:
        names = ("quant_method", "group_size", "modules_to_not_convert", "embeddings")
        return {name: copy.deepcopy(getattr(self, name)) for name in names}

    def describe(self, model: PreTrainedModel) -> None:
        """Note how the layers of a model are stored."""
        packed = can_be_packed(model)
        described = compressed.describe(model, packed=packed)
        held = any(isinstance(m, Int8Holder) and not isinstance(m, Int8Table) for m in model.modules())
        stacks = {"stacks": True} if held else {}
        layout = {"layout": described} if described["config_groups"] else {}
        self._described = described if packed else {**self._arguments(), **stacks, **layout}

    def layout_of_folder(self) -> compressed.Layout | None:
        """Return the layout of what is loaded; None where its config lists no layers, and for float weights."""
        described = self._described and (self._described if self.is_packed else self._described.get("layout"))
        return self.layout or (compressed.read_layout(described) if described else None)

    @property
    def is_packed(self) -> bool:
        """Whether what was described is written as `compressed-tensors` reads it."""
        return self._described is not None and self._described["quant_method"] != METHOD

    def for_folder(self, stored: Mapping[str, Any]) -> Int8TrainingConfig:
        """Return this config for a folder that has a layout of its own.

        Raises:
            ValueError: its weights are not stored in a way that can be trained.
        """
        config = copy.copy(self)
        config.layout, config.has_tables = compressed.read_layout(stored), False
        return config


def _merge(original: Any) -> Any:
    """Wrap the function by which transformers merges the config of a folder with the one that a user passes.

    It takes them for two formats where a folder in the layout of `compressed-tensors` is to be trained on.
    """

    def merge_quantization_configs(
        quantization_config: Any, quantization_config_from_args: Any, *args: Any, **kwargs: Any
    ) -> Any:
        given, stored = quantization_config_from_args, quantization_config
        if isinstance(given, dict) and given.get("quant_method") == METHOD:
            given = Int8TrainingConfig(**given)
        if isinstance(given, Int8TrainingConfig) and not isinstance(stored, Int8TrainingConfig):
            stored = stored if isinstance(stored, Mapping) else stored.to_dict()
            if stored.get("quant_method") == compressed.METHOD:
                return given.for_folder(stored)
            if stored.get("quant_method") == METHOD and given.to_dict() == Int8TrainingConfig().to_dict():
                return Int8TrainingConfig(**stored)  # as without an argument; transformers would warn of it
        return original(quantization_config, given, *args, **kwargs)

    return merge_quantization_configs


AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge(AutoHfQuantizer.merge_quantization_configs))

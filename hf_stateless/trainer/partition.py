"""From a model to parameter groups: which weights are matrices, which go to AdamW, and how each is laid out.

Parameters are recognised by the module that owns them and by storage, never by name or number of dimensions: a tied
head is the embedding, GPT-2's `Conv1D` is a linear layer stored the other way round, a two-dimensional bias of a
mixture of experts is no matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import check_target_module_exists

from ..optimizer.option_kinds import shown
from .adapters import LoraPair, lora_linears, lora_pairs


ROLES = ("matrix", "adapter", "embedding", "head", "rest")
"""What a parameter is, in the order of the groups: the learning rate that the Trainer logs is the first group's."""

# Expert stacks stored (experts, in, out) whose module does not say so by `is_transposed` (in every supported version).
_IN_OUT_EXPERTS = {"GptOssExperts", "Llama4TextExperts"}
# Classes that choose experts; some hold a linear layer, some are one.
_ROUTER = re.compile(r"Router$|Mo[eE]\w*(Gate|Gating)$")
# What PEFT adds to the name of a layer that it wraps.
_PEFT_TAIL = re.compile(r"\.(lora_\w+|base_layer|original_module|modules_to_save)(\..*)?$")


@dataclass
class PartitionedParameter:
    """One trainable parameter with what the optimizer has to know about it."""

    name: str
    parameter: nn.Parameter
    role: str
    """One of `ROLES`; `adapter` is a LoRA matrix."""
    layout: str
    """How the weight is stored: `out_in`, `in_out` (Conv1D, some experts) or `conv` (out, in, kernel...)."""
    decay: bool
    """Whether the Trainer's rule applies weight decay to it."""
    pair: LoraPair | None = None
    """The pair that it is a factor of, if it belongs to an adapter that can be updated as a product."""


def partition_parameters(
    model: nn.Module, target_modules: str | Sequence[str] | None = None
) -> list[PartitionedParameter]:
    """Assign a role to every trainable parameter of a model, each exactly once, in the order of `ROLES`.

    Linear layers (and `Conv1D`, and stacks of experts) inside the backbone are matrices; input embeddings, whatever
    lies outside the backbone (`lm_head`, classification heads), routers and everything else are not. Frozen and
    quantised weights are left out. Nothing is stored on the model.

    Args:
        model: any module; PEFT models, models without an `lm_head`, compiled and DDP-wrapped models included.
        target_modules: as `TrainingArguments.optim_target_modules`: a list of substrings, a regular expression or
            `"all-linear"` (the default, and the same as None). Explicitly named convolutions, heads and routers become
            matrices too.

    Returns:
        One entry for each trainable parameter; a tied weight appears once. Two parameters over one storage, each with
        a gradient of its own, are two entries with one role.

    Raises:
        ValueError: nothing trainable, no matrix found, FSDP1, or a parameter without a role.
    """
    # FSDP1 turns matrices into flat vectors before the optimizer sees them.
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        refuse_fsdp1()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("The model has no trainable parameter: every requires_grad is False.")
    matrices = _matrix_layouts(model, target_modules)
    heads = _head_keys(model)
    embeddings = {_storage_key(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(False)}
    # The low-rank factors that PEFT trains for an embedding are looked up by token, like the embedding itself.
    wrappers = (m for m in model.modules() if isinstance(getattr(m, "base_layer", None), nn.Embedding))
    embeddings |= {_storage_key(p) for m in wrappers for p in m.parameters() if p.requires_grad}
    pairs = {id(p): pair for pair in lora_pairs(model) for p in (pair.a, pair.b)}
    explicit = not _is_all_linear(target_modules)
    # The Trainer's own rule, a method that does not use its self: norms and biases are not decayed.
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    entries = []
    for name, p in named:
        key = _storage_key(p)
        layout, adapter = matrices.get(key, ("out_in", False))
        if key in embeddings:
            role = "embedding"
        elif key in heads and not (explicit and key in matrices):
            role = "head"
        elif key in matrices:
            role = "adapter" if adapter else "matrix"
        else:
            role = "rest"
        entries.append(PartitionedParameter(name, p, role, layout, name in decayed, pairs.get(id(p))))
    if not any(entry.role in ("matrix", "adapter") for entry in entries):
        _refuse_no_matrix(model, target_modules)
    _keep_pairs_together(entries)
    return sorted(entries, key=lambda entry: ROLES.index(entry.role))


def _keep_pairs_together(entries: list[PartitionedParameter]) -> None:
    """Put B behind its A, in place, and drop a pair whose factors differ in role or decay."""
    place = {id(entry.parameter): i for i, entry in enumerate(entries)}
    kinds = [(entry.role, entry.decay) for entry in entries]
    for entry in entries:
        if entry.pair and kinds[place[id(entry.pair.a)]] != kinds[place[id(entry.pair.b)]]:
            entry.pair = None
        elif entry.pair and entry.pair.layout == "in_out" and entry.parameter is entry.pair.a:
            entry.layout = "in_out"
    entries.sort(key=lambda entry: place[id(entry.pair.a if entry.pair else entry.parameter)])


def describe(groups: Sequence[dict[str, object]]) -> str:
    """Return the table of who went where, one line per group: role, algorithm, tensors, parameters, decay.

    Example:
        >>> import torch
        >>> from hf_stateless.trainer.partition import describe
        >>> print(describe([{"role": "matrix", "algorithm": "multinorm", "weight_decay": 0.0,
        ...                  "params": [torch.zeros(3, 4)]}]))
        role       algorithm          tensors   parameters  weight decay
        matrix     multinorm                1           12           0.0
    """
    lines = [f"{'role':<11}{'algorithm':<19}{'tensors':>7}{'parameters':>13}{'weight decay':>14}"]
    for group in groups:
        params: list[torch.Tensor] = group["params"]  # type: ignore[assignment]
        numel = sum(p.numel() for p in params)
        row = f"{group['role']:<11}{group['algorithm']:<19}{len(params):>7}{numel:>13,}"
        lines.append(f"{row}{group['weight_decay']:>14}")
    return "\n".join(lines)


def _storage_key(p: torch.Tensor) -> tuple[object, ...]:
    """Identify a tensor by its memory, so that two Parameter objects over one storage count as tied."""
    if p.device.type == "meta" or p.numel() == 0 or type(p) not in (nn.Parameter, torch.Tensor):
        return (id(p),)
    return (p.device, p.data_ptr(), tuple(p.shape), p.stride())


def _is_all_linear(target_modules: str | Sequence[str] | None) -> bool:
    return target_modules is None or (
        isinstance(target_modules, str) and target_modules.replace("_", "-") == "all-linear"
    )


def _matrix_layouts(
    model: nn.Module, target_modules: str | Sequence[str] | None
) -> dict[tuple[object, ...], tuple[str, bool]]:
    """Map the storage of each weight that can be treated as a matrix to (layout, belongs to an adapter)."""
    all_linear = _is_all_linear(target_modules)
    found: dict[tuple[object, ...], tuple[str, bool]] = {}
    adapters = {id(m) for module in model.modules() for m in lora_linears(module)}
    routers = {id(m) for module in model.modules() if _ROUTER.search(type(module).__name__) for m in module.modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        wanted = id(module) not in routers - adapters if all_linear else _is_target(target_modules, name)
        for p, layout in _matrix_weights(module, explicit=not all_linear) if wanted else ():
            if p.requires_grad:
                found[_storage_key(p)] = (layout, id(module) in adapters)
    return found


def _is_target(target_modules: str | Sequence[str] | None, name: str) -> bool:
    try:
        return bool(check_target_module_exists(target_modules, name))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"optim_target_modules={shown(target_modules)} is no regular expression ({error}): a string has to match "
            'the whole name of a module, such as ".*q_proj"; type a list for substrings, such as ["q_proj"].'
        ) from None


def _matrix_weights(module: nn.Module, explicit: bool) -> Iterator[tuple[torch.Tensor, str]]:
    """Yield the weights of one module that are matrices, with their layout."""
    if isinstance(module, nn.Linear):
        yield module.weight, "out_in"
    elif isinstance(module, Conv1D):
        yield module.weight, "in_out"
    elif explicit and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        yield module.weight, "conv"
    elif type(module).__name__.endswith("Experts"):
        # FSDP2 puts a subclass of its own in place of the class, so the table is looked up along the bases.
        in_table = any(base.__name__ in _IN_OUT_EXPERTS for base in type(module).__mro__)
        in_out = getattr(module, "is_transposed", False) or in_table
        for p in module.parameters(recurse=False):
            if p.ndim == 3:
                yield p, "in_out" if in_out else "out_in"


def _head_keys(model: nn.Module) -> set[tuple[object, ...]]:
    """Return every weight outside the backbone, and the output embedding wherever it lies; adapters stay matrices."""
    outside: list[nn.Module | None] = []
    for inner in _outermost_transformers(model):
        backbone = inner.base_model
        children = [child for child in inner.children() if all(m is not backbone for m in child.modules())]
        outside += children if backbone is not inner else [child for child in children if _classifies(inner, child)]
    # A model may be made of others that have a head of their own (BLIP-2, encoder-decoder pairs).
    outside += [m.get_output_embeddings() for m in model.modules() if isinstance(m, PreTrainedModel)]
    adapters = {id(m) for module in model.modules() for m in lora_linears(module)}
    return {
        _storage_key(p)
        for root in outside
        if root is not None
        for module in root.modules()
        if id(module) not in adapters
        for p in module.parameters(recurse=False)
    }


def _outermost_transformers(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the transformers models inside PEFT, DDP, `torch.compile` and other wrappers, not the models in those."""
    if isinstance(module, PreTrainedModel):
        yield module
    else:
        for child in module.children():
            yield from _outermost_transformers(child)


def _classifies(model: PreTrainedModel, child: nn.Module) -> bool:
    """Tell a classification head by its outputs, for models that do not name their backbone (CLIP, Whisper)."""
    layer = getattr(child, "original_module", child)  # PEFT wraps what `modules_to_save` names
    return isinstance(layer, nn.Linear) and layer.out_features == getattr(model.config, "num_labels", None)


def refuse_fsdp1() -> NoReturn:
    """Raise the error of FSDP1, with what to type instead."""
    raise ValueError(
        "FSDP1 flattens parameters, so row norms, column norms and whitening are undefined: set fsdp_version: 2 in "
        "the accelerate config, or fsdp_config={'version': 2} in TrainingArguments."
    )


def _refuse_no_matrix(model: nn.Module, target_modules: str | Sequence[str] | None) -> NoReturn:
    names = {
        _PEFT_TAIL.sub("", name).rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if any(p.requires_grad for p, _ in _matrix_weights(module, explicit=True))
    }
    if not names:
        configs = getattr(model, "peft_config", {})
        methods = sorted({str(config.peft_type.value) for config in configs.values()})
        if methods and methods != ["LORA"]:
            raise ValueError(
                f"The model has no trainable matrix: what PEFT's {', '.join(methods)} trains is no weight of a linear "
                "layer. Type optim=adamw_torch, or use LoraConfig (use_rslora and use_dora included)."
            )
        raise ValueError(
            "The model has no trainable matrix: its linear layers are frozen, or it has none. Type optim=adamw_torch."
        )
    found = "a list of them" if _is_all_linear(target_modules) else "a list of them, or 'all-linear'"
    raise ValueError(
        f"optim_target_modules={shown(target_modules)} matched no trainable matrix. Linear layers, convolutions and "
        f"heads of this model: {', '.join(sorted(names))}. Type {found}, such as "
        f"optim_target_modules={[min(names)]!r}."
    )

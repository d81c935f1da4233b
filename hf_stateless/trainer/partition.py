"""From a model to parameter groups: which weights are matrices, which go to AdamW, and how each is laid out.

Parameters are recognised by the module that owns them and by storage, never by name or number of dimensions: a tied
head is the embedding, GPT-2's `Conv1D` is a linear layer stored the other way round, a two-dimensional bias of a
mixture of experts is no matrix.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from transformers import Trainer
from transformers.trainer_utils import check_target_module_exists

from ..update.layout import layout_of
from ..weights.int8.holder import Int8Holder
from ..weights.int8.linear import Int8Linear
from .adapters import LoraPair, expert_layouts, lora_linears, lora_pairs
from .advice import refuse_no_matrix, refuse_target
from .heads import Heads, find_heads
from .matrices import chooses, is_thin, matrix_weights, pointwise
from .patches import decay_rule


ROLES = ("matrix", "adapter", "embedding", "head", "rest")
"""What a parameter is, in the order of the groups: the learning rate that the Trainer logs is the first group's."""


@dataclass
class PartitionedParameter:
    """One trainable parameter with what the optimizer has to know about it."""

    name: str
    parameter: nn.Parameter
    role: str
    """One of `ROLES`; `adapter` is a LoRA matrix."""
    layout: str
    """How the weight is stored: `out_in`, `in_out` (Conv1D, some experts), `conv` (out, in, kernel...), or several
    matrices in one, such as `out_in*3`; see `layout_of`."""
    decay: bool
    """Whether the Trainer's rule applies weight decay to it."""
    pair: LoraPair | None = None
    """The pair that it is a factor of, if it belongs to an adapter that can be updated as a product."""
    tied: bool = False
    """Whether it is an embedding and a head in one."""


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
        ValueError: nothing trainable, no matrix found, FSDP1, or a parameter without a shape.
    """
    # FSDP1 turns matrices into flat vectors before the optimizer sees them.
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        refuse_fsdp1()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("The model has no trainable parameter: every requires_grad is False.")
    lazy = next((name for name, p in named if is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(f"{lazy} has no shape yet: run a forward pass before the optimizer is made.")
    matrices = _matrix_layouts(model, target_modules)
    heads = _keys_of(model, find_heads(model))
    embeddings = _embedding_keys(model)
    pairs = {id(p): pair for pair in lora_pairs(model) for p in (pair.a, pair.b)}
    explicit = not _is_all_linear(target_modules)
    # The Trainer's own rule is a method that does not use its self: norms and biases are not decayed.
    decays = decay_rule() or functools.partial(Trainer.get_decay_parameter_names, None)  # type: ignore[arg-type]
    decayed = set(decays(model))
    entries = []
    for name, p in named:
        key = _storage_key(p)
        found = matrices.get(key)
        if key in embeddings:
            role = "embedding"
        elif key in heads and not (explicit and found):
            role = "head"
        else:
            role = found.role if found else "rest"
        layout = found.layout if found else "out_in"
        tied = key in embeddings and key in heads
        entries.append(PartitionedParameter(name, p, role, layout, name in decayed, pairs.get(id(p)), tied))
    _take_back_pointwise(entries, matrices)
    if not any(entry.role in ("matrix", "adapter") for entry in entries):
        others = _matrix_layouts(model, None).keys() - heads - embeddings
        refuse_no_matrix(model, target_modules, _selectable(model), typed=explicit, all_linear=bool(others))
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


def _storage_key(p: torch.Tensor) -> tuple[object, ...]:
    """Identify a tensor by its memory, so that two Parameter objects over one storage count as tied."""
    if p.device.type == "meta" or p.numel() == 0 or type(p) not in (nn.Parameter, torch.Tensor):
        return (id(p),)
    return (p.device, p.data_ptr(), tuple(p.shape), p.stride())


def _is_all_linear(target_modules: str | Sequence[str] | None) -> bool:
    return target_modules is None or (
        isinstance(target_modules, str) and target_modules.replace("_", "-") == "all-linear"
    )


@dataclass
class _Found:
    """What a weight is as a matrix."""

    layout: str
    role: str
    only_beside_others: bool
    """A convolution of one point in more than one dimension: a matrix where the model has others."""


def _matrix_layouts(model: nn.Module, target_modules: str | Sequence[str] | None) -> dict[tuple[object, ...], _Found]:
    """Find each weight that can be treated as a matrix, by its storage."""
    explicit = not _is_all_linear(target_modules)
    found: dict[tuple[object, ...], _Found] = {}
    adapters = {id(m) for module in model.modules() for m in lora_linears(module)}
    of_experts = expert_layouts(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        parents = tuple(modules[name[:end]] for end in [0, *(at.start() for at in re.finditer(r"\.", name))] if name)
        is_adapter, point = id(module) in adapters, pointwise(module)
        # AdamW cannot update 8-bit weights, so what is stored so is a matrix whatever it does.
        always = is_adapter or isinstance(module, Int8Linear | Int8Holder)
        if explicit:
            wanted = _is_target(target_modules, name, model)
        else:
            wanted = always or not (chooses(name, module, parents) or (point and _in_tuner_layer(parents)))
        for p, layout in matrix_weights(module, convolutions=explicit or point) if wanted else ():
            thin = not (explicit or always) and is_thin(layout_of(layout).sizes(p.shape))
            if p.requires_grad and not thin:
                beside = point and not explicit and not isinstance(module, nn.Conv1d)
                layout = of_experts.get(id(module), layout)
                found[_storage_key(p)] = _Found(layout, "adapter" if is_adapter else "matrix", beside)
    return found


def _in_tuner_layer(parents: Sequence[nn.Module]) -> bool:
    return any(hasattr(m, "base_layer") for m in parents)


def _take_back_pointwise(entries: Sequence[PartitionedParameter], matrices: dict[tuple[object, ...], _Found]) -> None:
    """Leave convolutions of one point to AdamW, in place, where they would be the only matrices."""
    taken = [(entry, matrices.get(_storage_key(entry.parameter))) for entry in entries if entry.role == "matrix"]
    if all(found is not None and found.only_beside_others for _, found in taken):
        for entry, _ in taken:
            entry.role, entry.layout = "rest", "out_in"


def _embedding_keys(model: nn.Module) -> set[tuple[object, ...]]:
    """Return what is looked up by token or position: embeddings, and the factors that PEFT trains for them."""
    tables = [m for m in model.modules() if _is_table_of_rows(m)]
    keys = {_storage_key(p) for m in tables for p in m.parameters(False)}
    wrappers = (m for m in model.modules() if isinstance(getattr(m, "base_layer", None), nn.Embedding))
    return keys | {_storage_key(p) for m in wrappers for p in m.parameters() if p.requires_grad}


def _is_table_of_rows(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None) if type(module).__name__.endswith("Embedding") else None
    is_table = isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return is_table or (isinstance(weight, nn.Parameter) and weight.ndim == 2)


def _keys_of(model: nn.Module, heads: Heads) -> set[tuple[object, ...]]:
    return {_storage_key(p) for m in model.modules() if id(m) in heads.modules for p in m.parameters(recurse=False)}


def _is_target(target_modules: str | Sequence[str] | None, name: str, model: nn.Module) -> bool:
    try:
        return bool(check_target_module_exists(target_modules, name))
    except (re.error, OverflowError, RecursionError, TypeError) as error:
        refuse_target(target_modules, error, _selectable(model))


def _selectable(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trained weights, by the names of their modules, that become matrices once they are named."""
    embeddings = {_storage_key(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(False)}
    return {
        name: [
            p
            for p, _ in matrix_weights(module, convolutions=True)
            if isinstance(p, nn.Parameter) and p.requires_grad and _storage_key(p) not in embeddings
        ]
        for name, module in model.named_modules()
    }


def refuse_fsdp1() -> NoReturn:
    """Raise the error of FSDP1, with what to type instead."""
    raise ValueError(
        "FSDP1 flattens parameters, so row norms, column norms and whitening are undefined: set fsdp_version: 2 in "
        f"the accelerate config ({convert_command()} writes it), or fsdp_config={{'version': 2}} in TrainingArguments."
    )


def convert_command(file: str | os.PathLike[str] | None = None) -> str:
    """Return what writes the accelerate config of FSDP2 for a config of DeepSpeed or FSDP1, here CONFIG if unknown."""
    return f"hf-stateless convert-config {shlex.quote(os.fspath(file)) if file else 'CONFIG'} -o fsdp2.yaml"

"""From a model and checked options to the optimizer: parameter groups, `create_optimizer`, and the factory classes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..optimizer.followed import TABLE_OPTIONS
from ..optimizer.optimizer import StatelessOptimizer
from ..optimizer.options import EVERY_RULE, group_values
from ..optimizer.release import is_released
from ..optimizer.rules import RULES
from ..ranks.placement import local_shard
from ..update.layout import listed_layouts
from ..weights.cuts import cuts_of
from ..weights.int8.compressed import METHOD as COMPRESSED
from ..weights.int8.convert import int8_weights
from ..weights.stored import StoredWeight
from .adapters import has_lora
from .advice import refuse_no_model
from .assumed import assumptions
from .choice import otherwise, rule_of
from .clipping import count_released_gradients
from .optim_args import Options, check_target_modules, parse_options
from .parallel_models import refuse_unknown_shards
from .partition import PartitionedParameter, partition_parameters
from .patches import keep_out_of_ddp
from .table import announce, describe, trainer_prints
from .untrained import untrained_note


logger = logging.getLogger(__name__)


def parameter_groups(
    model: nn.Module,
    options: Options,
    *,
    lr: float,
    weight_decay: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return the ordered groups of a model, matrices first, each with the rule and the options it is updated by.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_stateless.trainer.factory import parameter_groups
        >>> from hf_stateless.trainer.optim_args import parse_options
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=2, vocab_size=32)
        >>> groups = parameter_groups(LlamaForCausalLM(config), parse_options("sinkgd", {}), lr=1e-3)
        >>> [(group["role"], group["algorithm"]) for group in groups]
        [('matrix', 'multinorm'), ('embedding', 'adamw'), ('head', 'adamw'), ('rest', 'adamw')]
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    layouts: dict[tuple[Any, ...], list[str]] = {}
    in_8_bits = {id(weight) for _, weight in int8_weights(model)}
    check_target_modules(target_modules)
    entries = partition_parameters(model, target_modules)
    _refuse_feedback(options, entries)
    if any(entry.tied for entry in entries):
        options = replace(options, embedding_lr_scale=options.tied_lr_scale)  # type: ignore[call-arg]
    for entry in entries:
        rule = rule_of(entry, options, lr)
        if id(entry.parameter) in in_8_bits and not RULES[rule["algorithm"]].takes_stored:
            _refuse_stored_table(entry)
            raise ValueError(
                f"{entry.name} is stored in 8 bits but is no matrix here (its role is {entry.role}), and only "
                "matrices can be updated in 8 bits: leave out optim_target_modules, freeze it, or keep it in float by "
                f"Int8TrainingConfig(modules_to_not_convert=[{entry.name.removesuffix('.weight')!r}])."
            )
        decay = weight_decay if entry.decay and RULES[rule["algorithm"]].decays else 0.0
        # Grouped by whether a parameter may decay, not by the value, which a resumed run may change; pairs of LoRA
        # factors in the same groups whether they are updated together or not, so that it may change that too.
        scaling = entry.pair.scaling if entry.pair and "norms" in rule else None
        experts = entry.pair is not None and entry.pair.experts > 1
        if experts and rule["algorithm"] == "multinorm":
            scaling = None
        key = (entry.role, rule["algorithm"], rule.get("layout"), scaling, entry.decay, scaling if experts else None)
        group = groups.setdefault(key, {"params": [], "param_names": [], "role": entry.role})
        group["params"].append(entry.parameter)
        group["param_names"].append(entry.name)
        group.update(rule, weight_decay=decay, **group_values(EVERY_RULE, options, entry.role))
        layouts.setdefault(key, []).append(entry.layout)
    for key, group in groups.items():
        if "layout" in group and group["layout"] != "vector":
            group["layouts"] = listed_layouts(layouts[key])
    return list(groups.values())


def _refuse_feedback(options: Options, entries: Sequence[PartitionedParameter]) -> None:
    """Refuse `rounding_feedback` where there is no momentum to feed, or nothing that is rounded at random to codes."""
    if not options.rounding_feedback:
        return
    stored = [
        e.parameter for e in entries if isinstance(local_shard(e.parameter), StoredWeight) and e.role == "matrix"
    ]
    rows_are_cut = any(split.dim == p.ndim - 1 for p in stored for split in cuts_of(p) or ())
    needs = {
        "an average to feed: type momentum=0.9 as well": options.momentum,
        "stochastic rounding: leave out stochastic_rounding=false": options.stochastic_rounding,
        "weights in 8 bits: load the model with quantization_config=hf_stateless.Int8TrainingConfig()": stored,
        "whole rows on each rank: load the model without tensor parallelism": not rows_are_cut,
    }
    for need, met in needs.items():
        if not met:
            raise ValueError(f"rounding_feedback=true needs {need}, or leave out rounding_feedback.")


def _refuse_stored_table(entry: PartitionedParameter) -> None:
    """Refuse an embedding or a head in 8 bits whose rule needs float weights."""
    if entry.role in TABLE_OPTIONS:
        rules = [name for name, rule in RULES.items() if rule.takes_stored and rule.for_tables]
        raise ValueError(
            f"{entry.name} is stored in 8 bits, which AdamW cannot update: type {TABLE_OPTIONS[entry.role]}="
            f"{rules[-1] if rules else 'stateless'} in optim_args (or {', '.join([*rules[:-1], 'stateless'])}), or "
            "leave embeddings=True out of Int8TrainingConfig."
        )


def create_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
    **options: Any,
) -> StatelessOptimizer:
    """Make the optimizer of a name for a model, without a Trainer: the same object that `optim=name` gives.

    Args:
        model: the model that is trained; its frozen parameters are left out.
        name: `swan`, `sinkgd`, `sinkgd_polar` or `multinorm`, or one with `_layerwise` for updates in backward.
        lr: learning rate; matrices move by `lr * lr_scale` times an update of entry RMS 1, the AdamW part by
            `adamw_lr`, or `lr` if there is none, times the scale of its kind, which is 1 unless `rates` says more.
        weight_decay: decoupled decay, per unit of learning rate; norms and biases are not decayed.
        target_modules: which modules are matrices: a list, a regular expression or `all-linear` (default).
        options: the keys of `optim_args` as Python values.

    Raises:
        ValueError: unknown name, key or value; no matrix in the model; a learning rate that is not finite; FSDP1.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import hf_stateless
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=2, vocab_size=32)
        >>> optimizer = hf_stateless.create_optimizer(LlamaForCausalLM(config), "sinkgd", lr=1e-3, num_iterations=3)
        >>> optimizer.param_groups[0]["num_iterations"]
        3
    """
    return _create(model, name, options, lr=lr, weight_decay=weight_decay, target_modules=target_modules)


def _create(model: nn.Module, name: str, options: Mapping[str, Any], **settings: Any) -> StatelessOptimizer:
    optimizer = StatelessOptimizer(**optimizer_arguments(model, name, options, **settings), lr=settings["lr"])
    optimizer.train()
    return optimizer


def create_lora_optimizer(model: nn.Module, name: str = "swan", *, lr: float, **options: Any) -> StatelessOptimizer:
    """Make the optimizer of a PEFT model with LoRA adapters, as the factories of `peft.optimizers` do.

    The factors A in R^{r x n} and B in R^{m x r} of an adapter are updated by steepest descent in the change of the
    product B A (`lora=product`, see `hf_stateless.optimizer.lora_product`) or each on its own (`lora=separate`).
    State kept: a one-element `step` for each factor; two moments for what is trained beside the adapters.

    Args:
        model: from `peft.get_peft_model`; LoRA, rsLoRA and DoRA, any number of adapters.
        name: `swan`, `sinkgd`, `sinkgd_polar` or `multinorm`, or one of them with `_layerwise`.
        lr: learning rate; a step changes (alpha / r) B A by entries of root mean square `lr * lr_scale` for each of
            the two factors, so that neither r, alpha nor the shape asks for another one. Start from AdamW's.
        options: the other arguments of `create_optimizer`, and the keys of `optim_args` as Python values.

    Raises:
        ValueError: the model has no trainable LoRA adapter, or what `create_optimizer` refuses.

    Example:
        >>> import torch, hf_stateless
        >>> from peft import LoraConfig, get_peft_model
        >>> layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        >>> model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "1"]))
        >>> optimizer = hf_stateless.create_lora_optimizer(model, "swan", lr=2e-3, lora="product")
        >>> [(group["algorithm"], len(group["params"])) for group in optimizer.param_groups]
        [('lora_product', 4)]

    References:
        Steepest descent in the spectral norm: https://huggingface.co/papers/2409.20325.
    """
    refuse_no_model(model)
    if not has_lora(model):
        raise ValueError(
            "create_lora_optimizer needs a model with a trainable LoRA adapter, got none: make one by "
            "peft.get_peft_model(model, peft.LoraConfig(...)), or type hf_stateless.create_optimizer(model, ...)."
        )
    return create_optimizer(model, name, lr=lr, **options)


def optimizer_arguments(
    model: nn.Module,
    name: str,
    given: Mapping[str, Any],
    *,
    lr: float,
    weight_decay: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
    printed: bool = False,
) -> dict[str, Any]:
    """Return what `StatelessOptimizer` is made from, after all checks and with the table of who went where announced.

    Where updates are done in backward, the model is made ready for DDP. The arguments are those of `create_optimizer`;
    option values may be text. What that refuses is refused here. `printed` says whether the table may be printed where
    logs of level INFO are not seen.
    """
    refuse_no_model(model)
    options = parse_options(name, given)
    _refuse_compressed(model)
    refuse_unknown_shards(model)
    lr, weight_decay = _finite("learning rate", lr), _finite("weight decay", weight_decay)
    groups = parameter_groups(model, options, lr=lr, weight_decay=weight_decay, target_modules=target_modules)
    note = untrained_note(model, given)
    announce("\n".join([describe(groups, name, model), *([note] if note else [])]), printed=printed)
    for line in assumptions(model, groups) if target_modules is None else ():
        logger.warning("optim=%s: %s", name, line)
    alone = [n for g in groups if (g["role"], g["algorithm"]) == ("adapter", "multinorm") for n in g["param_names"]]
    if options.lora == "product" and alone:
        logger.warning(
            "lora=product: %d adapter matrices are normalised on their own, as by lora=separate, because they have no "
            "partner that is trained and shapes one matrix with them: %s.",
            len(alone),
            ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else ""),
        )
    arguments = {"params": groups, "otherwise": otherwise(groups, options)}
    if not options.release:
        return arguments
    _prepare_release(model, groups, options.release)
    return {**arguments, "release": options.release, "order": [name for name, _ in model.named_parameters()]}


def _refuse_compressed(model: nn.Module) -> None:
    """Refuse packed weights that transformers loaded to run: their float values would appear after this, untrained."""
    packed = any(getattr(module, "quantization_method", None) == COMPRESSED for module in model.modules())
    if packed and not has_lora(model):
        raise ValueError(
            "The model is loaded by compressed-tensors, which does not train it: load it with "
            "quantization_config=hf_stateless.Int8TrainingConfig() to train int8 weights, or train LoRA adapters."
        )


def _finite(what: str, value: Any) -> float:
    """Return a plain float: what is written into a group is saved, and read back by torch.load(weights_only=True)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf or isinstance(value, bool | str):
        raise ValueError(f"The {what} must be a finite number of at least 0, got {value!r}.")
    return number


def _prepare_release(model: nn.Module, groups: list[dict[str, Any]], release: str) -> None:
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "Layer-wise updates have to be prepared before DDP makes its buckets: "
            "create the optimizer first and wrap the model in DistributedDataParallel afterwards."
        )
    released = [g for g in groups if is_released(g["algorithm"], release)]
    keep_out_of_ddp(model, [p for group in released for p in group["params"]])
    count_released_gradients()


class _Factory:
    """Zero-argument factory of the kind that `Trainer(optimizer_cls_and_kwargs=(factory, kwargs))` takes."""

    name: str

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        target_modules: str | Sequence[str] | None = None,
        **options: Any,
    ) -> StatelessOptimizer:
        settings = {"lr": lr, "weight_decay": weight_decay, "target_modules": target_modules}
        return _create(model, self.name, options, **settings, printed=trainer_prints())


class SwanFactory(_Factory):
    """`Trainer(optimizer_cls_and_kwargs=(SwanFactory, {"lr": 1e-3}))`: SWAN in place of `optim="swan"`.

    Example:
        >>> from hf_stateless import SwanFactory
        >>> SwanFactory().name
        'swan'
    """

    name = "swan"


class SinkGDFactory(_Factory):
    """`Trainer(optimizer_cls_and_kwargs=(SinkGDFactory, {"lr": 1e-3}))`: SinkGD in place of `optim="sinkgd"`.

    Example:
        >>> from hf_stateless import SinkGDFactory
        >>> SinkGDFactory().name
        'sinkgd'
    """

    name = "sinkgd"


class SinkGDPolarFactory(_Factory):
    """`Trainer(optimizer_cls_and_kwargs=(SinkGDPolarFactory, {"lr": 1e-3}))`: SinkGD, then a Polar Express step.

    Example:
        >>> from hf_stateless import SinkGDPolarFactory
        >>> SinkGDPolarFactory().name
        'sinkgd_polar'
    """

    name = "sinkgd_polar"


class MultiNormFactory(_Factory):
    """`Trainer(optimizer_cls_and_kwargs=(MultiNormFactory, {"lr": 1e-3, "norms": ("sign",)}))`: any chain.

    Example:
        >>> from hf_stateless import MultiNormFactory
        >>> MultiNormFactory().name
        'multinorm'
    """

    name = "multinorm"

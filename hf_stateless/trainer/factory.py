"""From a model and validated options to the optimizer: parameter groups, factories, and the handler of the Trainer."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..optimizer.groups import RELEASED
from ..optimizer.lora_product import product_chain
from ..optimizer.optimizer import StatelessOptimizer
from ..weights.int8.weight import Int8Weight
from .names import count_released_gradients_in_clipping, keep_out_of_ddp
from .options import LAYERWISE, Options, parse_options
from .partition import PartitionedParameter, describe, partition_parameters, refuse_fsdp1


if TYPE_CHECKING:
    from transformers.trainer_optimizer import OptimizerContext

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

    Args:
        model: the model that is trained.
        options: from `hf_stateless.trainer.options.parse_options`.
        lr: learning rate.
        weight_decay: decoupled decay of the parameters that the Trainer decays.
        target_modules: which modules are matrices, see `partition_parameters`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_stateless.trainer.factory import parameter_groups
        >>> from hf_stateless.trainer.options import parse_options
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=2, vocab_size=32)
        >>> groups = parameter_groups(LlamaForCausalLM(config), parse_options("sinkgd", {}), lr=1e-3)
        >>> [(group["role"], group["algorithm"]) for group in groups]
        [('matrix', 'multinorm'), ('embedding', 'adamw'), ('head', 'adamw'), ('rest', 'adamw')]
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in partition_parameters(model, target_modules):
        _refuse_int8_beside_the_matrices(entry)
        rule = _rule(entry, options, lr)
        decay = weight_decay if entry.decay and rule["algorithm"] != "sinkhorn_momentum" else 0.0
        # Grouped by whether a parameter may decay, not by the value, which a resumed run may change; pairs of LoRA
        # factors in the same groups whether they are updated together or not, so that it may change that too.
        scaling = entry.pair.scaling if entry.pair and "norms" in rule else None
        key = (entry.role, rule["algorithm"], rule.get("layout"), scaling, entry.decay)
        group = groups.setdefault(key, {"params": [], "param_names": [], "role": entry.role})
        group["params"].append(entry.parameter)
        group["param_names"].append(entry.name)
        group.update(rule, weight_decay=decay, stochastic_rounding=options.stochastic_rounding, seed=options.seed)
    return list(groups.values())


def _refuse_int8_beside_the_matrices(entry: PartitionedParameter) -> None:
    """Refuse an 8-bit weight that no chain of norms updates: AdamW would need float weights and moments."""
    if isinstance(entry.parameter, Int8Weight) and entry.role not in ("matrix", "adapter"):
        module = entry.name.removesuffix(".weight")
        raise ValueError(
            f"{entry.name} is stored in 8 bits but is no matrix here (its role is {entry.role}), and AdamW cannot "
            f"update 8-bit weights: leave out optim_target_modules, freeze it, or keep it in float by "
            f"Int8TrainingConfig(modules_to_not_convert=[{module!r}])."
        )


def _rule(entry: PartitionedParameter, options: Options, lr: float) -> dict[str, Any]:
    """Return the algorithm of one parameter with the values it needs."""
    chained = entry.role in ("matrix", "adapter")
    chain = {
        "algorithm": "multinorm",
        "lr": lr,
        "lr_scale": options.lr_scale if chained else options.lr_scale_beside,
        "norms": options.norms,
        "num_iterations": options.num_iterations,
        "whitening": options.whitening,
        "ns_steps": options.ns_steps,
        "ns_beta": options.ns_beta,
        "ns_dtype": options.ns_dtype,
        "layout": entry.layout,
        "split_whitening": options.split_whitening,
        "min_signal": options.min_signal,
    }
    if chained:  # what `embeddings=stateless` takes along stays without state
        chain |= {"momentum": options.momentum, "momentum_dtype": options.momentum_dtype}
    if entry.role in ("matrix", "head"):  # a low-rank factor and a table of tokens have a side that is no width
        chain["width_rule"] = options.width_rule
    if entry.pair and options.lora == "product" and (chained or options.embeddings == "stateless"):
        norms, num_iterations = product_chain(options.norms, options.num_iterations)
        values = {"norms": norms, "num_iterations": num_iterations, "lr": lr, "lr_scale": options.lr_scale_beside}
        values |= {"min_signal": options.min_signal}
        return {"algorithm": "lora_product", **values, "scaling": entry.pair.scaling, "layout": entry.pair.layout}
    adamw_lr = lr if options.adamw_lr is None else options.adamw_lr
    if chained:
        return chain
    table = entry.role in ("embedding", "head") and entry.parameter.ndim == 2
    if options.embeddings == "stateless":
        # A vector has one norm only: its entries are scaled to root mean square 1.
        return chain if table else {**chain, "norms": ("frobenius",), "num_iterations": 1, "layout": "vector"}
    if table and options.embeddings == "sinkhorn_momentum" and not entry.pair:
        return {"algorithm": "sinkhorn_momentum", "lr": adamw_lr}
    return {
        "algorithm": "adamw_8bit" if table and options.embeddings == "adamw_8bit" else "adamw",
        "lr": adamw_lr,
        "betas": (options.adamw_beta1, options.adamw_beta2),
        "eps": options.adamw_eps,
    }


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
        name: `swan`, `sinkgd` or `multinorm`, or one of them with `_layerwise` for updates in backward.
        lr: learning rate; matrices move by `lr * lr_scale` times an update of entry RMS 1, the AdamW part by
            `adamw_lr`, or `lr` if there is none.
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
    groups, release = _build(model, name, lr, weight_decay, target_modules, options)
    optimizer = StatelessOptimizer(groups, lr=lr, **_layerwise_kwargs(model, release))
    optimizer.train()
    return optimizer


def _build(
    model: nn.Module,
    name: str,
    lr: float,
    weight_decay: float,
    target_modules: str | Sequence[str] | None,
    given: dict[str, Any],
) -> tuple[list[dict[str, Any]], str | None]:
    """Return the groups and what layer-wise updates release, after all checks and with the table logged."""
    options = parse_options(name, given)
    lr, weight_decay = _finite("learning rate", lr), _finite("weight decay", weight_decay)
    groups = parameter_groups(model, options, lr=lr, weight_decay=weight_decay, target_modules=target_modules)
    logger.info("optim=%s:\n%s", name, describe(groups))
    alone = [n for g in groups if (g["role"], g["algorithm"]) == ("adapter", "multinorm") for n in g["param_names"]]
    if options.lora == "product" and alone:
        logger.warning(
            "lora=product: %d adapter matrices are normalised on their own, as by lora=separate, for they have no "
            "partner that is trained and shapes one matrix with them: %s.",
            len(alone),
            ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else ""),
        )
    if options.release:
        _prepare_layerwise(model, groups, options.release)
    return groups, options.release


def _finite(what: str, value: Any) -> float:
    """Return a plain float: what is written into a group is saved, and read back by torch.load(weights_only=True)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf or isinstance(value, bool | str):
        raise ValueError(f"The {what} must be a finite number of at least 0, got {value!r}.")
    return number


def _prepare_layerwise(model: nn.Module, groups: list[dict[str, Any]], release: str) -> None:
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "Layer-wise updates have to be prepared before DDP makes its buckets: "
            "create the optimizer first and wrap the model in DistributedDataParallel afterwards."
        )
    released = [g for g in groups if g["algorithm"] in RELEASED[release]]
    keep_out_of_ddp(model, [p for group in released for p in group["params"]])
    count_released_gradients_in_clipping()


def handle(name: str, ctx: OptimizerContext) -> tuple[type[StatelessOptimizer], dict[str, Any]]:
    """Answer the Trainer for `optim=name`: the optimizer class and its groups, as transformers' own handlers do.

    Args:
        name: `swan`, `sinkgd` or `multinorm`.
        ctx: transformers' context: training arguments, model and the parsed `optim_args`.

    Raises:
        ValueError: what `create_optimizer` refuses, a missing model, FSDP1, or DeepSpeed ZeRO.
    """
    if ctx.model is None:
        raise ValueError(f"optim={name!r} needs the model to tell matrices from the rest: pass model= to the call.")
    _refuse_partitioning(ctx.args)
    _refuse_sharded_int8(ctx.args, ctx.model)
    adam = {"adamw_beta1": ctx.adam_kwargs["betas"][0], "adamw_beta2": ctx.adam_kwargs["betas"][1]}
    given = {**adam, "adamw_eps": ctx.adam_kwargs["eps"], **ctx.optim_args}
    if name.endswith(LAYERWISE):
        _refuse_layerwise(ctx.args, ctx.model, given.get("release", "matrices"))
    groups, release = _build(
        ctx.model, name, ctx.args.learning_rate, ctx.args.weight_decay, ctx.args.optim_target_modules, given
    )
    if "split_whitening" not in given and getattr(ctx.args, "world_size", 1) > 1:
        # The Trainer steps all processes together, with gradients that DDP has averaged.
        for group in (group for group in groups if group["algorithm"] == "multinorm"):
            group["split_whitening"] = True
    steps = ctx.args.gradient_accumulation_steps
    if release and steps > 1:
        held = sum(p.numel() * p.element_size() for group in groups for p in group["params"])
        logger.warning(
            "optim=%s with gradient_accumulation_steps=%d: the gradients of all %.2f GiB of weights are held between "
            "micro-batches, and freed layer by layer only in the last one. A batch in one piece saves that memory.",
            name,
            steps,
            held / 2**30,
        )
    return StatelessOptimizer, {"params": groups, **_layerwise_kwargs(ctx.model, release), **ctx.optimizer_kwargs}


def _layerwise_kwargs(model: nn.Module, release: str | None) -> dict[str, Any]:
    return {"release": release, "order": [name for name, _ in model.named_parameters()]} if release else {}


def _refuse_layerwise(args: Any, model: nn.Module, release: str) -> None:
    """Refuse the settings of the Trainer that cannot be combined with updates in backward."""
    if args.fp16:
        raise ValueError(
            "fp16=True scales the loss and may have to undo a step, but layer-wise updates are done before that is "
            "known: set bf16=True instead, or leave out _layerwise."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True starts over after running out of memory, but by then layer-wise updates have "
            "changed some of the weights: set per_device_train_batch_size, or leave out _layerwise."
        )
    if len({getattr(p, "device_mesh", None) for p in model.parameters() if p.requires_grad}) > 1:
        raise ValueError(
            "Under tensor parallelism the Trainer clips by the norm of the gradients that are left after backward, "
            "which lacks what layer-wise updates have freed: leave out _layerwise, or shard with FSDP2 alone."
        )
    if release == "all" and args.max_grad_norm:
        raise ValueError(
            f"release=all updates the AdamW part before the gradient norm is known, so max_grad_norm="
            f"{args.max_grad_norm} cannot be applied: set max_grad_norm=0, or release=matrices."
        )


def _refuse_partitioning(args: Any) -> None:
    """Refuse what hands the optimizer flattened or partitioned matrices: it would train something else, silently.

    It is announced by the training arguments, or by `accelerate launch` through the environment.
    """
    announced = [getattr(args, name, None) for name in ("deepspeed", "deepspeed_plugin")]
    if any(announced) or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed ZeRO hands the optimizer flat partitions, so row norms, column norms and whitening are "
            "undefined: leave out --deepspeed, or set distributed_type: FSDP and fsdp_version: 2 in the accelerate "
            "config to shard with FSDP2."
        )
    plugin = getattr(args, "fsdp_plugin_args", None)
    # An Accelerator sets ACCELERATE_USE_FSDP without a version, `accelerate launch` always with one.
    version = os.environ.get("FSDP_VERSION") if parse_flag_from_env("ACCELERATE_USE_FSDP") else None
    if str(plugin.get("fsdp_version", version or 1) if plugin else version) == "1":
        refuse_fsdp1()


def _refuse_sharded_int8(args: Any, model: nn.Module) -> None:
    """Refuse FSDP for 8-bit weights: it would shard the empty parameters and leave the codes behind."""
    sharded = getattr(args, "fsdp_plugin_args", None) or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if sharded and any(isinstance(p, Int8Weight) for p in model.parameters()):
        raise ValueError(
            "8-bit weights cannot be sharded by FSDP: type distributed_type: MULTI_GPU in the accelerate config "
            "(DDP), or load the model without quantization_config."
        )


class _Factory:
    """Zero-argument factory of the kind that `Trainer(optimizer_cls_and_kwargs=(factory, kwargs))` takes."""

    name: str

    def __call__(self, model: nn.Module, **kwargs: Any) -> StatelessOptimizer:
        return create_optimizer(model, self.name, **kwargs)


class SwanFactory(_Factory):
    """`Trainer(optimizer_cls_and_kwargs=(SwanFactory, {"lr": 1e-3}))`: SWAN without a registered name.

    Example:
        >>> from hf_stateless import SwanFactory
        >>> SwanFactory().name
        'swan'
    """

    name = "swan"


class SinkGDFactory(_Factory):
    """`Trainer(optimizer_cls_and_kwargs=(SinkGDFactory, {"lr": 1e-3}))`: SinkGD without a registered name.

    Example:
        >>> from hf_stateless import SinkGDFactory
        >>> SinkGDFactory().name
        'sinkgd'
    """

    name = "sinkgd"


class MultiNormFactory(_Factory):
    """`Trainer(optimizer_cls_and_kwargs=(MultiNormFactory, {"lr": 1e-3, "norms": ("sign",)}))`: any chain.

    Example:
        >>> from hf_stateless import MultiNormFactory
        >>> MultiNormFactory().name
        'multinorm'
    """

    name = "multinorm"

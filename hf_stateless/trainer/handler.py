"""What the Trainer is given for `optim=name`, by its own settings; and which settings are refused."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env
from torch import nn

from ..optimizer.optimizer import StatelessOptimizer
from ..ranks.placement import mesh_of
from ..ranks.slices import shapes_shown
from ..weights.int8.tables import Int8Head
from .clipping import clips_mixed_meshes
from .factory import optimizer_arguments
from .optim_args import is_layerwise, refuse_repeated_keys
from .parallel_models import refuse_doubled_gradients
from .partition import refuse_fsdp1
from .table import trainer_prints
from .zero import optimizer_class


if TYPE_CHECKING:
    from transformers.trainer_optimizer import OptimizerContext

logger = logging.getLogger(__name__)


def handle(name: str, ctx: OptimizerContext) -> tuple[type[StatelessOptimizer], dict[str, Any]]:
    """Answer the Trainer for `optim=name`: the optimizer class and its groups, as transformers' own handlers do.

    Raises:
        ValueError: what `create_optimizer` refuses, a missing model, FSDP1, or a DeepSpeed config that is not exact.
    """
    if ctx.model is None:
        raise ValueError(
            f"optim={name!r} needs the model to tell matrices from the rest, got none: a framework or script that "
            "makes its own parameter groups asks so. Leave out what makes them (LLaMA-Factory: loraplus_lr_ratio, "
            "use_badam), or type Trainer.get_optimizer_cls_and_kwargs(args, model)."
        )
    made = optimizer_class(ctx.args, name, ctx.model)
    _refuse_partitioning(ctx.args)
    _refuse_int8_head(ctx.args, ctx.model)
    refuse_doubled_gradients(ctx.model, ctx.args.gradient_accumulation_steps)
    refuse_repeated_keys(getattr(ctx.args, "optim_args", None))
    beta1, beta2 = ctx.adam_kwargs["betas"]
    adamw = {"adamw_beta1": beta1, "adamw_beta2": beta2, "adamw_eps": ctx.adam_kwargs["eps"]}
    given = {**adamw, **ctx.optim_args}  # the training arguments, which optim_args may override
    if is_layerwise(name):
        _refuse_beside_release(ctx.args, ctx.model, given.get("release", "matrices"))
    with shapes_shown(ctx.model.parameters()):
        arguments = optimizer_arguments(
            ctx.model,
            name,
            given,
            lr=ctx.args.learning_rate,
            weight_decay=ctx.args.weight_decay,
            target_modules=ctx.args.optim_target_modules,
            printed=trainer_prints(ctx.args),
        )
    if "split_whitening" not in given and getattr(ctx.args, "world_size", 1) > 1:
        # The Trainer steps all processes together, with gradients that DDP has averaged.
        for group in (group for group in arguments["params"] if group["algorithm"] == "multinorm"):
            group["split_whitening"] = True
    if is_layerwise(name) and ctx.args.gradient_accumulation_steps > 1:
        _warn_of_accumulation(name, arguments["params"], ctx.args.gradient_accumulation_steps)
    return made, {**arguments, **ctx.optimizer_kwargs}


def _warn_of_accumulation(name: str, groups: Sequence[Mapping[str, Any]], steps: int) -> None:
    held = sum(p.numel() * p.dtype.itemsize for group in groups for p in group["params"])
    logger.warning(
        "optim=%s with gradient_accumulation_steps=%d: the gradients of all %.2f GiB of weights are held between "
        "micro-batches, and only the last one frees them layer by layer. One batch without accumulation saves that "
        "memory.",
        name,
        steps,
        held / 2**30,
    )


def _refuse_beside_release(args: Any, model: nn.Module, release: str) -> None:
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
    if len(set(map(mesh_of, filter(lambda p: p.requires_grad, model.parameters())))) > 1 and not clips_mixed_meshes():
        raise ValueError(
            "Under tensor parallelism this transformers clips by the norm of the gradients that are left after "
            "backward, which lacks what layer-wise updates have freed: type pip install 'transformers>=5.17', or "
            "leave out _layerwise."
        )
    if release == "all" and args.max_grad_norm:
        raise ValueError(
            f"release=all updates the AdamW part before the gradient norm is known, so max_grad_norm="
            f"{args.max_grad_norm} cannot be applied: set max_grad_norm=0, or release=matrices."
        )


def _refuse_partitioning(args: Any) -> None:
    """Refuse what hands the optimizer flattened matrices: it would train something else, silently.

    It is announced by the training arguments, or by `accelerate launch` through the environment.
    """
    plugin = getattr(args, "fsdp_plugin_args", None)
    # An Accelerator sets ACCELERATE_USE_FSDP without a version, `accelerate launch` always with one.
    version = os.environ.get("FSDP_VERSION") if parse_flag_from_env("ACCELERATE_USE_FSDP") else None
    if str(plugin.get("fsdp_version", version or 1) if plugin else version) == "1":
        refuse_fsdp1()


def _refuse_int8_head(args: Any, model: nn.Module) -> None:
    """Refuse a head in 8 bits under TRL, which computes with the head's weight past its code: it would find NaN."""
    of_trl = any(kind.__module__.partition(".")[0] == "trl" for kind in type(args).__mro__)
    if of_trl and any(isinstance(module, Int8Head) for module in model.modules()):
        raise ValueError(
            "TRL reads lm_head.weight by itself, so the head cannot be in 8 bits: leave embeddings=True out of "
            "Int8TrainingConfig, or add modules_to_not_convert=['lm_head'] if the head is not tied."
        )

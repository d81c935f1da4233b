"""What is put in the place of functions of transformers, accelerate and torch, each with its reason and its end."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..optimizer.option_kinds import shown


OURS = "_hf_stateless"
"""The attribute by which an object that this package has put somewhere is known."""
_DECAY: ContextVar[Callable[[torch.nn.Module], Iterable[str]] | None] = ContextVar("decay", default=None)


def replaced(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Return what stands in the place of an original and is given it first; what stands there already stays."""
    if hasattr(original, OURS):
        return original

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    setattr(replacement, OURS, True)
    return replacement


def explain_optim_args(trainer: Any) -> None:
    """Give a malformed `optim_args` one clear error line, for every optimizer; well-formed strings parse as before.

    `_parse_optim_args` (transformers/trainer_optimizer.py) splits at commas, then at "=", and answers everything else
    with "not enough values to unpack" or an AttributeError. It is replaced in `transformers.trainer`, the module that
    calls it. Delete when transformers reports the malformed part itself.
    """
    trainer._parse_optim_args = replaced(trainer._parse_optim_args, _parse)


def _parse(upstream: Callable[..., dict[str, str]], optim_args: str | None) -> dict[str, str]:
    try:
        return upstream(optim_args)
    except (AttributeError, TypeError, ValueError):
        raise ValueError(_malformed(optim_args)) from None


def _malformed(optim_args: object) -> str:
    """Return one line that says what was got, what is wrong with it, and what to type."""
    if isinstance(optim_args, str):
        part = next((part for part in optim_args.split(",") if part.count("=") != 1), "").strip()
        wrong = f"the part {shown(part)} is not key=value" if part else "a comma has nothing on one side"
    else:
        wrong = f"a {type(optim_args).__name__} is not a string"
    return (
        f"optim_args={shown(optim_args)} is malformed: {wrong}. Type key=value,key=value and join lists with +, "
        'for example optim_args="norms=row_l2+col_l2,num_iterations=3".'
    )


def follow_decay(trainer_class: Any) -> None:
    """Let the trainer that makes an optimizer say which of its parameters decay; repeated calls do nothing.

    A subclass may override `get_decay_parameter_names`, and a handler is not given the trainer. Delete when
    `OptimizerContext` has the names.
    """
    trainer_class.create_optimizer = replaced(trainer_class.create_optimizer, _create_with_its_decay)


def _create_with_its_decay(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    token = _DECAY.set(trainer.get_decay_parameter_names)
    try:
        return original(trainer, *args, **kwargs)
    finally:
        _DECAY.reset(token)


def decay_rule() -> Callable[[torch.nn.Module], Iterable[str]] | None:
    """Return what gives the names of what decays, by the trainer that makes an optimizer now; None outside of one."""
    return _DECAY.get()


def end_layerwise_training(trainer_class: Any) -> None:
    """Let hooks of layer-wise updates sleep when `Trainer.train` has ended or failed; repeated calls do nothing.

    Else a later backward would still change weights. No callback comes after an error, and a handler is not given the
    trainer. Training wakes its own hooks, by `optimizer.train()` before each forward. Delete when the Trainer calls
    `optimizer.eval()` at its end, errors included.
    """
    trainer_class.train = replaced(trainer_class.train, _train_and_sleep)


def _train_and_sleep(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    live = _hooks_of(trainer.model)
    if live:
        live.begin_training(trainer.model.parameters(), trainer.optimizer)
    try:
        return original(trainer, *args, **kwargs)
    finally:
        live = _hooks_of(trainer.model)
        if live:
            live.end_training(trainer.model.parameters())


def follow_sharded_checkpoints(module: Any) -> None:
    """Let an optimizer look at a checkpoint before FSDP2 asks its files for what the optimizer keeps now.

    torch reads the tensors that the optimizer would make, and fails where the checkpoint has those of another rule.
    `load_fsdp_optimizer` (accelerate/utils/fsdp_utils.py) is replaced in the modules that call it, accelerate's and
    the Trainer's. Delete when torch asks the optimizer what to read.
    """
    if hasattr(module, "load_fsdp_optimizer"):
        module.load_fsdp_optimizer = replaced(module.load_fsdp_optimizer, _load_prepared)


def _load_prepared(
    original: Callable[..., Any],
    plugin: Any,
    accelerator: Any,
    optimizer: Any,
    model: Any,
    folder: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    from .sharded_resume import prepare  # only now: registering names must not load what makes optimizers

    prepare(optimizer, folder, args[0] if args else kwargs.get("optimizer_index", 0))
    return original(plugin, accelerator, optimizer, model, folder, *args, **kwargs)


def _hooks_of(model: Any) -> Any:
    """Return what knows of hooks on parameters, or None if it was never loaded, so that there are none."""
    live = sys.modules.get(f"{__name__.partition('.')[0]}.optimizer.live")
    return live if isinstance(model, torch.nn.Module) else None


def keep_out_of_ddp(model: torch.nn.Module, parameters: Iterable[torch.Tensor]) -> None:
    """Tell a later `DistributedDataParallel(model)` which parameters it must not put into its buckets.

    The static method is DDP's own (torch/nn/parallel/distributed.py); it marks the model and its parameters, and DDP
    looks for the names: of every module that holds a parameter, with an empty module name in front for the model's
    own, and behind `_orig_mod.` where `torch.compile` wraps the model. Delete when DDP takes the names as an argument.

    Args:
        model: the model before it is wrapped.
        parameters: those to leave out. DDP refuses to have none, so the smallest stays if nothing else would: the
            last of that size, next to the loss, since DDP also hangs where a rank uses nothing of what it has.
    """
    ids = {id(p) for p in parameters}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if all(id(p) in ids for p in trainable):
        ids.remove(id(min(reversed(trainable), key=torch.Tensor.numel)))
    names = {
        name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for own, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(p) in ids
        for name in (f"{prefix}.{own}".removeprefix("."), f"{prefix}.{own}", f"_orig_mod.{prefix}.{own}")
    }
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(names))  # type: ignore[no-untyped-call]

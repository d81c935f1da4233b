"""Optimizer names for `optim=`: the only file that touches private parts of transformers.

transformers has no public way to add a name (transformers#31875 and transformers#34358 asked for less). It checks
`optim` against the enum `OptimizerNames`, and since 5.2.0 (transformers#43738) the Trainer looks the optimizer up in
the table `_OPTIMIZER_HANDLERS`; this file adds to both. All of it can be deleted once transformers has a public way.
What each private part is for stands at the function that touches it; `tests/test_registration.py` names the part that
moved.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from packaging.version import Version
from torch.nn.parallel import DistributedDataParallel

from ..optimizer.release import released_norm
from ..ranks.placement import whole_matrix
from .options import optimizer_names


PRIVATE_PARTS = (
    "transformers.training_args:OptimizerNames._member_map_",
    "transformers.training_args:OptimizerNames._member_names_",
    "transformers.training_args:OptimizerNames._value2member_map_",
    "transformers.trainer_optimizer:_OPTIMIZER_HANDLERS",
    "transformers.trainer:_parse_optim_args",
    "torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
)
"""Every private attribute that `register` reads or writes, as module:attribute."""

_OURS = "_hf_stateless"
_MINIMUM_TRANSFORMERS = (5, 2)
_LOCK = threading.Lock()
_WARNED: set[str] = set()


def register(names: Iterable[str] | None = None) -> None:
    """Make names valid wherever transformers takes an `optim`; calling it again changes nothing.

    A name that transformers ships itself is left alone, with one warning.

    Args:
        names: names to add, `optimizer_names()` when None.

    Raises:
        ImportError: transformers is older than 5.2, or a private part that this file needs is gone.

    Example:
        >>> import hf_stateless
        >>> from transformers import TrainingArguments
        >>> TrainingArguments("out", optim="sinkgd").optim.value
        'sinkgd'
    """
    _require_transformers(transformers.__version__)
    from transformers import trainer, trainer_optimizer, training_args

    with _LOCK:
        try:
            for name in optimizer_names() if names is None else names:
                _add_name(name, training_args.OptimizerNames, trainer_optimizer._OPTIMIZER_HANDLERS)
            _explain_optim_args(trainer)
        except AttributeError as error:
            installed = transformers.__version__
            raise ImportError(
                f"transformers {installed} has changed a private part that hf_stateless registers with ({error}); "
                f'type: pip install -U hf_stateless, or: pip install "transformers<{installed}"'
            ) from error


def _require_transformers(installed: str) -> None:
    """Refuse a transformers without the handler table, which came with 5.2.0."""
    if Version(installed).release < _MINIMUM_TRANSFORMERS:
        raise ImportError(
            f"hf_stateless needs transformers 5.2 or newer, but {installed} is installed; "
            'type: pip install -U "transformers>=5.2"'
        )


def _add_name(name: str, enum: Any, handlers: dict[str, Any]) -> None:
    """Enter one name into the enum and into the table of handlers, unless transformers or somebody else has it.

    `_OPTIMIZER_HANDLERS` (transformers/trainer_optimizer.py) maps members of `OptimizerNames` to handlers; the Trainer
    imports the same dict object, so adding to it in place is enough. `_member_map_` and `_value2member_map_` are read
    to find out whether the name is taken. Delete when transformers has a public function that adds a handler.
    """
    member = enum._value2member_map_.get(name)
    taken = (member, enum._member_map_.get(name.upper()), handlers.get(name))
    if any(entry is not None and not hasattr(entry, _OURS) for entry in taken):
        _warn_shipped_upstream(name)
        return
    if member is None:
        member = _new_member(enum, name)
        _add_member(enum, member)
    handlers.setdefault(member, _new_handler(name))


def _warn_shipped_upstream(name: str) -> None:
    """Say once per name that `optim=name` is not ours, and how to get ours all the same."""
    if name in _WARNED:
        return
    _WARNED.add(name)
    warnings.warn(
        f"optim={name!r} is already an optimizer of transformers {transformers.__version__} and stays as it is; "
        "for the one of hf_stateless type: "
        f"Trainer(..., optimizers=(hf_stateless.create_optimizer(model, {name!r}, lr=args.learning_rate), None))",
        stacklevel=2,
    )


def _new_handler(name: str) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
    """Return a handler of the Trainer, which gets an `OptimizerContext` and returns (class or factory, kwargs)."""

    def handler(context: Any) -> tuple[Any, dict[str, Any]]:
        # Looked up when it is called: the factory stands above this room and imports it.
        answer: tuple[Any, dict[str, Any]] = import_module(".factory", __package__).handle(name, context)
        return answer

    handler.__name__ = f"get_{name}"
    setattr(handler, _OURS, True)
    return handler


def _new_member(enum: Any, name: str) -> Any:
    """Return a member of a string enum that pickles as the plain string.

    `training_args.bin` is a pickle of the arguments. As an enum usually pickles, it would hold the call
    `OptimizerNames(name)`, which fails wherever hf_stateless is not imported; a plain string loads everywhere and is
    as good as the member, since both compare and hash alike. `__deepcopy__` keeps copies members on Python 3.10, which
    copies through `__reduce_ex__`. `_member_names_` gives the position in the enum; delete as `_add_member`.
    """
    member = str.__new__(enum, name)
    vars(member).update(
        _name_=name.upper(),
        _value_=name,
        __objclass__=enum,
        _sort_order_=len(enum._member_names_),
        __reduce_ex__=lambda protocol: (str, (name,)),
        __deepcopy__=lambda memo: member,
    )
    setattr(member, _OURS, True)
    return member


def _add_member(enum: Any, member: Any) -> None:
    """Add a member to an existing enum, as the class body of the enum would have done.

    An enum is closed after its class body, yet `TrainingArguments.__post_init__` (transformers/training_args.py)
    accepts members only, and `HfArgumentParser` (transformers/hf_argparser.py) offers the members as the choices of
    `--optim`. So the enum is extended in each of its parts: `_value2member_map_` serves `OptimizerNames(value)`,
    `_member_names_` and `_member_map_` serve iteration and `OptimizerNames[name]`, the class attribute serves
    `OptimizerNames.NAME` (Python 3.12 looks nowhere else, and `EnumType.__setattr__` refuses to set it), and
    `_hashable_values_`, where Python has it (late 3.13), serves `value in OptimizerNames`. Delete when transformers
    accepts names that are not members.
    """
    enum._value2member_map_[member.value] = member
    enum._member_map_[member.name] = member
    enum._member_names_.append(member.name)
    type.__setattr__(enum, member.name, member)
    if hasattr(enum, "_hashable_values_"):
        enum._hashable_values_.append(member.value)


def _explain_optim_args(trainer: Any) -> None:
    """Give a malformed `optim_args` one clear error line, for every optimizer; well-formed strings parse as before.

    `_parse_optim_args` (transformers/trainer_optimizer.py) splits at commas, then at "=", and answers everything else
    with "not enough values to unpack" or an AttributeError. It is replaced in `transformers.trainer`, the module that
    calls it. Delete when transformers reports the malformed part itself.
    """
    upstream = trainer._parse_optim_args
    if hasattr(upstream, _OURS):
        return

    def parse_optim_args(optim_args: str | None) -> dict[str, str]:
        try:
            parsed: dict[str, str] = upstream(optim_args)
        except (AttributeError, TypeError, ValueError):
            raise ValueError(_malformed(optim_args)) from None
        return parsed

    setattr(parse_optim_args, _OURS, True)
    trainer._parse_optim_args = parse_optim_args


def _malformed(optim_args: object) -> str:
    """Return one line that says what was got, what is wrong with it, and what to type."""
    if isinstance(optim_args, str):
        part = next((part for part in optim_args.split(",") if part.count("=") != 1), "").strip()
        wrong = f"the part {part!r} is not key=value" if part else "a comma has nothing on one side"
    else:
        wrong = f"a {type(optim_args).__name__} is not a string"
    return (
        f"optim_args={optim_args!r} is malformed: {wrong}. Type key=value,key=value and join lists with +, "
        'for example optim_args="norms=row_l2+col_l2,num_iterations=3".'
    )


def count_released_gradients_in_clipping() -> None:
    """Make `Accelerator.clip_grad_norm_` see gradients that layer-wise updates have freed; repeated calls do nothing.

    The Trainer clips, and logs as `grad_norm`, by this public method, which looks at `.grad` alone: without the freed
    gradients it would clip the rest too little and log a part for the whole. The optimizers are found through
    `Accelerator._optimizers`. To be deleted when accelerate lets an optimizer take part in clipping.
    """
    original = Accelerator.clip_grad_norm_
    if hasattr(original, _OURS):
        return

    @functools.wraps(original)
    def clip_grad_norm_(self: Any, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        parameters = list(parameters)
        released = released_norm(parameters)
        if released is None:
            return original(self, parameters, max_norm, norm_type)
        if norm_type != 2:
            raise ValueError(
                f"norm_type={norm_type}: of gradients that layer-wise updates have freed only the 2-norm is known; "
                "leave norm_type out, or take the optimizer without _layerwise."
            )
        rest = whole_matrix(original(self, parameters, math.inf, norm_type))
        total = torch.linalg.vector_norm(torch.stack([rest.to(released), released]), norm_type)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return total

    setattr(clip_grad_norm_, _OURS, True)
    Accelerator.clip_grad_norm_ = clip_grad_norm_


def keep_out_of_ddp(model: torch.nn.Module, parameters: Iterable[torch.Tensor]) -> None:
    """Tell a later `DistributedDataParallel(model)` which parameters it must not put into its buckets.

    The static method is DDP's own (torch/nn/parallel/distributed.py); it marks the model and its parameters, and DDP
    looks for the names: of every module that holds a parameter, with an empty module name in front for the model's
    own, and behind `_orig_mod.` where `torch.compile` wraps the model. To be deleted when DDP takes the names as an
    argument.

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

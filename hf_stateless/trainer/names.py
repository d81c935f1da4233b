"""The names of `optim=`: entered into transformers, which has no public way to add one.

transformers checks `optim` against the enum `OptimizerNames`, and since 5.2.0 (transformers#43738) the Trainer looks
the optimizer up in the table `_OPTIMIZER_HANDLERS`; this file adds to both (transformers#31875 and transformers#34358
asked for less). What each private part is for stands at the function that touches it, and in `tests/private_parts.py`.
Delete the file when transformers has a public way.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import transformers
from packaging.version import Version

from .optim_args import optimizer_names
from .patches import OURS, end_layerwise_training, explain_optim_args, follow_decay, follow_sharded_checkpoints


_MINIMUM_TRANSFORMERS = (5, 2)  # which brought the table of handlers
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
    installed = transformers.__version__
    if Version(installed).release < _MINIMUM_TRANSFORMERS:
        raise ImportError(
            f"hf_stateless needs transformers 5.2 or newer, but {installed} is installed; "
            'type: pip install -U "transformers>=5.2"'
        )
    from accelerate import accelerator
    from transformers import trainer, trainer_optimizer, training_args

    with _LOCK:
        try:
            for name in optimizer_names() if names is None else names:
                _add_name(name, training_args.OptimizerNames, trainer_optimizer._OPTIMIZER_HANDLERS)
            explain_optim_args(trainer)
            follow_decay(trainer.Trainer)
            end_layerwise_training(trainer.Trainer)
            follow_sharded_checkpoints(trainer)
            follow_sharded_checkpoints(accelerator)
        except AttributeError as error:
            raise ImportError(
                f"transformers {installed} has changed a private part that hf_stateless registers with ({error}); "
                f'type: pip install -U hf_stateless, or: pip install "transformers<{installed}"'
            ) from error


def _add_name(name: str, enum: Any, handlers: dict[str, Any]) -> None:
    """Enter one name into the enum and into the table of handlers, unless transformers or somebody else has it.

    `_OPTIMIZER_HANDLERS` (transformers/trainer_optimizer.py) maps members of `OptimizerNames` to handlers; the Trainer
    imports the same dict object, so adding to it in place is enough. `_member_map_` and `_value2member_map_` are read
    to find out whether the name is taken. Delete when transformers has a public function that adds a handler.
    """
    member = enum._value2member_map_.get(name)
    taken = (member, enum._member_map_.get(name.upper()), handlers.get(name))
    if any(entry is not None and not hasattr(entry, OURS) for entry in taken):
        if name not in _WARNED:
            _WARNED.add(name)
            warnings.warn(
                f"optim={name!r} is already an optimizer of transformers {transformers.__version__} and stays as it "
                "is; for the one of hf_stateless type: Trainer(..., optimizers=(hf_stateless.create_optimizer(model, "
                f"{name!r}, lr=args.learning_rate), None))",
                stacklevel=2,
            )
        return
    if member is None:
        member = _new_member(enum, name)
        _add_member(enum, member)
    handlers.setdefault(member, _new_handler(name))


def _new_handler(name: str) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
    """Return a handler of the Trainer, which gets an `OptimizerContext` and returns (class or factory, kwargs)."""

    def handler(context: Any) -> tuple[Any, dict[str, Any]]:
        from .handler import handle  # only now: registering names must not load what makes optimizers

        return handle(name, context)

    handler.__name__ = f"get_{name}"
    setattr(handler, OURS, True)
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
    setattr(member, OURS, True)
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

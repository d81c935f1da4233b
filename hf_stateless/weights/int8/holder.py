"""Modules that compute with their own weights, such as stacks of experts: the weights in 8 bits, the code as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .checks import check_gathered, note_scale
from .codes import checked_codes, quantize_stack
from .lent import Loan, Purse, Uses, before_backward_of
from .sharded import Int8Shard, shard_of
from .sharded_layer import codes_of, load_sharded, move_sharded
from .weight import Int8Weight, Scale


# Names of no tensor in any model, so that no rule by which transformers renames, splits or joins weights takes them.
_CODES, _SCALES = "codes-of-", "scales-of-"


class Int8Holder(nn.Module):
    """What the class of a module is mixed with whose weights are held in 8 bits: it lends them to `forward` in float.

    The module's own code runs on float weights in the dtype that they count as. They are there for the module's
    forward and for its backward, and not in between. `hold` makes such a module, `release` undoes it.
    """

    float_class: type[nn.Module]
    family: type[Int8Holder]
    """What `mix` was asked for: this class, or one that is for some kinds of modules."""
    _purses: dict[str, Purse]
    awaited_in_8_bits: tuple[str, ...] = ()
    """Weights of which a file is being read."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward on float weights."""
        places = list(_places(self))
        loans = [Loan(weight, purse) for _, _, weight, purse in places]
        uses = Uses(loans)
        args = tuple(uses.watch(value) for value in args)
        kwargs = {name: uses.watch(value) for name, value in kwargs.items()}
        uses.forget_inputs()
        try:
            for (slots, name, _, _), loan in zip(places, loans, strict=True):
                slots[name] = loan.take()
            out = super().forward(*args, **kwargs)
        finally:
            for slots, name, weight, purse in places:
                slots[name] = weight
                purse.close()
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                before_backward_of(tensor, loans)
        return out

    def __getattr__(self, name: str) -> Any:
        # torch.distributed.checkpoint asks for what a state dict names.
        codes = dict(self._codes()).get(name) if name.startswith(_CODES) else None
        return super().__getattr__(name) if codes is None else codes

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        """Yield the buffers, and the codes that are cut over ranks where one module alone is asked.

        So torch.distributed.checkpoint fills them from a whole state dict: it asks modules for parameters and buffers,
        and the names of codes are not those of the parameters.
        """
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:
            cut = [(name, codes) for name, codes in self._codes() if isinstance(codes, DTensor)]
            yield from ((f"{prefix}.{name}".lstrip("."), codes) for name, codes in cut if name.startswith(_CODES))

    def _codes(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in held_weights(self).items():
            if not isinstance(weight, Int8Shard):
                codes = weight.detach() if isinstance(weight, Int8Weight) else codes_of(weight)
                yield self.codes_name(name), codes

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        return _blank, (self.family, self.float_class), *made[2:]

    @classmethod
    def bases(cls, kind: type[nn.Module]) -> tuple[type, ...]:
        """Return the bases of the class that a module of some kind gets."""
        return cls, kind

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Holder:
        held = self._held()
        self._parameters.update(dict.fromkeys(held))
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters.update(held)
        for name, weight in held_weights(self).items():
            if isinstance(weight, Int8Weight):
                self._move(name, weight, fn)
            else:
                move_sharded(self, name, fn)
        return self

    def _held(self) -> dict[str, Any]:
        """Return the 8-bit weights of this module and their scales, by name."""
        names = {*(weights := held_weights(self)), *map(self.name_of_scale, weights)}
        return {name: p for name, p in self._parameters.items() if name in names}

    def _move(self, name: str, weight: Int8Weight, fn: Callable[[Tensor], Tensor]) -> None:
        scale = weight.scale
        if not (weight.is_meta or fn(torch.empty(0, device=weight.device)).is_meta):
            scale.data = scale.data.to(fn(scale.data).device)  # moved, never cast
            weight.move_(fn)
            return
        # What has no memory, or loses it, cannot keep its identity; where it is tied it stays so.
        if weight.moved_to is not None and scale_name(name) not in self._parameters:
            self._parameters[name] = weight.moved_to
            return
        codes, like = fn(weight.codes).to(torch.int8), fn(torch.empty((), dtype=weight.dtype))
        weight.moved_to = put(self, name, codes, fn(scale.data).to(scale.dtype), like.dtype, weight.requires_grad)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        for name, held in held_weights(self).items():
            codes = destination.pop(prefix + name)
            if not keep_vars:
                codes = codes.view(*held.scale.shape, -1) if isinstance(held, Int8Weight) else codes_of(held)
            scales = destination.pop(prefix + scale_name(name), None)
            destination[prefix + self.codes_name(name)] = codes
            if scales is not None:  # where a weight is tied they are elsewhere
                destination[prefix + scale_name(name)] = scales

    def codes_name(self, name: str) -> str:
        """Return how the codes of a weight are called where the module is saved."""
        return codes_name(name)

    def name_of_scale(self, name: str) -> str:
        """Return how the scales of a weight are called, where the module has them."""
        return scale_name(name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: list[str]
    ) -> None:
        missing, unexpected, errors = lists
        held = self._held()
        taken: dict[str, Tensor] = {}
        for name, weight in held_weights(self).items():
            keys = [prefix + self.codes_name(name)]
            keys += [prefix + scale_name(name)] if scale_name(name) in self._parameters else []
            both = [state_dict.pop(key, None) for key in keys]
            taken |= {key: value for key, value in zip(keys, both, strict=True) if value is not None}
            missing += [key for key, value in zip(keys, both, strict=True) if value is None]
            if any(value is None for value in both):
                continue
            try:
                self._take_over(name, weight, *both)
            except ValueError as error:
                errors.append(f"{prefix}{name}: {error}")
            if not isinstance(weight, Int8Weight):  # which torch.distributed.checkpoint names beside its codes
                state_dict.pop(prefix + name, None)
        held |= self._held()
        # Out of the way of the module's own loading, at their places: the order decides their rounding noise.
        self._parameters.update(dict.fromkeys(held))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)  # type: ignore[no-untyped-call]
        self._parameters.update(held)
        state_dict.update(taken)

    def _take_over(self, name: str, weight: Tensor, codes: Tensor, scale: Tensor | None = None) -> None:
        """Copy the codes and scales of a state dict; a weight that is tied has its scales elsewhere."""
        if not isinstance(weight, Int8Weight):
            load_sharded(self, name, codes, scale)
            return
        scale = weight.scale.data if scale is None else scale
        weight.codes.copy_(checked_held(codes, scale, weight))
        weight.scale.data.copy_(scale)


def codes_name(name: str) -> str:
    """Return how the codes of a weight are called where a model is saved; rules of renaming know names with `_`."""
    return _CODES + name.replace("_", "-")


def scale_name(name: str) -> str:
    """Return how the scales of a weight are called, in the module too."""
    return _SCALES + name.replace("_", "-")


def is_part(name: str) -> bool:
    """Tell by its name in a file whether a tensor is a part of a weight that a module holds."""
    return name.rpartition(".")[2].startswith((_CODES, _SCALES))


def held_weights(module: nn.Module) -> dict[str, Any]:
    """Return the weights that a module holds in 8 bits and lends to its own code, by name, cut over ranks or not."""
    if not isinstance(module, Int8Holder):
        return {}
    return {
        name: p
        for name, p in module._parameters.items()
        if isinstance(p, Int8Weight | Int8Shard) or shard_of(p) is not None
    }


def held_scales(module: nn.Module) -> list[nn.Parameter]:
    """Return the scales beside the weights that a module holds in 8 bits."""
    if not isinstance(module, Int8Holder):
        return []
    return [p for name, p in module._parameters.items() if name.startswith(_SCALES) and p is not None]


def hold(module: nn.Module, name: str, group_size: int | None) -> nn.Parameter:
    """Store a float weight of a module in 8 bits, in place; return the 8-bit weight.

    Args:
        module: whose own code computes with the weight.
        name: of the parameter, (..., rows, columns); groups lie along its last dimension.
        group_size: see `stored_length`.

    Raises:
        ValueError: a weight is NaN or infinite.

    Example:
        >>> import torch
        >>> from hf_stateless.weights.int8.holder import hold
        >>> attention = torch.nn.MultiheadAttention(8, 2)
        >>> hold(attention, "in_proj_weight", None).codes.dtype
        torch.int8
        >>> x = torch.ones(1, 1, 8)
        >>> attention(x, x, x)[0].sum().backward()
        >>> attention.in_proj_weight.grad.shape
        torch.Size([24, 8])
    """
    weight = module._parameters[name]
    assert weight is not None
    if isinstance(weight, Int8Weight) or shard_of(weight) is not None:
        return weight
    return put(
        mix(module, Int8Holder), name, *quantize_stack(weight.detach(), group_size), weight.dtype, weight.requires_grad
    )


def release(module: nn.Module, dtype: torch.dtype, made: dict[int, nn.Parameter]) -> None:
    """Give a module its float weights and its class back, in place.

    Args:
        module: one that holds weights, or any other.
        dtype: of the weights.
        made: what was made of the weights of other modules, by their identity; is added to.
    """
    for name, weight in held_weights(module).items():
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(weight.dequantize(dtype), requires_grad=weight.requires_grad)
        module._parameters[name] = made[id(weight)]
        module._parameters.pop(scale_name(name), None)
    if isinstance(module, Int8Holder):
        del module.__dict__["_purses"]
        plain: nn.Module = module
        plain.__class__ = module.float_class


def checked_held(codes: Tensor, scale: Tensor, weight: Int8Weight) -> Tensor:
    """Return codes of a file in the shape of a weight."""
    rows, columns = weight.shape[:-1].numel(), weight.shape[-1]
    groups, length = weight.scale.shape[-1], columns // max(1, weight.scale.shape[-1])
    if codes.shape not in ((*weight.scale.shape, length), weight.shape) or scale.shape != weight.scale.shape:
        raise ValueError(
            f"got codes {tuple(codes.shape)} and scales {tuple(scale.shape)}, expected "
            f"{(*weight.scale.shape, length)} and {tuple(weight.scale.shape)}: load with the group_size it was saved "
            "with."
        )
    flat = codes.reshape(rows, groups, length), scale.reshape(rows, groups)
    return checked_codes(*flat, (rows, columns), length).view(weight.shape)


def put(
    holder: nn.Module, name: str, codes: Tensor, scale: Tensor, dtype: torch.dtype, requires_grad: bool
) -> Int8Weight:
    """Take over codes and scales as they are; the parameters are made anew."""
    holder._parameters[scale_name(name)] = kept = Scale(scale)
    holder._parameters[name] = weight = Int8Weight(codes, kept, dtype, requires_grad)
    return weight


def mix(module: nn.Module, family: Any) -> Any:
    """Turn a module into one of a family that holds weights, in place.

    Args:
        module: a plain one, or one of that family already.
        family: `Int8Holder` or a class of it.
    """
    if not isinstance(module, family):
        module.__dict__["_purses"] = {}
        module.__class__ = _mixed_class(family, type(module))  # type: ignore[arg-type]  # classes have hashes
    return module


@cache
def _mixed_class(family: Any, kind: Any) -> Any:
    # Code asks for names of classes, as for `...Experts`.
    body = {"float_class": kind, "family": family, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, family.bases(kind), body)


def _blank(family: Any, kind: Any) -> Any:
    """Return a module without contents, for who reads or copies one."""
    mixed = _mixed_class(family, kind)
    return mixed.__new__(mixed)


def _places(module: Int8Holder) -> Iterator[tuple[dict[str, Any], str, Int8Weight, Purse]]:
    """Yield where the module's own code finds its 8-bit weights, with the memory of their float values.

    A weight that PEFT adapts is under `parametrizations` for the time of a forward. Attention computes with the
    weight of its last projection itself.
    """
    around: Sequence[nn.Module] = [module]
    if isinstance(module, nn.MultiheadAttention) and isinstance(module.out_proj, Int8Holder):
        around = [module, module.out_proj]
    for holder in around:
        assert isinstance(holder, Int8Holder)
        slots = {name: (holder._parameters, name) for name in holder._parameters}
        adapted = getattr(holder, "parametrizations", None)
        if isinstance(adapted, nn.ModuleDict):
            slots |= {name: (part._parameters, "original") for name, part in adapted.items()}
        for name, (where, key) in slots.items():
            weight: Any = where[key]
            if isinstance(weight, Int8Weight | Int8Shard) or shard_of(weight) is not None:
                check_gathered(weight)
                if (scale := holder._parameters.get(scale_name(name))) is not None:
                    note_scale(weight, scale)
                yield where, key, weight, holder._purses.setdefault(name, Purse())

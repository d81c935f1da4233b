"""`Int8Shard`: the part of an 8-bit weight that a rank holds, and what all-gathers it as int8 under FSDP2.

FSDP2 cuts a parameter in chunks of rows, gathers it before it is used, and reduces its gradient to the same chunks.
Codes travel as int8 by FSDP2's extension for tensor subclasses. Scales are a frozen parameter beside them, which FSDP2
cuts in the same rows by itself; a group never leaves its row, so no group is cut. A stack is cut between its matrices.
Tensor parallelism of transformers cuts while it loads, see `parallel.py`; it computes with the parts and gathers none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..noise import RoundingKey
from ..stored import Lost, StoredWeight
from .coded import CodedWeight
from .codes import write_rows_


_aten = torch.ops.aten
# What changes which codes are seen, and not what they are.
_VIEWS = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.view.default,
    _aten.slice.Tensor,
    _aten.as_strided.default,
    _aten._pin_memory.default,
}
_LIKE = {_aten.zeros_like.default, _aten.empty_like.default, _aten.ones_like.default, _aten.full_like.default}


@dataclass
class Place:
    """Where rows come from and belong to; all views of a shard share one."""

    whole: Callable[[], Any] = lambda: None
    """The weight that is being cut, as long as it lives."""
    length: int = 1
    """How many weights of a row share a scale."""
    first: int = 0
    """Number of the first row in the whole matrix, or of the first matrix in the whole stack."""
    first_column: int = 0
    """Number of the first column in the whole matrix."""
    runs: tuple[tuple[int, int], ...] = ()
    """Where rows do not simply follow `first`: the number of the first one of each run, and how many follow it."""
    scale: Tensor | None = None
    """The scales of the rows; known from the first time that the weight was gathered."""
    beside: Callable[[], Tensor | None] | None = None
    """Finds the scales of a weight that is gathered, which are gathered beside it."""
    moved_to: nn.Parameter | None = None
    """What has replaced the parameter, for another module that it is tied to."""


class Int8Shard(CodedWeight):
    """Rows of an `Int8Weight`: a float tensor from outside, int8 codes inside, which no operation reads as floats.

    It is the local tensor of FSDP2's sharded parameter, and what a module has while its weight is gathered; then its
    scales are those that the module has, gathered too.

    Args:
        codes: (rows, columns) int8, or (matrices, rows, columns) of a stack.
        place: of the rows.
        dtype: what the weight counts as.
    """

    place: Place

    @property
    def kernel(self) -> str:  # type: ignore[override]
        """As for whole weights, once the scales are known; kernels count rows on from the first, and all columns."""
        counted = self.place.scale is not None and not self.place.runs and not self.place.first_column
        return "int8" if counted else ""

    @property
    def first_row(self) -> int:  # type: ignore[override]
        """Number of the first row in the whole matrix."""
        return self.place.first if self.ndim == 2 else 0

    @property
    def first_matrix(self) -> int:  # type: ignore[override]
        """Number of the first matrix in the whole stack."""
        return self.place.first if self.ndim > 2 else 0

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The scales of these rows, (..., rows, groups)."""
        scale = self.place.beside() if self.place.beside else self.place.scale
        if scale is None:
            raise RuntimeError("An 8-bit weight was written before it was used: run a forward pass first.")
        check_scale(scale)
        return scale

    def __new__(cls, codes: Tensor, place: Place, dtype: torch.dtype) -> Int8Shard:
        """Make the tensor around its codes."""
        shard: Int8Shard = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, codes.shape, strides=codes.stride(), dtype=dtype, device=codes.device
        )
        shard.codes, shard.place = codes, place
        return shard

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Shard({tuple(self.shape)}, rows from {self.place.first}, dtype={self.dtype})"

    @classmethod
    def empty_of(cls, whole: StoredWeight, codes: Tensor, size: Sequence[int]) -> Int8Shard:
        """Return room for some rows of a weight, which `copy_` will fill from it.

        Raises:
            ValueError: the rows are cut.
        """
        if tuple(size[1:]) != codes.shape[1:]:
            between = "rows" if codes.ndim == 2 else "the matrices of a stack"
            raise ValueError(
                f"An 8-bit weight {tuple(codes.shape)} can be cut between {between} only, got parts {tuple(size)}: "
                "leave shard_placement_fn out, or return Shard(0) for it."
            )
        place = Place(weakref.ref(whole), whole.shape[-1] // max(1, whole.stored[1].shape[-1]))
        return cls(codes.new_zeros(tuple(size)), place, whole.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do for the codes what moves or copies them; refuse what would compute with their values."""
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func is _aten.copy_.default and isinstance(first, cls):
            return first._copied_from(args[1])
        if func is _aten.set_.source_Tensor and args[1] is first:
            return first  # to itself, as a parametrization begins
        if not isinstance(first, cls):
            raise NotImplementedError(_refusal(func))
        codes, others = first.codes, args[1:]
        if func is _aten.clone.default:
            return cls(func(codes, *others, **kwargs), replace(first.place), first.dtype)
        if func in _VIEWS:
            return cls(func(codes, *others, **kwargs), first.place, first.dtype)
        if func is _aten.new_zeros.default and not kwargs.get("dtype"):
            return cls(codes.new_zeros(*others), first.place, first.dtype)
        if func is _aten._to_copy.default:
            dtype = kwargs.pop("dtype", None) or first.dtype
            return cls(func(codes, **kwargs), first.place, dtype)
        if func in _LIKE or func in (_aten.new_empty.default, _aten.new_zeros.default):
            return func(codes, *others, **{**kwargs, "dtype": kwargs.get("dtype") or first.dtype})
        if func is _aten.is_pinned.default:
            return func(codes, *others, **kwargs)
        if first.place.beside:  # gathered it is NaN, as a whole weight is: PEFT tries its adapters on it
            return func(
                torch.full((), float("nan"), dtype=first.dtype).to(codes.device).expand(first.shape), *others, **kwargs
            )
        raise NotImplementedError(_refusal(func))

    def _copied_from(self, source: Tensor) -> Int8Shard:
        whole = self.place.whole()
        if isinstance(source, Int8Shard):
            self.codes.copy_(source.codes)
        elif source.dtype == torch.int8:
            self.codes.copy_(source.reshape(self.codes.shape))
        elif whole is not None and source.dtype == whole.dtype and source.stride() == _stride_of_nothing(whole):
            # A chunk of the NaN that stands for each row: its place among them is that of the rows.
            self.place.first = int(source.storage_offset())
            self.codes.copy_(whole.codes[self.place.first :][: len(source)])
        else:
            raise NotImplementedError(_refusal("copy_ of float values"))
        return self

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The codes and their scales."""
        return (self.codes,) if self.place.scale is None else (self.codes, self.place.scale)

    def data_ptr(self) -> int:
        """Return where the codes are: accelerate tells by it which parameter of an optimizer is which of a model."""
        return self.codes.data_ptr()

    def matrices(self) -> list[StoredWeight]:
        """Return the matrices of this part of a stack, each over the memory that it has there.

        None where the stack was never gathered, so that there is no gradient: how checkpoints have a state made.
        """
        if self.place.scale is None:
            return []
        both = zip(self.codes.flatten(0, -3), self.scale.detach().flatten(0, -3), strict=True)
        return [
            Int8Shard(codes, replace(self.place, first=0, scale=scale, beside=None), self.dtype)
            for codes, scale in both
        ]

    @torch.no_grad()
    def write_rows_(
        self,
        update: Callable[[slice], Tensor],
        step_size: float | Tensor,
        decay: float | Tensor,
        key: RoundingKey | None,
        *,
        usable: Tensor | None = None,
        lost: Lost | None = None,
    ) -> None:
        """Apply the update of these rows, with the noise that they have in the whole matrix."""
        if self.place.scale is None and usable is not None:
            return  # never gathered, so that there is no gradient: how checkpoints have a state made
        scale, start = self.scale, 0
        for first, count in self.place.runs or ((self.first_row, len(self)),):
            rows = slice(start, start + count)
            write_rows_(
                self.codes[rows],
                scale[rows],
                _counted_from(start, update),
                step_size,
                decay,
                key,
                usable=usable,
                first_row=first,
                first_column=self.place.first_column,
                lost=lost and _told_from(start, lost),
            )
            start += count

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Shard:
        copied: Int8Shard = memo.setdefault(id(self), self.clone())
        return copied

    def stand_in(self, device: str) -> Int8Shard:
        """Return rows of this shape on another device, with contents that mean nothing."""
        return Int8Shard(torch.empty(self.codes.shape, dtype=torch.int8, device=device), Place(), self.dtype)

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Return what FSDP2 sends: the codes, filled up to as many rows as the first rank has."""
        held = {name: shard_of(p) for name, p in module._parameters.items()}
        name = next((name for name, shard in held.items() if shard is not None and shard.place is self.place), "")
        name_of_scale: Any = getattr(module, "name_of_scale", None)
        beside = name_of_scale(name) if name_of_scale else ""
        scale = module._parameters.get(beside)
        local = scale.to_local() if isinstance(scale, DTensor) else None
        if local is None or len(local) != len(self.codes):
            raise RuntimeError("The scales of an 8-bit weight have to be cut as its codes are: leave both to FSDP2.")
        self.place.scale = local
        rows = -(-outer_size[0] // mesh.size())
        self.place.first = mesh.get_local_rank() * rows
        codes = self.codes
        if len(codes) < rows:
            codes = torch.cat((codes, codes.new_zeros(rows - len(codes), *codes.shape[1:])))
        owner = weakref.ref(module)
        return (codes,), lambda: owner()._parameters[beside].detach()  # type: ignore[union-attr]

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the gathered weight, which sees the memory that FSDP2 gathers into."""
        if out is not None:
            return None
        return Int8Shard(outputs[0], Place(beside=metadata), dtype), ()


def shard_of(weight: Tensor | None) -> Int8Shard | None:
    """Return what this rank holds of an 8-bit weight, or None where that is not cut over ranks."""
    local = local_of(weight) if isinstance(weight, DTensor) else None
    return local if isinstance(local, Int8Shard) else None


@torch.no_grad()
def local_of(tensor: DTensor) -> Tensor:
    """Return what this rank holds of a tensor: the object itself, where autograd would give a view of it."""
    local: Tensor = tensor.to_local()
    return local


def check_scale(scale: Tensor) -> None:
    """Raise a RuntimeError for scales that FSDP2 has cast to a dtype that cannot hold them."""
    if scale.dtype == torch.float16:
        raise RuntimeError("FSDP2 casts scales of 8-bit weights to float16: type mixed_precision: bf16 or no.")


def _counted_from(start: int, update: Callable[[slice], Tensor]) -> Callable[[slice], Tensor]:
    return lambda rows: update(slice(start + rows.start, start + rows.stop))


def _told_from(start: int, lost: Lost) -> Lost:
    return lambda rows, values: lost(slice(start + rows.start, start + rows.stop), values)


def _stride_of_nothing(whole: StoredWeight) -> tuple[int, ...]:
    """Return the strides of the NaN that a weight has in the place of values: one for each row."""
    return torch.empty(len(whole), *(1 for _ in whole.shape[1:])).expand(whole.shape).stride()


def _refusal(what: Any) -> str:
    return (
        f"{what}: not for an 8-bit weight that is cut over ranks. Read codes and scales from a state dict (FULL or "
        "SHARDED); the optimizers of hf_stateless write them."
    )

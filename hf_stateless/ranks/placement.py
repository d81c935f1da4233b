"""What a rank holds of a parameter, its gradient and its state, and what all ranks know of them together.

A sharded parameter is a `DTensor` of which each rank holds a part, while row norms, column norms and whitening are
defined on whole matrices; `weights/cuts.py` describes the parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from ..update.batches import alike
from ..weights.cuts import cuts_of, groups_of, splits_of, whole_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this is a DTensor, of which a rank may hold only a part."""
    return isinstance(tensor, DTensor)


def align_gradients_(params: Iterable[Tensor]) -> None:
    """Give gradients the parts that their parameters have, where ranks have all of one, or have yet to add it up.

    Tensor parallelism leaves the gradient of an embedding that it cuts whole on every rank. Communicates only where
    gradients have to be added up, on all ranks of the mesh.
    """
    for p in params:
        grad = p.grad
        if not isinstance(p, DTensor) or not isinstance(grad, DTensor) or grad.device_mesh != p.device_mesh:
            continue
        pairs = zip(grad.placements, p.placements, strict=True)
        other = [of_grad for of_grad, of_param in pairs if of_grad != of_param]
        if other and all(placement.is_replicate() or placement.is_partial() for placement in other):
            p.grad = grad.redistribute(placements=p.placements)


def fill_gradients_(params: Iterable[Tensor]) -> set[int]:
    """Give parameters that are cut over ranks a gradient of zero where this rank has none; return their identities.

    Other ranks may have one: experts that no token of a rank took, a branch that it did not use. Ranks that left them
    out would meet in collectives of other lengths. Where no rank has one, a zero moves nothing.
    """
    filled = set()
    for p in params:
        if isinstance(p, DTensor) and p.grad is None and p.requires_grad:
            p.grad = torch.zeros_like(p.detach())
            filled.add(id(p))
    return filled


def mesh_of(tensor: Tensor | None) -> DeviceMesh | None:
    """Return the mesh of a DTensor; None of a plain tensor, which each rank has as a whole."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def local_shard(tensor: Tensor) -> Tensor:
    """Return the rows that this rank holds; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(update: Tensor, param: Tensor) -> Tensor:
    """Return the part of a whole update that belongs to this rank's shard of the parameter, without communication."""
    if not isinstance(param, DTensor):
        return update
    if (splits := cuts_of(param)) is not None:
        for split in reversed(splits):
            update = split.parts(update)[split.rank]
        return update.to(param.device)
    replicated = DTensor.from_local(update, param.device_mesh, [Replicate()] * param.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=param.placements).to_local().to(param.device)


@contextlib.contextmanager
def whole_if_unknown(param: Tensor, grad: Tensor, state: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Give a parameter, its gradient and its state, gathered where `splits_of` does not know the cut (a collective).

    Every rank then updates it whole, and keeps its own part of the parameter and of the state in the end.
    """
    if splits_of(param) is not None:
        yield param, grad, state
        return
    whole, whole_state = whole_tensor(param), whole_tensor(state)
    yield whole, whole_tensor(grad), whole_state
    local_shard(param).copy_(part_of(whole, param))
    local_shard(state).copy_(part_of(whole_state, state))


def zeros_along(param: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return zeros for each index of one dimension of a parameter, cut over ranks as that dimension is.

    The other dimensions have size 1, and ranks that share them hold the same.
    """
    local, shape = local_shard(param), [1] * param.ndim
    shape[dim] = local.shape[dim]
    zeros = torch.zeros(shape, dtype=dtype, device=local.device)
    if not isinstance(param, DTensor):
        return zeros
    cut = _cuts(param, dim)
    placements = [one if i in cut else Replicate() for i, one in enumerate(param.placements)]
    shape[dim] = param.shape[dim]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        zeros, param.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def sum_over_cut(values: Tensor, param: Tensor, dim: int) -> Tensor:
    """Return the sum of some values over the ranks among which a dimension of a parameter is cut (a collective).

    Where it is not cut they are returned as they are.
    """
    if not isinstance(param, DTensor) or not (cut := _cuts(param, dim)):
        return values
    shared = values.to(param.device_mesh.device_type)
    for mesh_dim in cut:
        dist.all_reduce(shared, group=param.device_mesh.get_group(mesh_dim))
    return shared.to(values.device)


def _cuts(param: DTensor, dim: int) -> list[int]:
    """Return the mesh dimensions over which a dimension of a parameter is cut."""
    cut = [(i, placement) for i, placement in enumerate(param.placements) if not placement.is_replicate()]
    return [i for i, placement in cut if getattr(placement, "dim", dim) % param.ndim == dim]


def shard_number(param: Tensor) -> int:
    """Number the distinct shards of a parameter, so that rounding noise is equal on replicas and differs on shards."""
    number = 0
    if isinstance(param, DTensor):
        for dim, placement in enumerate(param.placements):
            if not placement.is_replicate():
                number = number * param.device_mesh.size(dim) + param.device_mesh.get_local_rank(dim)
    return number


def wide_norm(tensor: Tensor) -> Tensor:
    """Return the norm of a tensor in at least float32, in which half precision is summed."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return norm


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the norm of some gradients together, in float32; a collective for each way in which DTensors are cut.

    Example:
        >>> import torch
        >>> from hf_stateless.ranks.placement import total_norm
        >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    squares = []
    for of_cut in alike(grads, lambda g: (g.device_mesh, g.placements) if isinstance(g, DTensor) else g.device):
        norms = [wide_norm(_summable(g).detach()).double() for g in of_cut]
        squares.append(_sum_over_ranks(torch.stack(norms).square().sum(), of_cut[0]))
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt().float()


def _summable(grad: Tensor) -> Tensor:
    """Return this rank's part of a gradient, so that the squares of all parts add up to that of the whole."""
    if isinstance(grad, DTensor) and any(placement.is_partial() for placement in grad.placements):
        grad = grad.redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])
    return local_shard(grad)


def _sum_over_ranks(square: Tensor, grad: Tensor) -> Tensor:
    if not isinstance(grad, DTensor):
        return square
    shared = square.to(grad.device_mesh.device_type)
    for dim, placement in enumerate(grad.placements):
        if not (placement.is_replicate() or placement.is_partial()):
            dist.all_reduce(shared, group=grad.device_mesh.get_group(dim))
    return shared


def check_gradients(params: Sequence[Tensor], filled: Sequence[bool] = ()) -> list[tuple[bool, bool, bool]]:
    """Tell for each parameter whether its gradient is finite, not zero, and there at all, over all ranks.

    One synchronisation for all parameters, and a collective if there are DTensors.

    Args:
        params: with gradients.
        filled: for each, whether `fill_gradients_` has given it one on this rank; none by default.

    Example:
        >>> import torch
        >>> from hf_stateless.ranks.placement import check_gradients
        >>> W = torch.ones(2)
        >>> W.grad = torch.tensor([1.0, float("inf")])
        >>> check_gradients([W])
        [(False, True, True)]
    """
    if not params:
        return []
    finite, nonzero, there = (flags.tolist() for flags in gradient_flags(params, filled))
    return list(zip(finite, nonzero, there, strict=True))


def gradient_flags(params: Sequence[Tensor], filled: Sequence[bool] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `check_gradients` tells as flags on a device, unread: which are finite, not zero, and there at all.

    Args:
        params: at least one, with gradients.
        filled: for each, whether `fill_gradients_` has given it one on this rank; none by default.

    Example:
        >>> import torch
        >>> from hf_stateless.ranks.placement import gradient_flags
        >>> W = torch.ones(2)
        >>> W.grad = torch.tensor([1.0, float("nan")])
        >>> gradient_flags([W])
        (tensor([False]), tensor([True]), tensor([True]))
    """
    # A group may mix plain tensors with DTensors, and devices.
    one = next((p for p in params if isinstance(p, DTensor)), params[0])
    flags = torch.stack(_flags([local_shard(p.grad) for p in params], one.device))  # type: ignore[arg-type]
    missing = torch.zeros_like(flags[:, :1])
    for i in (i for i, is_filled in enumerate(filled) if is_filled):
        missing[i] = True
    finite, zero, missing = _on_all_ranks(torch.cat([flags, missing], 1), params).bool().unbind(1)
    return finite, zero.logical_not(), missing.logical_not()


def _flags(grads: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return for each gradient whether it is finite and whether it is zero; on a GPU in a few launches for all."""
    together = [i for i, g in enumerate(grads) if g.device.type == "cuda" and g.is_floating_point() and g.numel()]
    flags: dict[int, Tensor] = {}
    for same in alike(together, lambda i: (grads[i].device, grads[i].dtype)):
        flags.update(zip(same, _finite_and_zero_of_all([grads[i] for i in same]).to(device).unbind(), strict=True))
    return [flags[i] if i in flags else _finite_and_zero(grad).to(device) for i, grad in enumerate(grads)]


def _finite_and_zero_of_all(grads: list[Tensor]) -> Tensor:
    """Return a line of both flags for each of some gradients that are not empty."""
    largest = torch.stack(torch._foreach_norm(grads, float("inf")))
    return torch.stack([torch.isfinite(largest), largest == 0], 1)


def _finite_and_zero(grad: Tensor) -> Tensor:
    if grad.numel() == 0:
        return torch.ones(2, dtype=torch.bool, device=grad.device)
    if grad.is_complex():
        grad = torch.view_as_real(grad)
    extremes = torch.stack(torch.aminmax(grad))
    return torch.stack([torch.isfinite(extremes).all(), (extremes == 0).all()])


def _on_all_ranks(flags: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Return the flags that are set on all ranks that hold a part of a parameter; replicas have the same gradient."""
    one = next((p for p in params if isinstance(p, DTensor)), None)
    if one is None:
        return flags
    shared = flags.to(one.device_mesh.device_type, torch.int32)
    for group in groups_of(params):
        dist.all_reduce(shared, op=dist.ReduceOp.MIN, group=group)
    return shared

"""What a sharded gradient needs: row norms, column norms and whitening are defined on whole matrices.

Under FSDP2 a parameter is a `DTensor` of which each rank holds some rows. The gradient is gathered, normalised as the
single process would, and each rank keeps its own part of the update: exact for every norm projection.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this is a DTensor, of which a rank may hold only a part.

    Example:
        >>> import torch
        >>> from hf_stateless.sharding import is_sharded
        >>> is_sharded(torch.ones(2))
        False
    """
    return isinstance(tensor, DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """Return the rows that this rank holds; a plain tensor is returned as it is.

    Example:
        >>> import torch
        >>> from hf_stateless.sharding import local_shard
        >>> local_shard(torch.ones(2)).shape
        torch.Size([2])
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_matrix(tensor: Tensor) -> Tensor:
    """Return the gathered tensor (a collective on all ranks of its mesh); a plain tensor is returned as it is.

    Example:
        >>> import torch
        >>> from hf_stateless.sharding import whole_matrix
        >>> whole_matrix(torch.ones(2)).shape
        torch.Size([2])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(update: Tensor, param: Tensor) -> Tensor:
    """Return the part of a whole update that belongs to this rank's shard of the parameter, without communication.

    Example:
        >>> import torch
        >>> from hf_stateless.sharding import part_of
        >>> part_of(torch.ones(2), torch.zeros(2)).shape
        torch.Size([2])
    """
    if not isinstance(param, DTensor):
        return update
    replicated = DTensor.from_local(update, param.device_mesh, [Replicate()] * param.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=param.placements).to_local()


def shard_number(param: Tensor) -> int:
    """Number the distinct shards of a parameter, so that rounding noise is equal on replicas and differs on shards.

    Example:
        >>> import torch
        >>> from hf_stateless.sharding import shard_number
        >>> shard_number(torch.zeros(2))
        0
    """
    number = 0
    if isinstance(param, DTensor):
        for dim, placement in enumerate(param.placements):
            if not placement.is_replicate():
                number = number * param.device_mesh.size(dim) + param.device_mesh.get_local_rank(dim)
    return number


def agree(flags: Tensor, param: Tensor) -> Tensor:
    """Return the flags that are set on every rank that holds a part of the parameter (a collective for DTensors).

    Example:
        >>> import torch
        >>> from hf_stateless.sharding import agree
        >>> agree(torch.tensor([True, False]), torch.zeros(2))
        tensor([ True, False])
    """
    if not isinstance(param, DTensor):
        return flags
    shared = flags.to(torch.int32)
    for dim in range(param.device_mesh.ndim):
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MIN, group=param.device_mesh.get_group(dim))
    return shared.bool()

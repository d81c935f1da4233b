"""Checkpoints of a model that is cut over ranks and of its optimizer, SHARDED and FULL, as torch writes them."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from hf_stateless.weights.cuts import whole_tensor


FULL = StateDictOptions(full_state_dict=True)


def whole_state(model):
    """What one process would save of the model; FULL of torch 2.11 cannot gather packed projections."""
    return {name: whole_tensor(t).clone() for name, t in get_model_state_dict(model).items()}


def save_sharded(model, optimizer, folder):
    """Save the parts of all ranks; return those of the model."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    return of_model


def load_sharded(model, optimizer, folder):
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def save_full(model, optimizer, file):
    """Let the first rank save all as one process would; the others wait for it."""
    full = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save(full, file)
    dist.barrier()


def load_full(model, optimizer_of, file, *, sent=True):
    """Load what the first rank reads and sends, or what each reads; return the optimizer, which is made in between."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=sent)
    of_model, of_optimizer = ({}, {}) if sent and dist.get_rank() > 0 else torch.load(file)
    set_model_state_dict(model, of_model, options=options)
    optimizer = optimizer_of(model)
    set_optimizer_state_dict(model, optimizer, of_optimizer, options=options)
    return optimizer

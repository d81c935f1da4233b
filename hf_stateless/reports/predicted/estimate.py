"""Weights, gradients, state, activations and temporaries put together into the fullest moment of a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...norms.chain import Chain
from ...optimizer.optimizer import StatelessOptimizer
from ...optimizer.release import is_released
from ...optimizer.rules import part_of_group
from ...trainer.optim_args import is_layerwise
from ...update.batches import BATCH_BYTES
from ...update.layout import layout_at
from ...weights.stored import StoredWeight, stand_in
from ..command_line import one_line
from .batch import Batch, example_batch
from .model import tensor_bytes, weight_bytes_of_rank
from .parallel import gathered_share, whole_shape
from .parallel_wire import sent_by_fsdp, sent_by_optimizer, sent_by_plans
from .state import RULES, is_ours, optimizer_groups, optimizer_state_bytes, trained_parameters
from .table import Estimate, Settings
from .trace import LiveBytes, Peak, Timeline, trace_training
from .wire import exchange_temporary
from .zero import zero_bytes, zero_optimizer_bytes, zero_state, zero_temporary


# Forward and backward where gradients are released: by the identities of their parameters, the bytes of each update.
# Under FSDP2 a part of the other gradients is kept.
_Trace = Callable[[Mapping[int, int]], Peak]
# Temporaries of steps that were predicted before, by what they depend on: models repeat shapes, and pages questions.
_KNOWN_STEPS: dict[Hashable, int] = {}


def estimate(
    model: nn.Module, optimizers: Sequence[str], settings: Settings, optim_args: Mapping[str, Any] | None = None
) -> list[Estimate]:
    """Predict the memory of training a model with each of several optimizers.

    Args:
        model: on the meta device, from `hf_stateless.reports.predicted.model.build_model`.
        optimizers: names from `hf_stateless.reports.predicted.state.known_optimizers`.
        settings: the run.
        optim_args: options of the optimizers: `rank` goes to `galore_adamw`, everything else to ours.

    Raises:
        ValueError: an unknown optimizer or option, or a model that cannot be traced.

    Example:
        >>> from transformers import LlamaConfig
        >>> from hf_stateless.reports.predicted import Settings, build_model, estimate
        >>> settings = Settings(batch=1, seq=16)
        >>> model = build_model(LlamaConfig(num_hidden_layers=2, architectures=["LlamaForCausalLM"]), settings)
        >>> for row in estimate(model, ["sinkgd", "adamw_torch_fused"], settings):
        ...     print(f"{row.optimizer}: weights {row.weights >> 20} MiB, state {row.optimizer_state >> 20} MiB")
        sinkgd: weights 1272 MiB, state 1000 MiB
        adamw_torch_fused: weights 1272 MiB, state 2544 MiB
    """
    per_name = _share_out(optimizers, optim_args or {})
    batch = example_batch(model, settings)

    @cache  # one run of the model for all optimizers
    def timeline() -> Timeline:
        return _timeline(model, batch, settings)

    def trace(released: Mapping[int, int]) -> Peak:
        ranks = settings.parts[1]
        kept = {id(p): (tensor_bytes([p], ranks), 0) for p in model.parameters()} if ranks > 1 else {}
        return timeline().peak({**kept, **{key: (0, size) for key, size in released.items()}})

    try:
        return [_estimate(model, name, settings, per_name[name], trace) for name in optimizers]
    except (ArithmeticError, RuntimeError) as error:
        raise ValueError(f"The step of {type(model).__name__} cannot be predicted: {one_line(error, 300)}") from error


def _share_out(optimizers: Sequence[str], optim_args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options of each optimizer; what belongs to none of them goes to all, to be refused."""
    ours = [name for name in optimizers if is_ours(name)]
    rank = {key: value for key, value in optim_args.items() if key == "rank" and "galore_adamw" in optimizers}
    rest = {key: value for key, value in optim_args.items() if key not in rank}
    shared: dict[str, dict[str, Any]] = {name: dict(rest) for name in ours or optimizers}
    return {name: {**shared.get(name, {}), **(rank if name == "galore_adamw" else {})} for name in optimizers}


def _timeline(model: nn.Module, batch: Batch, settings: Settings) -> Timeline:
    try:
        return trace_training(model, batch.loss, settings.device)
    except Exception as error:  # of a model's own code, on tensors that it was not written for
        raise ValueError(f"{type(model).__name__} cannot be traced: {one_line(error, 300)}") from error


def _estimate(
    model: nn.Module, name: str, settings: Settings, optim_args: Mapping[str, Any], trace: _Trace
) -> Estimate:
    (ranks, of_gradients), device = settings.parts, settings.device
    groups = optimizer_groups(model, name, optim_args) if is_ours(name) else []
    release = optim_args.get("release", "matrices")
    layerwise = [g for g in groups if is_layerwise(name) and is_released(g["algorithm"], release)]
    released = update_temporaries(layerwise, device)
    kept = [group for group in groups if not any(id(p) in released for p in group["params"])]
    if groups:
        sharing = settings.fsdp * settings.tp
        needed = exchange_temporary([_whole(group) for group in kept], sharing) if sharing > 1 else 0
        temporary = max(step_temporary(kept, device), needed)
    else:
        held = trained_parameters(model, max(settings.fsdp, settings.ranks))
        temporary = RULES[name].temporary(held, device)
    backward = trace(released)
    unreleased = [p for p in model.parameters() if p.requires_grad and id(p) not in released]
    gradients = tensor_bytes(unreleased, of_gradients)
    weights, state = weight_bytes_of_rank(model, ranks), optimizer_state_bytes(model, name, optim_args, ranks)
    if settings.zero:
        state = zero_state(model, name, optim_args, settings.ranks)
        temporary = zero_temporary(model, temporary, settings, groups)
    gathered = _gathered(model, bool(released) and settings.checkpointing) if ranks > 1 else 0
    always = {"weights": weights, "optimizer_state": state}
    finished = backward.gradients_then
    in_backward = {"gradients": finished, "activations": backward.total - finished, "gathered": gathered}
    moments = {
        "backward": {**always, **in_backward},
        "step": {**always, "gradients": gradients, "temporary": temporary},
    }
    moment, at_peak = max(moments.items(), key=lambda moment: sum(moment[1].values()))
    return Estimate(
        optimizer=name,
        weights=weights,
        optimizer_state=state,
        gradients=max(gradients, backward.gradients) if released else gradients,
        activations=trace({}).activations,
        temporary=max(temporary, *released.values(), 0),
        sent=_sent(model, name, optim_args, settings),
        sent_by_fsdp=_sent_by_sharding(model, settings),
        sent_by_plans=sent_by_plans(model, settings),
        gathered=gathered,
        peak=sum(at_peak.values()),
        moment=moment,
        at_peak=at_peak,
    )


def _sent_by_sharding(model: nn.Module, settings: Settings) -> int:
    if not settings.zero:
        return sent_by_fsdp(model, settings)
    trained = tensor_bytes(p for p in model.parameters() if p.requires_grad)
    return zero_bytes(tensor_bytes(model.parameters()), trained, settings.zero, settings.ranks)


def _sent(model: nn.Module, name: str, optim_args: Mapping[str, Any], settings: Settings) -> int | None:
    """Return what an optimizer sends: those of transformers that update each entry by itself send nothing."""
    if settings.zero:
        return zero_optimizer_bytes(model, name, optim_args, settings)
    if settings.fsdp * settings.tp == 1:
        return None
    if is_ours(name):
        return sent_by_optimizer(model, name, optim_args, settings)
    return None if name in ("galore_adamw", "adafactor") else 0


def _gathered(model: nn.Module, any_layer: bool) -> int:
    """Return what FSDP2 holds whole: two layers, all outside of the layers, and the gradients of one and of those.

    Where any layer may be the fullest, and not the last alone, as with activation checkpointing and without gradients
    that pile up, one that is lent its stacks in float has them while FSDP2 reduces the gradients of the layer before.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(m) for outer in lists for m in outer.modules() if m is not outer}
    layers = [list(layer.parameters()) for outer in lists if id(outer) not in inner for layer in outer]
    inside = {id(p) for layer in layers for p in layer}
    outside = [p for p in model.parameters() if id(p) not in inside]
    largest = max(layers, key=tensor_bytes, default=[])
    lent = any_layer and any(isinstance(p, StoredWeight) and p.ndim > 2 for p in largest)
    gradients = sum(_gathered_bytes(p, p) for p in [*largest * (1 + lent), *outside] if p.requires_grad)
    whole = [*largest, *largest, *outside]  # what is stored of them: of a weight in 8 bits its codes
    return sum(_gathered_bytes(p, p.detach()) for p in whole) + gradients


def _gathered_bytes(p: Tensor, stored: Tensor) -> int:
    return int(gathered_share(p) * tensor_bytes([stored]))


def _whole(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a group with whole matrices in the place of parts, if their owners put them together."""
    if group["algorithm"] != "multinorm" or not Chain.of(group).whitens:
        return group
    whole = [p if whole_shape(p) == p.shape else p.new_empty(whole_shape(p)) for p in group["params"]]
    return {**group, "params": whole}


def step_temporary(groups: Sequence[Mapping[str, Any]], device: str) -> int:
    """Predict the bytes that a step of `StatelessOptimizer` needs on top, by running it on tensors without memory.

    Args:
        groups: of the optimizer.
        device: where it runs, `cpu` or `meta` for a GPU.
    """
    if not groups:
        return 0
    groups = [_whole(group) for group in groups]
    needed = [part_of_group(g, _at_once(g, _place(g, device))) for g in groups]
    key = (device, *(_key_of(group) for group in needed))
    if key not in _KNOWN_STEPS:
        _KNOWN_STEPS[key] = _step_of(needed, device)
    return _KNOWN_STEPS[key]


def _key_of(group: Mapping[str, Any]) -> Hashable:
    options = sorted((name, repr(value)) for name, value in group.items() if name != "params")
    return (*options, *((type(p), p.shape, p.dtype) for p in group["params"]))


def _step_of(groups: Sequence[Mapping[str, Any]], device: str) -> int:
    with FakeTensorMode(), LiveBytes() as live:
        optimizer = StatelessOptimizer([{**g, "params": _fakes(g["params"], _place(g, device))} for g in groups])
        optimizer.step()  # makes the state
        before = live.now
        live.restart()
        optimizer.step()
        return int(live.peak.total - before)


def _place(group: Mapping[str, Any], device: str) -> str:
    """Return where a group is run: the meta device stands for a GPU, but CPUs have the fused AdamW of GPUs."""
    return "cpu" if device == "cpu" or group["algorithm"].startswith("adamw") else "meta"


def _at_once(group: Mapping[str, Any], device: str) -> list[int]:
    """Return the positions of no more parameters, or pairs, of each shape and layout than are updated at once."""
    counts: dict[Hashable, int] = {}
    needed: list[int] = []
    params, width = group["params"], 2 if group["algorithm"] == "lora_product" else 1
    for first in range(0, len(params), width):
        together = range(first, first + width)
        key = tuple(_kind(group, i) for i in together)
        counts[key] = counts.get(key, 0) + 1
        size = sum(params[i].numel() * params[i].dtype.itemsize for i in together)
        if counts[key] == 1 or (device != "cpu" and (counts[key] - 1) * size < BATCH_BYTES):
            needed += together
    return needed


def _kind(group: Mapping[str, Any], position: int) -> Hashable:
    """Return what is equal for parameters of a group whose updates need the same."""
    p = group["params"][position]
    return p.shape, p.dtype, layout_at(group, position).name if group.get("layouts") else ""


def _fakes(params: Sequence[Tensor], device: str) -> list[nn.Parameter]:
    """Return stand-ins with gradients for parameters."""
    # Of a stack in a format of its own one matrix is worked on at a time.
    fakes = [
        nn.Parameter(torch.empty(p.shape[-2:], dtype=p.dtype, device=device))
        if isinstance(p, StoredWeight) and p.ndim > 2
        else stand_in(p, device)
        for p in params
    ]
    for fake in fakes:
        fake.grad = torch.empty_like(fake)
    return fakes


def update_temporaries(groups: Sequence[Mapping[str, Any]], device: str) -> dict[int, int]:
    """Predict for each parameter, by its identity, the bytes that its own update in backward needs.

    Args:
        groups: those that are updated in backward.
        device: as for `step_temporary`.
    """
    known: dict[Hashable, int] = {}
    found = {}
    for number, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            key = (number, _kind(group, i))
            if key not in known:
                known[key] = step_temporary([part_of_group(group, [i])], device)
            found[id(p)] = known[key]
    return found

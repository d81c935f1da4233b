"""Weights, gradients, state, activations and temporaries put together into the fullest moment of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...optimizer.release import is_released
from ...trainer.optim_args import is_layerwise
from ..command_line import first_line
from .model import example_inputs, tensor_bytes, weight_bytes_of_rank
from .state import RULES, is_ours, optimizer_groups, optimizer_state_bytes, trained_parameters
from .step import step_temporary, update_temporaries
from .table import Estimate, Settings
from .trace import Peak, trace_training


_Trace = Callable[[Mapping[int, int]], Peak]


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
        >>> for row in estimate(model, ["sinkgd", "adamw_torch"], settings):
        ...     print(f"{row.optimizer}: weights {row.weights >> 20} MiB, state {row.optimizer_state >> 20} MiB")
        sinkgd: weights 1272 MiB, state 1000 MiB
        adamw_torch: weights 1272 MiB, state 2544 MiB
    """
    per_name = _share_out(optimizers, optim_args or {})
    inputs = example_inputs(model, settings)
    traces: dict[frozenset[tuple[int, int]], Peak] = {}

    def trace(released: Mapping[int, int]) -> Peak:
        key = frozenset(released.items())
        if key not in traces:
            traces[key] = _trace(model, inputs, settings, released)
        return traces[key]

    return [_estimate(model, name, settings, per_name[name], trace) for name in optimizers]


def _share_out(optimizers: Sequence[str], optim_args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options of each optimizer; what belongs to none of them goes to all, to be refused."""
    ours = [name for name in optimizers if is_ours(name)]
    rank = {key: value for key, value in optim_args.items() if key == "rank" and "galore_adamw" in optimizers}
    rest = {key: value for key, value in optim_args.items() if key not in rank}
    shared: dict[str, dict[str, Any]] = {name: dict(rest) for name in ours or optimizers}
    return {name: {**shared.get(name, {}), **(rank if name == "galore_adamw" else {})} for name in optimizers}


def _trace(model: nn.Module, inputs: Mapping[str, Tensor], settings: Settings, released: Mapping[int, int]) -> Peak:
    """Return what forward and backward hold where some gradients are released and FSDP2 keeps a part of the others."""
    outcomes = {id(p): (tensor_bytes([p], settings.fsdp), 0) for p in model.parameters()} if settings.fsdp > 1 else {}
    outcomes.update((key, (0, size)) for key, size in released.items())
    try:
        return trace_training(model, inputs, outcomes, settings.device)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{type(model).__name__} cannot be traced: {first_line(error)}") from error


def _estimate(
    model: nn.Module, name: str, settings: Settings, optim_args: Mapping[str, Any], trace: _Trace
) -> Estimate:
    ranks, device = settings.fsdp, settings.device
    groups = optimizer_groups(model, name, optim_args) if is_ours(name) else []
    released = _released(groups, name, optim_args, device)
    kept = [group for group in groups if not any(id(p) in released for p in group["params"])]
    if groups:
        temporary = step_temporary(kept, device)
    else:
        temporary = RULES[name].temporary(trained_parameters(model, ranks), device)
    backward = trace(released)
    gradients = tensor_bytes([p for p in model.parameters() if p.requires_grad and id(p) not in released], ranks)
    weights, state = weight_bytes_of_rank(model, ranks), optimizer_state_bytes(model, name, optim_args, ranks)
    gathered = _gathered(model) if ranks > 1 else 0
    moment, at_peak = _fullest(weights, state, gathered, backward, {"gradients": gradients, "temporary": temporary})
    return Estimate(
        optimizer=name,
        weights=weights,
        optimizer_state=state,
        gradients=max(gradients, backward.gradients) if released else gradients,
        activations=trace({}).activations,
        temporary=max(temporary, *released.values(), 0),
        gathered=gathered,
        peak=sum(at_peak.values()),
        moment=moment,
        at_peak=at_peak,
    )


def _fullest(
    weights: int, state: int, gathered: int, backward: Peak, in_step: Mapping[str, int]
) -> tuple[str, Mapping[str, int]]:
    """Return the fuller of the two moments of a step, and what is held then."""
    always = {"weights": weights, "optimizer_state": state}
    in_backward = {
        "gradients": backward.gradients_then,
        "activations": backward.total - backward.gradients_then,
        "gathered": gathered,
    }
    moments = {"backward": {**always, **in_backward}, "step": {**always, **in_step}}
    return max(moments.items(), key=lambda moment: sum(moment[1].values()))


def _released(
    groups: Sequence[Mapping[str, Any]], name: str, optim_args: Mapping[str, Any], device: str
) -> Mapping[int, int]:
    """Return, for each parameter that is updated in backward, the bytes that its update needs, by identity."""
    if not (groups and is_layerwise(name)):
        return {}
    release = optim_args.get("release", "matrices")
    return update_temporaries([g for g in groups if is_released(g["algorithm"], release)], device)


def _gathered(model: nn.Module) -> int:
    """Return what FSDP2 holds whole: two layers, all outside of the layers, and the gradients of one and of those."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(m) for outer in lists for m in outer.modules() if m is not outer}
    layers = [list(layer.parameters()) for outer in lists if id(outer) not in inner for layer in outer]
    inside = {id(p) for layer in layers for p in layer}
    outside = [p for p in model.parameters() if id(p) not in inside]
    largest = max(layers, key=tensor_bytes, default=[])
    gradients = tensor_bytes(p for p in [*largest, *outside] if p.requires_grad)
    return 2 * tensor_bytes(largest) + tensor_bytes(outside) + gradients

"""From a measured run to its `memory_report.json`: what was run, what it took, and what AdamW would have taken."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer

from ...weights.int8.convert import without_scales
from ..files import GIB
from ..provenance import published_command, published_options, versions
from ..run_facts import adapter_of, base_of, hub_id
from .footprint import count_parameters
from .meter import Reading, RunMeter, highest
from .schema import Cost, Counted, Measured, MemoryReport, Moments, Prediction, Provenance, Range, Residual, Setup


COMPARED = ("adamw_torch_fused", "adamw_bnb_8bit")
"""Optimizers whose memory is predicted for the same run; the first is the default of transformers."""


def build_report(trainer: Trainer, meter: RunMeter, rows: Sequence[Reading], *, complete: bool) -> MemoryReport:
    """Put together what is known of a run so far, from the meter of the main process and the readings of all ranks."""
    top = highest(rows)
    counted = Counted(top.weights, top.gradients, top.optimizer_state)
    cuda = meter.device.type == "cuda"
    tokens = sum(row.tokens for row in rows)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    seconds_per_step, share, tokens_per_second = meter.rates(tokens)
    return MemoryReport(
        setup=describe_setup(trainer, meter, max(row.longest_row for row in rows)),
        measured=Measured(
            kind=meter.probe.kind,
            peak_since=meter.probe.since,
            steps=meter.steps,
            from_step=trainer.state.global_step - meter.steps,
            start=top.start,
            peak=Range(top.peak, min(row.peak for row in rows)),
            moments=Moments(top.forward_backward, top.optimizer_step),
            reserved=Range(max(r.reserved for r in rows), min(r.reserved for r in rows)) if cuda else None,
            retries=sum(row.retries for row in rows) if cuda else None,
            ooms=sum(row.ooms for row in rows) if cuda else None,
        ),
        counted=counted,
        residual=residual(top.peak, counted, top.before_training),
        groups=meter.groups,
        predicted={name: predict(meter, top, name) for name in COMPARED},
        cost=Cost(tokens or None, tokens_per_second, seconds_per_step, share, meter.seconds),
        provenance=Provenance(versions(), published_command(), today.isoformat()),
        complete=complete,
    )


def residual(peak: int, counted: Counted, before_training: int) -> Residual:
    """Divide what is not counted into what was held before training and what training added.

    On CPU, memory that was held before training and is reused in it counts as held before.
    """
    rest = max(0, peak - counted.weights - counted.gradients - counted.optimizer_state)
    before = min(before_training, rest)
    return Residual(rest - before, before)


def memory_parts(reading: Reading, peak: int) -> dict[str, float]:
    """Return the parts of a peak as a log has them, in GiB: what is counted, and the rest as `residual` divides it.

    Args:
        reading: of one rank.
        peak: in bytes.
    """
    rest = residual(
        peak, Counted(reading.weights, reading.gradients, reading.optimizer_state), reading.before_training
    )
    return {
        "memory/weights_gib": reading.weights / GIB,
        "memory/gradients_gib": reading.gradients / GIB,
        "memory/activations_gib": rest.activations_and_temporaries / GIB,
        "memory/before_training_gib": rest.before_training / GIB,
        "memory/optimizer_share": reading.optimizer_state / peak if peak else 0.0,
    }


def continued(report: MemoryReport, earlier: MemoryReport) -> MemoryReport:
    """Return the report of a resumed run with that of the part before added: peaks and sums, rates of the new part."""
    now, then = report.measured, earlier.measured
    if now.kind != then.kind:
        return report
    now.peak = Range(*map(max, astuple(now.peak), astuple(then.peak)))
    now.moments = Moments(*map(max, astuple(now.moments), astuple(then.moments)))
    now.steps += then.steps
    now.from_step = then.from_step
    cost = report.cost
    cost.seconds += earlier.cost.seconds
    cost.tokens = (cost.tokens or 0) + (earlier.cost.tokens or 0) or None
    report.setup.sequence_length = max(report.setup.sequence_length, earlier.setup.sequence_length)
    report.residual = residual(now.peak.max, report.counted, report.residual.before_training)
    return report


def predict(meter: RunMeter, reading: Reading, name: str) -> Prediction:
    """Predict what another optimizer would have taken in the same run.

    The assumptions are `hf_stateless.reports.measured.schema.ASSUMPTIONS`. The peak is the higher of two moments:
    forward and backward as measured, with the states exchanged, and the optimizer's step with all gradients and the
    temporaries of that optimizer.
    """
    from ..predicted.state import RULES, Parameter, rule_bytes

    embeddings = {id(p) for m in meter.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(False)}
    held = [(p.to_local() if isinstance(p, DTensor) else p, id(p) in embeddings) for p in meter.trained]
    params = [Parameter(tuple(p.shape), p.dtype, "embedding" if embeds else "rest") for p, embeds in held]
    gradients = sum(p.nbytes for p in params)
    state = rule_bytes(name, params)
    # Without a second step, forward and backward were measured before there was any state.
    backward = (reading.settled - reading.optimizer_state) if reading.settled else reading.forward_backward
    step = reading.before_training + reading.weights + gradients + RULES[name].temporary(params, meter.device.type)
    return Prediction(gradients=gradients, optimizer_state=state, peak=max(backward, step) + state)


def describe_setup(trainer: Trainer, meter: RunMeter, longest_row: int) -> Setup:
    """Describe the run with nothing private in it; local folders are left out."""
    args = trainer.args
    model: Any = meter.model
    base, adapter = base_of(model), adapter_of(model)
    rank = getattr(adapter[1], "r", None) if adapter else None
    kind = next(c for c in type(base).__mro__ if not issubclass(c, FSDPModule))
    counts = count_parameters(without_scales(model))
    cuda, threads = meter.device.type == "cuda", torch.get_num_threads()
    return Setup(
        device=torch.cuda.get_device_name(meter.device) if cuda else f"CPU, {threads} thread{'s' * (threads > 1)}",
        device_capacity=torch.cuda.get_device_properties(meter.device).total_memory if cuda else None,
        world_size=args.world_size,
        strategy=strategy(trainer),
        model=kind.__name__,
        base_model=hub_id(str(getattr(base, "name_or_path", None) or "")),
        parameters=sum(counts.values()),
        trainable_parameters=sum(p.numel() for p in meter.trained),
        dtypes=counts,
        optimizer=meter.name,
        optimizer_options=published_options(args.optim_args),
        learning_rate=float(args.learning_rate),
        per_device_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        sequence_length=longest_row,
        gradient_checkpointing=any(vars(args).get(f"{word}_checkpointing") for word in ("activation", "gradient")),
        peft=adapter and {"type": adapter[0], **({"r": rank} if rank else {})},
        quantization=_quantization(base),
    )


def strategy(trainer: Trainer) -> str:
    """Return how the ranks share the work, in one word."""
    kind = trainer.accelerator.distributed_type.value
    if kind == "FSDP":
        return "FSDP2" if trainer.accelerator.is_fsdp2 else "FSDP1"
    return "DDP" if kind.startswith("MULTI_") else "single" if kind == "NO" else kind


def _quantization(model: Any) -> str | None:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    values = config if isinstance(config, Mapping) else config.to_dict()
    method = values.get("quant_method", "unknown")
    bits = next((f"{bits}-bit " for bits in (8, 4) if values.get(f"load_in_{bits}bit")), "")
    return f"{bits}{getattr(method, 'value', method)}"

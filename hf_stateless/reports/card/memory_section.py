"""The sentences and rows of a card's memory section, from the memory report of a run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from math import floor, log10
from typing import Any

from ..files import size_text
from ..measured.schema import ASSUMPTIONS, MemoryReport
from ..provenance import published_command
from ..secrets import HIDDEN
from .markdown import code, one_line, plain


def memory_section(report: MemoryReport, picture: str | None) -> dict[str, Any]:
    """Return the pieces of the memory report that are sentences or rows.

    Raises:
        ValueError: a number in it cannot have been measured.
    """
    _check_sizes(report.to_dict())
    return {
        "report": report,
        "command": _command(report.provenance.command),
        "headline": _headline(report),
        "rows": _rows(report),
        "setup": _setup(report),
        "method": _method(report),
        "assumptions": ASSUMPTIONS,
        "picture": picture,
        "alternative_text": _alternative_text(report),
    }


def training_memory(report: MemoryReport) -> dict[str, Any]:
    """Return the block of a card's metadata that programs read: the main numbers of a whole run, in bytes."""
    if not report.complete:
        return {}
    counted = report.counted
    numbers = {
        "peak_bytes": report.measured.peak.max,
        "weights_bytes": counted.weights,
        "gradients_bytes": counted.gradients,
        "optimizer_state_bytes": counted.optimizer_state,
    }
    setup = {"optimizer": report.setup.optimizer, "device": report.setup.device}
    return {"training_memory": {**numbers, "peak_is": report.measured.kind, **setup}}


def _headline(report: MemoryReport) -> str:
    state, peak, own = report.counted.optimizer_state, report.measured.peak.max, report.setup.optimizer
    text = f"The state of {code(own)} took {size_text(state)} (counted), "
    text += f"the run at its peak {size_text(peak)} (measured)."
    if not own.startswith("adamw"):
        text += _of_adamw(report)
    return text if report.complete else f"{text} Training was not finished when this was written."


def _of_adamw(report: MemoryReport) -> str:
    """Return the sentence on AdamW: on the fused one, or on `adamw_torch`, whose step needs more, in older reports."""
    default = "`adamw_torch_fused`, the default of transformers,"
    for name, said, limit in (
        ("adamw_torch_fused", default, ""),
        ("adamw_torch", "`adamw_torch`", f"; {default} needs no more than that"),
    ):
        if other := report.predicted.get(name):
            state, peak = size_text(other.optimizer_state), size_text(other.peak)
            return f" With {said} the state would take {state} and the peak {peak} (predicted){limit}."
    return ""


def _rows(report: MemoryReport) -> list[dict[str, Any]]:
    """Return the table, one row for each part, with how its numbers came about."""
    counted, left, others = report.counted, report.residual, list(report.predicted.values())
    same, predicted, left_out = "; the same for the others", "; others predicted", [None] * len(others)
    state = [counted.optimizer_state, *(o.optimizer_state for o in others)]
    rows = [
        ("weights and buffers", [counted.weights] * (1 + len(others)), "counted" + same),
        ("gradients", [counted.gradients, *(o.gradients for o in others)], "counted" + predicted),
        ("optimizer state", state, "counted" + predicted),
        (
            "activations and temporaries",
            [left.activations_and_temporaries, *left_out],
            "residual: the rest of the peak",
        ),
        ("held before training", [left.before_training] * (1 + len(others)), "measured" + same),
        ("**peak**", [report.measured.peak.max, *(o.peak for o in others)], "measured" + predicted),
    ]
    if report.measured.reserved:
        rows.append(("reserved on the device", [report.measured.reserved.max, *left_out], "measured"))
    return [{"name": name, "sizes": sizes, "how": how} for name, sizes, how in rows]


def _setup(report: MemoryReport) -> str:
    setup = report.setup
    trained = "all" if setup.trainable_parameters == setup.parameters else f"{setup.trainable_parameters:,}"
    capacity = f" with {size_text(setup.device_capacity)}" if setup.device_capacity else ""
    parts = [
        f"{plain(setup.device)}{capacity}",
        f"{setup.world_size} process" + ("es" if setup.world_size > 1 else "") + f" ({plain(setup.strategy)})",
        f"{setup.parameters:,} parameters, {trained} of them trained",
        " and ".join(plain(dtype).removeprefix("torch.") for dtype in setup.dtypes),
        f"batch {setup.per_device_batch_size} x {setup.sequence_length} tokens per device"
        + (f", {setup.gradient_accumulation_steps} micro-batches" if setup.gradient_accumulation_steps > 1 else ""),
        "gradient checkpointing" if setup.gradient_checkpointing else "no gradient checkpointing",
    ]
    parts += [f"{plain(setup.quantization)} weights"] if setup.quantization else []
    cost = report.cost
    tokens = f"{cost.tokens_per_second:,.0f} tokens a second, " if cost.tokens_per_second else ""
    seconds = number(cost.seconds_per_step, digits=3)
    share = cost.optimizer_share
    where = "the updates in its backward" if share is None else f"{share:.1%} of it in the optimizer"
    time = f"Measured: {tokens}{seconds} s a step, {where}."
    return f"Setup: {'; '.join(parts)}. {time}"


def _method(report: MemoryReport) -> str:
    measured = report.measured
    source = {
        "resident set": "the operating system's peak resident set of the process, Python and libraries included",
        "CUDA allocator": "the most that torch's CUDA allocator had handed out",
    }.get(measured.kind, plain(measured.kind))
    ranks = f", of {report.setup.world_size} processes the one that took most" if report.setup.world_size > 1 else ""
    return (
        f"Measured: {source}, since {plain(measured.peak_since)}, over {measured.steps} steps{ranks}. "
        "Counted: bytes of the tensors, each storage once."
    )


def _alternative_text(report: MemoryReport) -> str:
    own = f"{plain(report.setup.optimizer)}: {size_text(report.measured.peak.max)} at the peak (measured)"
    others = [
        f"{plain(name)}: {size_text(prediction.peak)} (predicted)" for name, prediction in report.predicted.items()
    ]
    return "Bars of memory by part. " + "; ".join([own, *others])


def _command(text: str) -> str:
    """Return a stored command as it may be published, whoever stored it."""
    try:
        return published_command(shlex.split(one_line(text)))
    except (ValueError, IndexError):
        return HIDDEN


def _check_sizes(value: Any) -> None:
    """Refuse what no run measures: numbers without end, and more bytes than there are addresses."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            _check_sizes(inner)
    elif isinstance(value, (int, float)) and not -(2**63) < value < 2**63:
        raise ValueError(f"a number is {value!r:.20}, expected one below 2**63")


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with so many significant digits and without an exponent, where that is readable."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or abs(value) >= 1e9 or abs(value) < 1e-5:
        return f"{value:.{digits}g}"
    return f"{value:.{max(0, digits - 1 - floor(log10(abs(value))))}f}"

"""Estimates of training memory as a table and as JSON, and the GPUs they fit on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...optimizer.options import LAYERWISE
from ..command_line import aligned
from ..files import GIB
from ..provenance import versions


SCHEMA_VERSION = 1
"""Version of what `as_json` returns; it grows when a key changes its meaning or goes away."""

GPUS: dict[float, str] = {
    8: "RTX 4060, RTX 3070",
    12: "RTX 4070, RTX 3060",
    16: "RTX 4080, T4, V100 16 GB",
    24: "RTX 4090, RTX 3090, L4, A10",
    40: "A100 40 GB",
    48: "L40S, A6000, RTX 6000 Ada",
    80: "H100, A100 80 GB",
    141: "H200",
}
"""Common cards by their nominal memory."""
# A run may fill this share of a card's nominal memory; the rest is not usable or lost between allocations. The CUDA
# context with its libraries takes its own part.
USABLE_SHARE, CONTEXT_BYTES = 0.9, GIB

ORIGINS = {
    "weights": "counted",
    "gradients": "counted",
    "optimizer_state": "predicted",
    "activations": "predicted",
    "temporary": "predicted",
    "gathered": "predicted",
    "peak": "predicted",
}
"""The columns of the table, and how each number came about: counted from the model's own tensors, or predicted."""


@dataclass(frozen=True)
class Settings:
    """The run that is estimated."""

    dtype: str = "bf16"
    """Of weights, gradients and arithmetic: `bf16` or `fp32`; `int8` is bf16 with 8-bit linear layers."""
    batch: int = 1
    """Sequences per device."""
    seq: int = 2048
    """Tokens per sequence."""
    checkpointing: bool = False
    lora: int | None = None
    """Rank of LoRA adapters on all linear layers; None trains every weight."""
    fsdp: int = 1
    """Number of GPUs over which FSDP2 shards weights, gradients and state."""
    device: str = "cuda"
    """`cuda` or `cpu`: what attention and optimizers need on top differs."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device for one optimizer, each at its own maximum over a step; the peak is no sum of those."""

    optimizer: str
    weights: int
    """Parameters and buffers, tied ones once."""
    gradients: int
    optimizer_state: int
    activations: int
    """All that forward and backward hold besides finished gradients."""
    temporary: int
    """What the update needs on top."""
    gathered: int
    """Whole layers that FSDP2 puts together; 0 on one GPU."""
    peak: int
    moment: str
    """When the peak is reached: in `backward` or in the optimizer's `step`."""
    at_peak: Mapping[str, int] = field(default_factory=dict)
    """What is held at that moment; adds up to the peak."""


def fits(peak: int, gib: float) -> bool:
    """Tell whether a peak in bytes fits a card, with 10 % of its memory and 1 GiB for the CUDA context kept free.

    Example:
        >>> from hf_stateless.reports.predicted.table import fits
        >>> fits(20 << 30, 24), fits(21 << 30, 24)
        (True, False)
    """
    return peak + CONTEXT_BYTES <= USABLE_SHARE * gib * GIB


def as_json(
    facts: Mapping[str, Any], settings: Settings, estimates: Sequence[Estimate], gpus: Sequence[float]
) -> dict[str, Any]:
    """Return estimates as plain values, all sizes in bytes.

    Args:
        facts: what is estimated: `model`, `model_class`, `parameters`, `trained_parameters`, `optim_args`, `notes`.
        settings: the run.
        estimates: one for each optimizer.
        gpus: nominal memory of the cards to look at, in GiB.
    """
    rows = []
    for estimate in estimates:
        row = asdict(estimate)
        origins = dict(ORIGINS)
        if estimate.optimizer.endswith(LAYERWISE):
            origins["gradients"] = "predicted"
        rows.append({**row, "origin": origins, "fits_gib": [gib for gib in gpus if fits(estimate.peak, gib)]})
    return {
        "schema": "hf_stateless.memory_estimate",
        "version": SCHEMA_VERSION,
        "unit": "bytes",
        **facts,
        "settings": asdict(settings),
        "estimates": rows,
        "gpus": [{"gib": gib, "cards": GPUS.get(gib, "")} for gib in gpus],
        "margin": {"usable_share": USABLE_SHARE, "context_bytes": CONTEXT_BYTES},
        "versions": versions(("hf_stateless", "torch", "transformers")),
    }


def as_table(report: Mapping[str, Any]) -> str:
    """Render what `as_json` returned for a terminal, in GiB, with the origin of every column."""
    columns = [key for key in ORIGINS if key != "gathered" or report["settings"]["fsdp"] > 1]
    rows = [["GiB", *(key.removeprefix("optimizer_") for key in columns), "fits", "GPUs"]]
    rows.append(["", *(ORIGINS[key] for key in columns), "", ""])
    for row in report["estimates"]:
        numbers = [f"{row[key] / GIB:.2f}" for key in columns]
        smallest = min(row["fits_gib"], default=None)
        known = [gpu["gib"] for gpu in report["gpus"]]
        fit = f"{smallest:g} GiB and up" if smallest is not None else f"more than {max(known):g} GiB"
        cards = next((gpu["cards"] for gpu in report["gpus"] if gpu["gib"] == smallest), "")
        rows.append([row["optimizer"], *numbers, fit, cards])
    return "\n".join(["; ".join(headline(report)), "", *aligned(rows, text=(0, -2, -1)), "", *_legend(report)])


def headline(report: Mapping[str, Any]) -> list[str]:
    """Return what the model is and how it is trained, as short phrases."""
    run = report["settings"]
    tokens = f" x {run['seq']} tokens" if report["has_tokens"] else ""
    parts = [
        f"{report['model_class']} of {report['model']}",
        f"{report['parameters']:,} parameters, {report['trained_parameters']:,} trained",
        run["dtype"],
        f"batch {run['batch']}{tokens}",
        "activation checkpointing" if run["checkpointing"] else "no activation checkpointing",
    ]
    parts += [f"LoRA of rank {run['lora']}"] if run["lora"] else []
    parts += [f"FSDP2 over {run['fsdp']} GPUs, figures for one of them"] if run["fsdp"] > 1 else []
    return [*parts, f"on {run['device']}"]


def _legend(report: Mapping[str, Any]) -> list[str]:
    layerwise = any(row["optimizer"].endswith(LAYERWISE) for row in report["estimates"])
    return [
        "counted: from the model's own tensors. predicted: nothing was run on a device.",
        "Each column is the most that is held at any time; peak is what is held together at the fullest moment.",
        *(["Gradients of layer-wise optimizers: predicted, the most that is alive at once."] if layerwise else []),
        f"A GPU fits if the peak takes at most {USABLE_SHARE:.0%} of its memory less {CONTEXT_BYTES // GIB} GiB for "
        "the CUDA context.",
        *report["notes"],
    ]

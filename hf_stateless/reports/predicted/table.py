"""Estimates of training memory as a table, as JSON and as a picture, and the GPUs they fit on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...optimizer.option_kinds import LAYERWISE
from ...trainer.table import aligned
from ..figures import draw_bars, literal, new_figure, save_plot
from ..files import GIB, size_text, unit_of
from ..provenance import versions


SCHEMA_VERSION = 1
"""Version of what `as_json` returns; it grows when a key changes its meaning or goes away."""

GPUS: dict[float, str] = {
    8: "RTX 4060, RTX 3070",
    12: "RTX 4070, RTX 3060",
    16: "RTX 4080, T4, V100 16 GB",
    24: "RTX 4090, RTX 3090, L4, A10",
    32: "RTX 5090, V100 32 GB",
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
    **dict.fromkeys(("weights", "gradients"), "counted"),
    **dict.fromkeys(("optimizer_state", "activations", "temporary", "gathered", "peak"), "predicted"),
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
    tp: int = 1
    """Number of GPUs that share each matrix by tensor parallelism, and see the same tokens."""
    ep: int = 1
    """Number of GPUs over which experts are spread; they are among those of `fsdp` and `tp`."""
    zero: int = 0
    """Stage of DeepSpeed's ZeRO; 0 without it."""
    ranks: int = 1
    """Number of GPUs over which ZeRO shards."""
    device: str = "cuda"
    """`cuda` or `cpu`: what attention and optimizers need on top differs."""

    @property
    def parts(self) -> tuple[int, int]:
        """Into how many parts the weights are cut, and into how many the gradients."""
        if self.zero:
            return self.ranks if self.zero == 3 else 1, self.ranks if self.zero > 1 else 1
        return self.fsdp, self.fsdp


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
    """Layers that FSDP2 or ZeRO-3 puts together; 0 where neither cuts the weights."""
    peak: int
    moment: str
    """When the peak is reached: in `backward` or in the optimizer's `step`."""
    at_peak: Mapping[str, int] = field(default_factory=dict)
    """What is held at that moment; adds up to the peak."""
    sent: int | None = None
    """What a GPU sends in a step of the optimizer; None on one GPU, and where it is not known."""
    sent_by_fsdp: int = 0
    """What FSDP2 or ZeRO itself sends in a step without accumulation; 0 on one GPU."""
    sent_by_plans: int = 0
    """What tensor and expert parallelism send of activations in such a step; 0 without them."""


def usable(gib: float) -> float:
    """Return the bytes of a card that a peak may fill: without 10 % of its memory and 1 GiB for the CUDA context."""
    return USABLE_SHARE * gib * GIB - CONTEXT_BYTES


def fits(peak: int, gib: float) -> bool:
    """Tell whether a peak in bytes fits a card."""
    return peak <= usable(gib)


def as_json(
    facts: Mapping[str, Any], settings: Settings, estimates: Sequence[Estimate], gpus: Sequence[float]
) -> dict[str, Any]:
    """Return estimates and facts of their model as plain values: all sizes in bytes, those of cards in GiB."""
    rows = []
    for estimate in estimates:
        layerwise = {"gradients": "predicted"} if estimate.optimizer.endswith(LAYERWISE) else {}
        fitting = [gib for gib in gpus if fits(estimate.peak, gib)]
        rows.append({**asdict(estimate), "origin": {**ORIGINS, **layerwise}, "fits_gib": fitting})
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
    """Render what `as_json` returned for a terminal, in one unit, with the origin of every column."""
    columns = [key for key in ORIGINS if key != "gathered" or any(row["gathered"] for row in report["estimates"])]
    unit = unit_of(max(row["peak"] for row in report["estimates"]))
    rows = [[unit[0], *(key.removeprefix("optimizer_") for key in columns), "fits", "GPUs"]]
    rows.append(["", *(ORIGINS[key] for key in columns), "", ""])
    for row in report["estimates"]:
        numbers = [_cell(row[key], unit[1]) for key in columns]
        smallest = min(row["fits_gib"], default=None)
        known = [gpu["gib"] for gpu in report["gpus"]]
        fit = f"{smallest:g} GiB and up" if smallest is not None else f"more than {max(known):g} GiB"
        cards = next((gpu["cards"] for gpu in report["gpus"] if gpu["gib"] == smallest), "")
        rows.append([row["optimizer"], *numbers, fit, cards])
    return "\n".join(["; ".join(headline(report)), "", *aligned(rows, text=(0, -2, -1)), "", *_legend(report)])


def _cell(size: int, unit: int) -> str:
    """Return a size in the unit of the table; in its own where that would be zeros."""
    return f"{size / unit:.2f}" if size == 0 or size / unit >= 0.005 else size_text(size)


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
    ways = {"FSDP2": run["fsdp"], "tensor parallelism": run["tp"], "expert parallelism": run["ep"]}
    told = [f"{way} over {gpus} GPUs" for way, gpus in ways.items() if gpus > 1]
    parts += [f"{' and '.join(told)}, figures for one of them"] if told else []
    parts += [f"ZeRO-{run['zero']} over {run['ranks']} GPUs, figures for one of them"] if run["zero"] else []
    return [*parts, f"on {run['device']}"]


def _legend(report: Mapping[str, Any]) -> list[str]:
    layerwise = any(row["optimizer"].endswith(LAYERWISE) for row in report["estimates"])
    released = "Gradients of layer-wise optimizers: predicted, the most alive at once; accumulation holds all of them."
    return [
        "counted: from the model's own tensors. predicted: nothing was run on a device.",
        "Each column is the most that is held at any time; peak is what is held together at the fullest moment.",
        *_wire(report["estimates"], report["settings"]),
        *([released] if layerwise else []),
        f"A GPU fits if the peak takes at most {USABLE_SHARE:.0%} of its memory less {CONTEXT_BYTES // GIB} GiB for "
        "the CUDA context.",
        *report["notes"],
    ]


def _wire(rows: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> list[str]:
    """Return a line about what a GPU sends in one step, if there are others."""
    if run["fsdp"] * run["tp"] == 1 and not run["zero"]:
        return []
    sharding = f"ZeRO-{run['zero']}" if run["zero"] else "FSDP2"
    own = [f"{row['optimizer']} {'unknown' if row['sent'] is None else size_text(row['sent'])}" for row in rows]
    by = [f"{size_text(rows[0]['sent_by_fsdp'])} by {sharding} itself"] if run["fsdp"] > 1 or run["zero"] else []
    by += [f"{size_text(rows[0]['sent_by_plans'])} of activations by the plans"] if run["tp"] * run["ep"] > 1 else []
    return [
        f"Sent by one GPU in a step without accumulation, counted: {', '.join(by)}; by the optimizers: "
        f"{', '.join(own)}."
    ]


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw what is held at the peak as stacked bars, one for each optimizer, with the GPUs as lines."""
    piles = {
        row["optimizer"]: {part.replace("_", " "): size for part, size in row["at_peak"].items()}
        for row in report["estimates"]
    }
    figure = new_figure(figsize=(9, 1.9 + 0.45 * len(piles)))
    axes = figure.subplots()
    draw_bars(axes, piles)
    _capacity_lines(axes, report, [sum(parts.values()) for parts in piles.values()])
    axes.set_xlabel(
        f"{axes.get_xlabel()} held at the fullest moment of a step, predicted (dashed: what fits a GPU of that size)"
    )
    model, size, *run = headline(report)
    axes.set_title(literal(f"{model}, {size}\n{', '.join(run)}"), fontsize=8, loc="left", pad=20)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    save_plot(figure, path)


def _capacity_lines(axes: Any, report: Mapping[str, Any], peaks: Sequence[int]) -> None:
    """Mark where those GPUs are full that have about as much as the bars take."""
    width = axes.get_xlim()[1]
    _, unit = unit_of(max(peaks))
    drawn = 2 * width
    for gpu in sorted(report["gpus"], key=lambda gpu: -gpu["gib"]):
        limit = (USABLE_SHARE * gpu["gib"] * GIB - CONTEXT_BYTES) / unit
        if min(peaks) / unit * 0.6 < limit < width and drawn - limit > 0.09 * width:  # or the labels would overlap
            drawn = limit
            axes.axvline(limit, color="0.4", linestyle="--", linewidth=1)
            axes.text(limit, -0.62, f"{gpu['gib']:g} GiB GPU", ha="right", va="bottom", fontsize=7, color="0.3")

"""`memory.png`: what a run took beside what AdamW would have taken, as stacked bars on one scale."""

from __future__ import annotations

from pathlib import Path

from ..figures import draw_bars, literal, new_figure, save_figure
from ..files import unit_of
from .schema import MemoryReport


def bars(report: MemoryReport) -> dict[str, dict[str, int]]:
    """Return the parts of each bar in bytes, by its label: this run first, then the predicted ones."""
    own, counted = report.setup.optimizer, report.counted
    run = {
        "held before training": report.residual.before_training,
        "weights": counted.weights,
        "gradients": counted.gradients,
        "optimizer state": counted.optimizer_state,
        "activations and temporaries": report.residual.activations_and_temporaries,
    }
    found = {f"{own}\n(measured)": run}
    for name, other in report.predicted.items():
        if name == own:
            continue
        parts = {**run, "gradients": other.gradients, "optimizer state": other.optimizer_state}
        rest = sum(size for part, size in parts.items() if part != "activations and temporaries")
        found[f"{name}\n(predicted)"] = {**parts, "activations and temporaries": max(0, other.peak - rest)}
    return found


def draw(report: MemoryReport, path: str | Path) -> None:
    """Draw the memory of a run."""
    piles = bars(report)
    figure = new_figure(figsize=(8, 1.7 + 0.55 * len(piles)))
    axes = figure.subplots()
    draw_bars(axes, piles)
    top = max(sum(parts.values()) for parts in piles.values())
    unit, divisor = unit_of(top)
    capacity = (report.setup.device_capacity or 0) / divisor
    if 0 < capacity < 4 * top / divisor:
        axes.axvline(capacity, color="0.25", linestyle="--", linewidth=1.2)
        axes.set_xlim(0, max(axes.get_xlim()[1], capacity * 1.03))
        label = f"all of the device: {capacity:.3g} {unit}"
        axes.annotate(label, (capacity, 1), xycoords=("data", "axes fraction"), ha="right", va="bottom", fontsize=8)
    axes.set_xlabel(literal(f"{unit} at the peak of a step, {report.measured.kind}"))
    axes.set_title(literal(_title(report)), fontsize=9.5, loc="left", pad=16 if capacity else 8)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8.5, columnspacing=1.2)
    save_figure(figure, path)


def _title(report: MemoryReport) -> str:
    setup = report.setup
    row = f" x {setup.sequence_length} tokens" if setup.sequence_length else ""
    ranks = f", {setup.world_size} x {setup.strategy}" if setup.world_size > 1 else ""
    checkpointing = ", gradient checkpointing" if setup.gradient_checkpointing else ""
    millions = setup.parameters / 1e6
    size = f"{millions:,.1f}M parameters" if millions < 1000 else f"{millions / 1000:.2f}B parameters"
    return f"{setup.model}, {size}, batch {setup.per_device_batch_size}{row}{checkpointing}\non {setup.device}{ranks}"

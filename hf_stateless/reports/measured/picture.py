"""`memory.png`: what a run took beside what AdamW would have taken, as stacked bars on one scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import GIB, replacing
from ..predicted.table import COLOURS
from .schema import MemoryReport


# From the bottom of the pile to its top; of predicted runs the first three and the rest are known.
_PARTS = {
    "held before training": "0.78",
    "weights": COLOURS["weights"],
    "gradients": COLOURS["gradients"],
    "optimizer state": COLOURS["optimizer_state"],
    "activations and temporaries": COLOURS["activations"],
}


def bars(report: MemoryReport) -> dict[str, dict[str, int]]:
    """Return the parts of each bar in bytes, by its label: this run first, then the predicted ones.

    Args:
        report: of a run.
    """
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
    """Draw the memory of a run.

    Args:
        report: of the run.
        path: picture to write; the ending says the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    piles = bars(report)
    figure = new_figure(figsize=(8, 1.7 + 0.55 * len(piles)))
    axes = figure.subplots()
    draw_bars(axes, piles)
    top = max(sum(parts.values()) for parts in piles.values())
    unit, divisor = axes_unit(top / GIB)
    capacity = (report.setup.device_capacity or 0) / divisor
    if 0 < capacity < 4 * top / divisor:
        axes.axvline(capacity, color="0.25", linestyle="--", linewidth=1.2)
        axes.set_xlim(0, max(axes.get_xlim()[1], capacity * 1.03))
        label = f"all of the device: {capacity:.3g} {unit}"
        axes.annotate(label, (capacity, 1), xycoords=("data", "axes fraction"), ha="right", va="bottom", fontsize=8)
    axes.set_xlabel(f"{unit} at the peak of a step, {report.measured.kind}")
    axes.set_title(_title(report), fontsize=9.5, loc="left", pad=16 if capacity else 8)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8.5, columnspacing=1.2)
    save_figure(figure, path)


def axes_unit(gib: float) -> tuple[str, int]:
    """Return the unit that suits a size in GiB, and its bytes.

    Example:
        >>> from hf_stateless.reports.measured.picture import axes_unit
        >>> axes_unit(3.5), axes_unit(0.02)
        (('GiB', 1073741824), ('MiB', 1048576))
    """
    return ("GiB", GIB) if gib >= 0.1 else ("MiB", 1 << 20)


def draw_bars(axes: Any, piles: dict[str, dict[str, int]]) -> None:
    """Draw piles of parts as horizontal bars, each with its sum behind it.

    Args:
        axes: of matplotlib.
        piles: parts in bytes of each bar, by its label.
    """
    sums = [sum(parts.values()) for parts in piles.values()]
    unit, divisor = axes_unit(max(sums) / GIB)
    left = [0.0] * len(piles)
    for part, colour in _PARTS.items():
        sizes = [parts.get(part, 0) / divisor for parts in piles.values()]
        if any(sizes):
            # A white edge tells neighbours apart, but would hide a thin part.
            edge = "white" if max(sizes) * divisor > max(sums) / 100 else "none"
            style = {"color": colour, "edgecolor": edge, "linewidth": 0.7}
            axes.barh(range(len(piles)), sizes, left=left, label=part, height=0.62, **style)
            left = [start + size for start, size in zip(left, sizes, strict=True)]
    for y, total in enumerate(left):
        axes.text(total + max(left) / 100, y, f"{total:.3g} {unit}", va="center", fontsize=9)
    axes.set_xlim(0, max(left) * 1.16)
    axes.set_yticks(range(len(piles)), list(piles), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)


def new_figure(figsize: tuple[float, float]) -> Any:
    """Return a figure of matplotlib without a window.

    Args:
        figsize: width and height in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('A picture needs matplotlib: type pip install "hf_stateless[plot]"') from None
    return Figure(figsize=figsize, layout="constrained")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure to a temporary file, which then replaces the picture.

    Args:
        figure: of matplotlib.
        path: picture to write; the ending says the format.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, facecolor="white")


def _title(report: MemoryReport) -> str:
    setup = report.setup
    row = f" x {setup.sequence_length} tokens" if setup.sequence_length else ""
    ranks = f", {setup.world_size} x {setup.strategy}" if setup.world_size > 1 else ""
    checkpointing = ", gradient checkpointing" if setup.gradient_checkpointing else ""
    millions = setup.parameters / 1e6
    size = f"{millions:,.1f}M parameters" if millions < 1000 else f"{millions / 1000:.2f}B parameters"
    return f"{setup.model}, {size}, batch {setup.per_device_batch_size}{row}{checkpointing}\non {setup.device}{ranks}"

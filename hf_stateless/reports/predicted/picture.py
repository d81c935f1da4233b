"""Estimates of training memory as a picture: what is held at the peak, and the GPUs that it fits on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..figures import axes_unit, draw_bars, new_figure, save_plot
from ..files import GIB
from .table import CONTEXT_BYTES, USABLE_SHARE, headline


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw what is held at the peak as stacked bars, one for each optimizer, with the GPUs as lines.

    Args:
        report: from `hf_stateless.reports.predicted.table.as_json`.
        path: picture to write; the ending says the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the picture cannot be written.
    """
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
    axes.set_title(f"{model}, {size}\n{', '.join(run)}", fontsize=8, loc="left", pad=20)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    save_plot(figure, path)


def _capacity_lines(axes: Any, report: Mapping[str, Any], peaks: Sequence[int]) -> None:
    """Mark where those GPUs are full that have about as much as the bars take."""
    width = axes.get_xlim()[1]
    _, unit = axes_unit(max(peaks) / GIB)
    drawn = 2 * width
    for gpu in sorted(report["gpus"], key=lambda gpu: -gpu["gib"]):
        limit = (USABLE_SHARE * gpu["gib"] * GIB - CONTEXT_BYTES) / unit
        if min(peaks) / unit * 0.6 < limit < width and drawn - limit > 0.09 * width:  # or the labels would overlap
            drawn = limit
            axes.axvline(limit, color="0.4", linestyle="--", linewidth=1)
            axes.text(limit, -0.62, f"{gpu['gib']:g} GiB GPU", ha="right", va="bottom", fontsize=7, color="0.3")

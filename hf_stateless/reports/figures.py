"""What the pictures of reports share: colours, bars of memory, and files that appear whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .command_line import one_line
from .files import replacing, unit_of


# From the bottom of the pile to its top, in Okabe and Ito's colours, which colour-blind readers tell apart.
PARTS = {
    "held before training": "0.78",
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer state": "#D55E00",
    "activations": "#009E73",
    "activations and temporaries": "#009E73",
    "temporary": "#F0E442",
    "gathered": "#CC79A7",
}


def literal(text: str, most: int = 100) -> str:
    """Return a text for a picture: what is no printable character is shown as such, and long lines are cut."""
    return "\n".join(one_line(line, most) for line in text.splitlines())


def draw_bars(axes: Any, piles: dict[str, dict[str, int]]) -> None:
    """Draw piles of parts as horizontal bars, each with its sum behind it."""
    sums = [sum(parts.values()) for parts in piles.values()]
    unit, divisor = unit_of(max(sums))
    left = [0.0] * len(piles)
    for part, colour in PARTS.items():
        sizes = [parts.get(part, 0) / divisor for parts in piles.values()]
        if any(sizes):
            # A white edge tells neighbours apart, but would hide a thin part.
            edge = "white" if max(sizes) * divisor > max(sums) / 100 else "none"
            style = {"color": colour, "edgecolor": edge, "linewidth": 0.7}
            axes.barh(range(len(piles)), sizes, left=left, label=part, height=0.62, **style)
            left = [start + size for start, size in zip(left, sizes, strict=True)]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over lines that are drawn later
    for y, total in enumerate(left):
        axes.text(total + max(left) / 100, y, f"{total:.3g} {unit}", va="center", fontsize=9, bbox=box, zorder=3)
    axes.set_xlim(0, max(left) * 1.16 or 1)
    axes.set_yticks(range(len(piles)), [literal(label, most=40) for label in piles], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)


def new_figure(figsize: tuple[float, float]) -> Any:
    """Return a figure of matplotlib without a window.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('A picture needs matplotlib: type pip install "hf_stateless[plot]"') from None
    return Figure(figsize=figsize, layout="constrained")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure to a temporary file, which then replaces the picture; names in it are no formulas."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, facecolor="white")


def save_plot(figure: Any, path: str | Path) -> None:
    """Write the picture that `--plot` asks for.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        save_figure(figure, path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error  # the whole of an OSError names the temporary file
        raise ValueError(f"--plot {path} cannot be written: {reason}") from None

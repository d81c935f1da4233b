"""`dashboard.html`: the curves of a run as one page without scripts, which opens without a network and a tracker."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..command_line import one_line
from ..files import write_text


DASHBOARD_FILE = "dashboard.html"
_PANELS = {
    "Loss": ("loss", "eval_loss"),
    "Memory of the peak, GiB": (
        *("memory/peak_gib", "memory/weights_gib", "memory/gradients_gib", "memory/optimizer_state_gib"),
        *("memory/activations_gib", "memory/before_training_gib"),
    ),
    "Share of the optimizer": ("time/optimizer_share", "memory/optimizer_share"),
    "Updates left out so far": ("updates/not_finite", "updates/held_steps"),
}
"""Panels of several curves; what else the log has gets one each."""
_NOT_SHOWN = {"step", "epoch", "total_flos"}
_COLOURS = ("#3b78d8", "#d9822b", "#2a9d5c", "#c0392b", "#8e5bb5", "#7f8c8d")
_WIDTH, _HEIGHT, _POINTS, _MOST = 480, 200, 300, 60
_STYLE = """body{font:14px system-ui,sans-serif;margin:1.5rem;color:#222;background:#fff}
main{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0;max-width:100%;width:480px}
svg{width:100%;height:auto;background:#8882}figcaption{font-weight:600}p{margin:.2rem 0}
text{font-size:11px;fill:currentColor}path{fill:none;stroke-width:2}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#111}}"""

Curve = list[tuple[float, float]]


def write_dashboard(folder: str | Path, name: str, log: Iterable[Mapping[str, Any]]) -> None:
    """Write the curves of a log to `dashboard.html` in a folder.

    Args:
        folder: where the page is put.
        name: its title.
        log: entries with a `step`, as `trainer.state.log_history` has them.
    """
    write_text(Path(folder) / DASHBOARD_FILE, page(name, log))


def page(name: str, log: Iterable[Mapping[str, Any]]) -> str:
    """Return the page; numbers that are not finite are left out.

    Example:
        >>> from hf_stateless.reports.card.dashboard import page
        >>> text = page("run", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}])
        >>> text.count("<figure>"), "2.5" in text
        (1, True)
    """
    curves = _curves(log)
    panels = [(title, [key for key in keys if key in curves]) for title, keys in _PANELS.items()]
    known = {key for keys in _PANELS.values() for key in keys}
    panels = [panel for panel in panels if panel[1]] + [(key, [key]) for key in curves if key not in known]
    shown = [_figure(title, {key: curves[key] for key in keys}) for title, keys in panels[:_MOST]]
    title = html.escape(one_line(name, 200))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1><main>\n"
        + "\n".join(shown)
        + "\n</main></html>\n"
    )


def _curves(log: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Return a curve for each number of a log, thinned out where it is long."""
    curves: dict[str, Curve] = {}
    for entry in log:
        step = entry.get("step")
        for key, value in entry.items():
            plain = all(isinstance(number, (int, float)) and math.isfinite(number) for number in (step, value))
            if plain and key not in _NOT_SHOWN and not key.startswith("train_"):
                curves.setdefault(key, []).append((float(step or 0), float(value)))
    return {key: curve[:: math.ceil(len(curve) / _POINTS)] for key, curve in curves.items()}


def _figure(title: str, curves: Mapping[str, Curve]) -> str:
    """Return one panel: a picture with its curves, and below it the name and the last value of each."""
    points = [point for curve in curves.values() for point in curve]
    (left, right), (low, high) = ((min(of), max(of)) for of in zip(*points, strict=True))
    across, up = (right - left) or 1.0, (high - low) or abs(high) or 1.0
    lines, names = [], []
    for (key, curve), colour in zip(curves.items(), _COLOURS * 2, strict=False):
        at = [
            f"{10 + (x - left) / across * (_WIDTH - 20):.1f} {_HEIGHT - 20 - (y - low) / up * (_HEIGHT - 40):.1f}"
            for x, y in curve
        ]
        lines.append(
            f'<path stroke="{colour}" d="M{" L".join(at if len(at) > 1 else at * 2)}" stroke-linecap="round"/>'
        )
        label = html.escape(one_line(key, 80))
        names.append(f'<p><span style="color:{colour}">&#9632;</span> {label}: {curve[-1][1]:g}</p>')
    return (
        f'<figure><figcaption>{html.escape(one_line(title, 80))}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img">{"".join(lines)}<text x="10" y="14">{high:g}</text><text x="10" y="{_HEIGHT - 5}">{low:g}</text>'
        f'<text x="{_WIDTH - 10}" y="{_HEIGHT - 5}" text-anchor="end">steps {left:g} to {right:g}</text></svg>'
        f"{''.join(names)}</figure>"
    )

"""The answer as HTML: a bar of stacked parts for each method, and a line where the card is full."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from space_choice import METHODS, Choice

from hf_stateless.reports.files import GIB
from hf_stateless.reports.predicted.table import fits, usable


PARTS = ("weights", "optimizer_state", "gradients", "activations", "gathered", "temporary")
"""What a bar is made of, from left to right."""

STYLE = """
.fit { font-size: 15px; line-height: 1.4; color: var(--body-text-color, inherit); }
.fit .bar { margin: 0 0 12px; }
.fit .head { display: flex; justify-content: space-between; gap: 8px; flex-wrap: wrap; }
.fit .head > span:last-child { margin-left: auto; }
.fit .chosen .name { font-weight: 700; }
.fit .track { position: relative; display: flex; height: 22px; margin-top: 3px; border-radius: 3px;
  background: color-mix(in srgb, currentColor 9%, transparent); }
.fit .track > b { display: block; height: 100%; }
.fit .track > i { position: absolute; top: -3px; bottom: -3px; width: 0; border-left: 2px dashed currentColor; }
.fit .keys { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 4px 0 10px; padding: 0; list-style: none; }
.fit .keys b { display: inline-block; width: 12px; height: 12px; margin-right: 5px; border-radius: 2px; }
.fit .keys i { display: inline-block; height: 14px; margin: 0 7px -2px 5px; border-left: 2px dashed currentColor; }
.fit .weights { background: #4878b8; } .fit .optimizer_state { background: #d1495b; }
.fit .gradients { background: #e0962f; } .fit .activations { background: #3f9f7f; }
.fit .gathered { background: #8a6fc0; } .fit .temporary { background: #8c8c8c; }
.fit .no { color: #c0392b; } .fit .yes { color: #23855f; }
.dark .fit .no { color: #ff8a7a; } .dark .fit .yes { color: #6fd3a8; }
.fit .error { border-left: 4px solid #c0392b; padding: 6px 12px; overflow-wrap: anywhere; }
.fit .note { opacity: 0.8; font-size: 13px; margin: 4px 0; overflow-wrap: anywhere; }
"""
"""CSS of what this module returns; colours of text are those of the page, in dark and in light."""


def error_line(error: BaseException) -> str:
    """Return what was wrong as one line of HTML."""
    return f'<div class="fit"><p class="error" role="alert">{escape(str(error))}</p></div>'


def answer(report: Mapping[str, Any], choice: Choice) -> str:
    """Render a report of `hf-stateless memory` as bars in the order of its rows."""
    full = usable(choice.gpu)
    most = max([full, *(row["peak"] for row in report["estimates"])]) * 1.03
    bars = "".join(_bar(row, choice, full, most) for row in report["estimates"])
    used = [part for part in PARTS if any(row["at_peak"].get(part) for row in report["estimates"])]
    keys = "".join(f'<li><b class="{part}"></b>{part.replace("_", " ")}</li>' for part in used)
    keys += f"<li><i></i>a {choice.gpu:g} GiB card is full: {full / GIB:.1f} GiB of it are usable</li>"
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in _notes(report, choice))
    return f'<div class="fit">{_headline(report)}<ul class="keys">{keys}</ul>{bars}{notes}</div>'


def _bar(row: Mapping[str, Any], choice: Choice, full: float, most: float) -> str:
    name, peak = row["optimizer"], row["peak"]
    parts = "".join(
        f'<b class="{part}" style="width:{100 * row["at_peak"][part] / most:.3f}%" '
        f'title="{part.replace("_", " ")}: {row["at_peak"][part] / GIB:.2f} GiB"></b>'
        for part in PARTS
        if row["at_peak"].get(part)
    )
    mark = '<span class="yes">fits</span>' if fits(peak, choice.gpu) else '<span class="no">does not fit</span>'
    chosen = " chosen" if name == choice.optim() else ""
    return (
        f'<div class="bar{chosen}"><div class="head"><span class="name">{escape(label(name))}</span>'
        f"<span>{peak / GIB:.2f} GiB, {mark}</span></div>"
        f'<div class="track">{parts}<i style="left:{100 * full / most:.3f}%"></i></div></div>'
    )


def label(optim: str) -> str:
    """Return what a name of `optim=` is called.

    Example:
        >>> from space_bars import label
        >>> label("swan_layerwise"), label("adamw_bnb_8bit")
        ('SWAN, layer-wise (swan_layerwise)', '8-bit AdamW (adamw_bnb_8bit)')
    """
    plain = optim.removesuffix("_layerwise")
    return f"{METHODS[plain]}{', layer-wise' if plain != optim else ''} ({optim})"


def _headline(report: Mapping[str, Any]) -> str:
    count = f"{report['parameters']:,} parameters, {report['trained_parameters']:,} of them trained"
    return f"<p><strong>{escape(report['model'])}</strong>: {count}. Peak of one card, predicted:</p>"


def _notes(report: Mapping[str, Any], choice: Choice) -> list[str]:
    eight_bits = ["AdamW, 8-bit AdamW and GaLore cannot train weights that are stored in 8 bits: they are left out."]
    return [
        *(eight_bits if choice.dtype == "int8" else []),
        *report["notes"],
        "A bar shows what is held together at the fullest moment of a step. APOLLO is not predicted yet.",
    ]


def batch_line(choice: Choice, batch: int) -> str:
    """Return the sentence about the largest batch that fits."""
    where = (
        f"one card of {choice.gpu:g} GiB" if choice.gpus == 1 else f"each of {choice.gpus} cards of {choice.gpu:g} GiB"
    )
    if not batch:
        text = f"Not even one sequence of {choice.seq:,} tokens fits {where}."
    else:
        text = f"The largest batch that fits {where}: {batch:,} x {choice.seq:,} tokens."
    return f'<div class="fit"><p><strong>{escape(label(choice.optim()))}</strong>. {text}</p></div>'

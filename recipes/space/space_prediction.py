"""What the page answers: `hf-stateless memory` for a choice, and the largest batch that fits."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from space_choice import UPLOADED, Choice

from hf_stateless.reports.command_line import first_line, one_line
from hf_stateless.reports.predicted import report
from hf_stateless.reports.predicted.table import fits


LISTED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "models.json").read_text(encoding="utf-8"))
"""Configs of models that need no network: the keys on which memory depends."""
MOST_UPLOADED = 1 << 20
"""Bytes of an uploaded config."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# A prediction replaces functions of torch for its time: one after the other.
_ONE_AT_A_TIME = threading.Lock()


def predict(choice: Choice, uploaded: str | None = None, optimizers: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Return the report of `hf-stateless memory --json` for a choice.

    Args:
        choice: the run.
        uploaded: path of a config; it takes the place of the model that the choice names.
        optimizers: what is compared; all methods when None.

    Raises:
        ValueError: in one line, what was wrong with the model or the run.
    """
    arguments = choice.arguments(list(optimizers) if optimizers else None)
    source = config_file(choice.model, uploaded)
    name = UPLOADED if uploaded else choice.model
    try:
        found = _report(source, *arguments)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(one_line(str(error).replace(source, name), most=1500)) from None
    return {**found, "model": name}


@lru_cache(maxsize=512)
def _report(source: str, *arguments: str) -> dict[str, Any]:
    with _ONE_AT_A_TIME:
        return report([source, *arguments])


@cache
def _listed_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="models-"))
    for number, values in enumerate(LISTED.values()):
        (folder / f"{number}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def _kept(content: bytes) -> str:
    """Keep a config under a short name of its own: names that visitors give are as long as they like."""
    path = _listed_folder() / f"{hashlib.sha256(content).hexdigest()[:20]}.json"
    path.write_bytes(content)
    return str(path)


def config_file(model: str, uploaded: str | None = None) -> str:
    """Return the path of the config of a model: an uploaded one, one of the list, or one of the Hub.

    A name never means a folder of the machine that serves the page.

    Raises:
        ValueError: no id of a model, or none that the Hub gives.
    """
    if uploaded:
        if os.path.getsize(uploaded) > MOST_UPLOADED:
            raise ValueError(f"The uploaded file is larger than {MOST_UPLOADED >> 20} MiB: expected a config.json.")
        return _kept(Path(uploaded).read_bytes())
    if model in LISTED:
        return str(_listed_folder() / f"{list(LISTED).index(model)}.json")
    if not _ID.fullmatch(model) or ".." in model or "--" in model:
        raise ValueError(
            f"{model!r} is no id of a model: type one such as Qwen/Qwen2.5-0.5B, or upload its config.json."
        )
    try:
        return hf_hub_download(model, "config.json")
    except Exception as error:  # of the network, the Hub, or the id
        raise ValueError(
            f"No config.json of {model} can be read from the Hub: check the id, pick a model of the list, or upload "
            f"its config.json ({type(error).__name__}: {first_line(error)[:200]})"
        ) from None


def largest_batch(choice: Choice, uploaded: str | None = None) -> int:
    """Return the most sequences per card with which the chosen method fits the card; 0 if one does not fit."""

    def peak(batch: int) -> int:
        row = predict(replace(choice, batch=batch), uploaded, (choice.method,))["estimates"][0]
        return int(row["peak"])

    return search_batch(peak, lambda size: fits(size, choice.gpu), choice.gpu * 2**30, start=choice.batch)


def search_batch(
    peak: Callable[[int], int], fitting: Callable[[int], bool], memory: float, start: int = 1, most: int = 65536
) -> int:
    """Return the largest batch whose peak fits, between 0 (none does) and `most`, in few calls of `peak`.

    Peaks grow with the batch, nearly along a line: a line through two known peaks says where to look next.

    Example:
        >>> from space_prediction import search_batch
        >>> search_batch(lambda batch: 100 + 7 * batch, lambda size: size <= 200, 200)
        14
    """
    known: dict[int, int] = {}
    fit, full, batch = 0, most + 1, min(start, most)
    while full - fit > 1:
        known[batch] = peak(batch)
        fit, full = (batch, full) if fitting(known[batch]) else (fit, batch)
        batch = min(max(_guess(known, fitting, memory, fit, full), fit + 1), full - 1)
    return fit


def _guess(known: dict[int, int], fitting: Callable[[int], bool], memory: float, fit: int, full: int) -> int:
    """Return the batch at which a line through the two peaks nearest to the limit stops fitting."""
    if len(known) == 1:
        return 2 * fit if fit else full // 2
    if len(known) > 8:  # no line: halve what is left
        return (fit + full) // 2
    below, above = sorted(sorted(known, key=lambda batch: abs(known[batch] - memory))[:2])
    slope = (known[above] - known[below]) / (above - below)
    if slope <= 0:
        return 2 * above
    lowest, highest = fit, min(full, fit + 2**20)
    while highest - lowest > 1:
        middle = (lowest + highest) // 2
        at = known[below] + slope * (middle - below)
        lowest, highest = (middle, highest) if fitting(math.ceil(at)) else (lowest, middle)
    return lowest

"""Another run on a card, measured as this one was: what it ended at and took, and where its settings differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import size_text
from ..measured.schema import REPORT_FILE, MemoryReport
from .facts import DATA_FILE, CardFacts
from .markdown import code, plain
from .memory_section import number


# What a card lists of a run, and in which any two optimizers differ.
_OWN_SETTINGS = ("optim", "optim_args")


def read_beside(folder: str | Path) -> dict[str, Any]:
    """Return what the card of one run tells of another, from the JSON files in its output folder.

    Raises:
        ValueError: the folder has no card and memory report of a whole run.
    """
    try:
        facts, report = CardFacts.load(folder), MemoryReport.load(folder)
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder}: no run to stand beside another ({' '.join(str(error).split())}): it needs {DATA_FILE} and "
            f"{REPORT_FILE}, which hf_stateless.attach_memory_report(trainer) before train() leaves there"
        ) from None
    if not report.complete:
        raise ValueError(f"{folder}: {REPORT_FILE} was written before the end of training; let that run end first")
    return {
        "optimizer": facts.optimizer,
        "model": facts.model,
        "parameters": facts.parameters,
        "base_model": facts.base_model,
        "data": facts.data,
        "evaluation": facts.evaluation,
        "hyperparameters": facts.hyperparameters,
        "results": facts.results,
        "took": took(report),
    }


def took(report: MemoryReport) -> dict[str, Any]:
    """Return what a run took, as a table of runs shows it: bytes, seconds, and on what."""
    return {
        "peak": report.measured.peak.max,
        "optimizer_state": report.counted.optimizer_state,
        "seconds_per_step": report.cost.seconds_per_step,
        "device": report.setup.device,
    }


def beside_section(facts: CardFacts, report: MemoryReport | None) -> list[dict[str, Any]]:
    """Return the rows of the table of runs, one column for this run and one for each beside it."""
    own = {"evaluation": facts.evaluation, "hyperparameters": facts.hyperparameters, "took": {}}
    runs = [{**own, "took": took(report)} if report else own, *facts.beside]
    rows = [("learning rate", [plain(run["hyperparameters"].get("learning_rate", "")) for run in runs], "")]
    for entry in facts.evaluation:
        found = [_metric(run["evaluation"], entry["type"]) for run in runs]
        rows.append((f"{plain(entry['name']).lower()} at the end", [number(value) for value in found], "measured"))
    for key, name, how in (("peak", "peak", "measured"), ("optimizer_state", "optimizer state", "counted")):
        rows.append((name, [size_text(run["took"].get(key)) for run in runs], how))
    rows.append(("seconds a step", [number(run["took"].get("seconds_per_step"), 3) for run in runs], "measured"))
    return [{"name": name, "values": values, "how": how} for name, values, how in rows if any(values)]


def _metric(evaluation: list[dict[str, Any]], kind: str) -> float | None:
    return next((entry["value"] for entry in evaluation if entry["type"] == kind), None)


def differences(facts: CardFacts, report: MemoryReport | None, other: Mapping[str, Any]) -> str:
    """Return a sentence about what is the same in two runs and what is not, apart from the optimizer."""
    settings = _plain_settings(facts.hyperparameters), _plain_settings(other["hyperparameters"])
    settings[0].update(model=facts.model, parameters=facts.parameters, base_model=facts.base_model, data=facts.data)
    settings[1].update({key: other[key] for key in ("model", "parameters", "base_model", "data")})
    if report:
        settings[0]["device"], settings[1]["device"] = report.setup.device, other["took"]["device"]
    keys = [key for key in {**settings[0], **settings[1]} if settings[0].get(key) != settings[1].get(key)]
    told = [f"{plain(key)} ({', '.join(code(s.get(key, 'unset')) for s in settings)})" for key in keys]
    name = code(other["optimizer"])
    if not told:
        return f"{name} had the same model, data, steps and batches, and every other setting that a card lists."
    return f"Beside the optimizer, {name} differs in: {'; '.join(told)}."


def _plain_settings(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that have nothing to do with which optimizer it is."""
    return {key: value for key, value in hyperparameters.items() if key not in _OWN_SETTINGS and not key.endswith(")")}

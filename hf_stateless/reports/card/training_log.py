"""What the log of a Trainer says on a card: results while it trained, and what held-out data said at last."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from ..files import read_json


logger = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.json"
"""What the recipes write into the output folder."""
METRICS = {
    "loss": "Loss",
    "perplexity": "Perplexity",
    "accuracy": "Accuracy",
    "mean_token_accuracy": "Mean token accuracy",
    "reward": "Mean reward",
    "rewards/accuracies": "Reward accuracy",
}
LONGEST_TABLE = 12


def results(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the evaluations with the last training loss before each, or the training log if there are none.

    Of many evaluations some are left out. Of a training log each row is the mean since the row before.
    """
    rows, loss = [], None
    for entry in log:
        loss = entry.get("loss", loss)
        known = {name: entry[f"eval_{name}"] for name in METRICS if f"eval_{name}" in entry}
        if known:
            held_out = {f"held-out {METRICS[name].lower()}": value for name, value in known.items()}
            rows.append({"step": entry["step"], **({} if loss is None else {"training loss": loss}), **held_out})
    every = -(-len(rows) // LONGEST_TABLE) or 1
    return rows[:-1][::every] + rows[-1:] or _training_means(log)


def _training_means(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = [entry for entry in log if any(name in entry for name in METRICS)]
    count, rows = min(len(known), LONGEST_TABLE), []
    for row in range(count):
        entries = known[row * len(known) // count : (row + 1) * len(known) // count]
        values = {text: [entry[name] for entry in entries if name in entry] for name, text in METRICS.items()}
        means = {text.lower(): fmean(found) for text, found in values.items() if found}
        rows.append({"step": entries[-1]["step"], **means})
    return rows


def evaluation_of(log: list[dict[str, Any]], folder: str, dataset: str) -> list[dict[str, Any]]:
    """Return the last held-out metrics of the log, and those of `evaluation.json` in the output folder."""
    entries = [entry for entry in log if "eval_loss" in entry]
    where = dataset or "held-out part of the training data"
    before, after = (entries[0] if entries and entries[0]["step"] == 0 else {}), (entries or [{}])[-1]
    found = [
        {
            "type": name,
            "name": title,
            "before": before.get(f"eval_{name}"),
            "value": after[f"eval_{name}"],
            "dataset": where,
        }
        for name, title in METRICS.items()
        if f"eval_{name}" in after
    ]
    file = Path(folder) / EVALUATION_FILE
    if file.is_file():
        try:
            found += _compared(read_json(file))
        except Exception:  # it may hold anything, and the card is about the model
            logger.warning("The model card leaves out %s: it is not what the recipes write.", EVALUATION_FILE)
    return found


def _compared(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the metrics of the recipes' `evaluation.json`: means before and after training."""
    where = f"{evaluation['questions']} held-out questions of {', '.join(evaluation['tasks'])}"
    return [
        {
            "type": name,
            "name": name.replace("_", " ").capitalize(),
            "before": float(evaluation["before"][name]["mean"]),
            "value": float(figure["mean"]),
            "standard_error": float(figure["standard_error"]),
            "dataset": f"{where}, {evaluation['decoding']} decoding",
        }
        for name, figure in evaluation["after"].items()
    ]

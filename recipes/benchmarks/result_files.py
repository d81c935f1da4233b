"""The JSON files of the benchmarks: they appear whole or not at all, and say which versions made them."""

from __future__ import annotations

from pathlib import Path

from hf_stateless.reports.files import write_json
from hf_stateless.reports.provenance import versions as versions_of


def write_results(file: Path, setup: object, **results: object) -> None:
    """Write what was found, with what has to stand beside the numbers."""
    write_json(file, {"setup": setup, **results})


def versions() -> dict[str, str]:
    """Return the versions on which the result of a training run depends."""
    return versions_of(("torch", "transformers", "hf_stateless"))

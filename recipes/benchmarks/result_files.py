"""The JSON files of the benchmarks: they appear whole or not at all, and say which versions made them."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import transformers

import hf_stateless
from hf_stateless.reports.files import write_json


def write_results(file: Path, setup: object, **results: object) -> None:
    """Write what was found, with what has to stand beside the numbers."""
    write_json(file, {"setup": setup, **results}, indent=1)


def versions() -> dict[str, str]:
    """Return the versions on which the result of a training run depends."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_stateless": hf_stateless.__version__,
    }

"""The JSON files of the benchmarks: they appear whole or not at all, and say which versions made them."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch
import transformers

import hf_stateless


def write_whole(file: Path, text: str) -> None:
    """Write a file beside its place and rename it, its folder too; several processes may write the same one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(text)
    part.replace(file)


def write_results(file: Path, setup: object, **results: object) -> None:
    """Write what was found, with what has to stand beside the numbers."""
    write_whole(file, json.dumps({"setup": setup, **results}, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Return the versions on which the result of a training run depends."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_stateless": hf_stateless.__version__,
    }

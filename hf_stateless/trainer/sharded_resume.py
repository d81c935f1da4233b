"""What FSDP2 needs before it loads a checkpoint: it asks the files for the state that an optimizer has now."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from ..optimizer.checkpoint import check_same_groups
from ..optimizer.followed import follow_
from ..optimizer.optimizer import StatelessOptimizer


_ASKED = ("algorithm", "role", "params")


def prepare(optimizer: Any, folder: str | Path, index: int) -> None:
    """Give tables whose rule nobody has asked for that of a checkpoint; a collective, where the optimizer is ours.

    Args:
        optimizer: what accelerate is about to load a state into, in its wrapper.
        folder: of the checkpoint.
        index: number of the optimizer, as in the names of its files.

    Raises:
        ValueError: the checkpoint is of other groups of parameters.
    """
    ours = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(ours, StatelessOptimizer):
        return
    # The first rank reads for all: others may lack the file.
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    [saved] = broadcast_object_list([_saved_groups(Path(folder), index) if first else None])
    if saved:
        follow_(ours, saved)
        check_same_groups(saved, ours.param_groups)


def _saved_groups(folder: Path, index: int) -> list[dict[str, Any]]:
    """Return the groups of a checkpoint; none where they cannot be read, which loading it will say better."""
    name = "optimizer" if index == 0 else f"optimizer_{index}"
    sharded = folder if folder.name == f"optimizer_{index}" else folder / f"optimizer_{index}"
    try:
        if sharded.is_dir():
            return _of_distributed(sharded)
        for file in (folder / f"{name}.bin", folder / f"optimizer_{index}_rank0.bin"):
            if file.is_file():
                groups: list[dict[str, Any]] = torch.load(file, mmap=True, weights_only=True)["param_groups"]
                return [{key: group[key] for key in _ASKED if key in group} for group in groups]
    except Exception:  # whatever is wrong with a file
        return []
    return []


def _of_distributed(folder: Path) -> list[dict[str, Any]]:
    reader = FileSystemReader(folder)
    found: dict[int, dict[str, Any]] = {}
    for key in reader.read_metadata().state_dict_metadata:
        match = re.fullmatch(rf"optimizer\.param_groups\.(\d+)\.({'|'.join(_ASKED)})", key)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = ""
    groups = [found[position] for position in sorted(found)]
    load({"optimizer": {"param_groups": groups}}, storage_reader=reader, no_dist=True)
    return groups

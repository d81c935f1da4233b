"""What a push sends: the files of a run's folder that make its model, what is left out of them, and both as a list."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...trainer.table import aligned
from ..command_line import first_line, one_line
from ..files import read_json, size_text
from .facts import CardFacts
from .private import Machine, PrivateError
from .pushing import PushError


WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf")
_STATE: tuple[str, ...] = (
    "optimizer.pt",
    "optimizer.bin",
    "*optimizer.pt",
    "optimizer_*",
    "scheduler.pt",
    "scaler.pt",
    "*_states.pt",
)
_STATE += ("rng_state*.pth", "random_states_*.pkl", "pytorch_model_fsdp_*", "global_step*", "zero_to_fp32.py")
# Patterns of a name, with why it stays here.
_NEVER = {
    "training_args.bin": "a pickle that names folders of this machine",
    "events.out.tfevents.*": "names this machine, holds all arguments",
    "wandb": "the log of another program",
    "mlruns": "the log of another program",
    "__pycache__": "no part of a model",
    ".*": "hidden",
}
_LARGE = 1 << 20
_ROWS = 30


@dataclass
class Item:
    """A file of the push: where it goes, and where it lies or what it holds."""

    name: str
    source: Path | bytes
    size: int
    note: str = ""


@dataclass
class Contents:
    """All files of a push, and those that stay with the reason."""

    pushed: dict[str, Item] = field(default_factory=dict)
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def has_weights(self) -> bool:
        """Tell whether a file of weights is among them."""
        return any(fnmatch(Path(name).name, pattern) for name in self.pushed for pattern in WEIGHTS)

    def freeze(self, stage: Path) -> None:
        """Keep the files as they are now, whatever training does to its folder: in memory, large ones as links."""
        for number, item in enumerate(self.pushed.values()):
            if isinstance(item.source, bytes):
                continue
            if item.size < _LARGE:
                item.source = item.source.read_bytes()
                continue
            stage.mkdir(parents=True, exist_ok=True)
            kept = stage / f"{number}{item.source.suffix}"
            kept.unlink(missing_ok=True)
            try:
                os.link(os.path.realpath(item.source), kept)
            except OSError:  # a file system without links
                shutil.copyfile(item.source, kept)
            item.source = kept


def is_state(name: str) -> bool:
    """Tell whether a path is state of a training, that of its optimizer first of all.

    Example:
        >>> from hf_stateless.reports.card.contents import is_state
        >>> [name for name in ("optimizer.pt", "model.safetensors", "optimizer_0/__0_0.distcp") if is_state(name)]
        ['optimizer.pt', 'optimizer_0/__0_0.distcp']
    """
    return any(fnmatch(part, pattern) for part in name.split("/") for pattern in _STATE)


def collect(
    folder: str | Path,
    machine: Machine,
    *,
    checkpoint: str | Path | None = None,
    checkpoints: Iterable[tuple[str, str | Path]] = (),
    without: Iterable[str] = (),
) -> Contents:
    """Return what a push of a run's folder sends.

    Args:
        folder: of the run; what it holds goes to the root of the repository.
        machine: what no file may tell.
        checkpoint: whose model goes to the root, in place of what the folder has.
        checkpoints: names in the repository of whole checkpoints, with their folders: optimizer state goes with them.
        without: patterns of more paths or names that stay here.
    """
    contents, patterns = Contents(), tuple(without)
    places = [("", Path(folder)), *([("", Path(checkpoint))] if checkpoint else [])]
    for prefix, place in [*places, *((f"{name}/", Path(path)) for name, path in checkpoints)]:
        for name, file in _files(place, contents):
            if not prefix and name == "README.md" and name in contents.pushed:
                continue  # that of PEFT in a checkpoint: ours is in the folder
            _add(contents, machine, prefix, name, file, patterns)
    _name_the_base_model(contents, Path(folder))
    return contents


def _files(place: Path, contents: Contents) -> Iterator[tuple[str, Path]]:
    """Yield the files below a folder, by their paths in it; checkpoints are counted as left out and not entered."""
    root = os.path.realpath(place)
    allowed = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":  # of the Hub's cache, which holds links to its blobs
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    for above, folders, names in os.walk(place):
        inside = Path(above).relative_to(place)
        for name in sorted(folders):
            if name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
                size = sum(path.stat().st_size for path in (Path(above) / name).rglob("*") if path.is_file())
                contents.left_out[(inside / name).as_posix() + "/"] = (size, "a checkpoint, with optimizer state")
        folders[:] = sorted(name for name in folders if not name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"))
        for name in sorted(names):
            file, path = Path(above) / name, (inside / name).as_posix()
            target = os.path.realpath(file)
            if not os.path.isfile(target):
                contents.left_out[path] = (0, "no file")
            elif not any(target.startswith(place + os.sep) for place in allowed):
                contents.left_out[path] = (0, "a link that leads out of the folder")
            else:
                yield path, file


def _add(contents: Contents, machine: Machine, prefix: str, name: str, file: Path, without: tuple[str, ...]) -> None:
    path = prefix + name
    try:
        size = file.stat().st_size
        why = _why_not(path, name, without, state=bool(prefix))
        if why is None:
            cleaned = machine.look(path, file)
            note = "" if cleaned is None else "without what names this machine"
            item = Item(path, file if cleaned is None else cleaned, size if cleaned is None else len(cleaned), note)
            if is_state(name):
                item.note = "state of the training"
            contents.pushed[path] = item
            contents.left_out.pop(path, None)
            return
    except PrivateError as error:
        why = str(error)
    except OSError as error:
        size, why = 0, first_line(error)
    contents.left_out[path] = (size, why)
    contents.pushed.pop(path, None)


def _why_not(path: str, name: str, without: tuple[str, ...], *, state: bool) -> str | None:
    if not path.isprintable() or "\\" in path:
        return "no name for the Hub"
    if any(fnmatch(path, pattern) or fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in without):
        return "left out as asked"
    if name.startswith("_"):
        return "its name begins with _"
    for part in name.split("/"):
        for pattern, why in _NEVER.items():
            if fnmatch(part, pattern) and part != ".gitattributes":
                return why
    return "state of the training" if not state and is_state(name) else None


def _name_the_base_model(contents: Contents, folder: Path) -> None:
    """Give the configs of adapters the Hub's name of their base model, where the run knows it."""
    for path, item in contents.pushed.items():
        if path.rsplit("/", 1)[-1] != "adapter_config.json":
            continue
        try:
            file = folder / "adapter_config.json"
            config = json.loads(item.source) if isinstance(item.source, bytes) else read_json(item.source)
            named = config.get("base_model_name_or_path") or ""
            if isinstance(item.source, bytes) or os.path.isdir(named):
                with contextlib.suppress(OSError):
                    config["base_model_name_or_path"] = CardFacts.load(folder).base_model or Path(named).name
                item.source = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
                item.size, item.note = len(item.source), "without what names this machine"
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise PushError(f"{file}: no config of an adapter ({first_line(error)}); save the model again") from None


def listing(contents: Contents, repository: str, note: str = "") -> str:
    """Return the list of what goes to a repository and what stays, with sizes."""
    total = sum(item.size for item in contents.pushed.values())
    lines = [f"To {one_line(repository)}{note}: {len(contents.pushed)} files, {size_text(total)}"]
    rows = [[f"  {name}", size_text(item.size), item.note] for name, item in contents.pushed.items()]
    lines += _shortened(rows)
    if not contents.has_weights:
        lines.append("  no weights are among them")
    if contents.left_out:
        lines.append("Left out:")
        lines += _shortened([[f"  {one_line(n)}", size_text(s), why] for n, (s, why) in contents.left_out.items()])
    return "\n".join(lines)


def _shortened(rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    shown = aligned(rows[:_ROWS], text=(0, 2))
    return [*shown, *([f"  and {len(rows) - _ROWS} more"] if len(rows) > _ROWS else [])]


def whole_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a run's folder that were written to their end, the oldest first."""
    numbered = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in Path(folder).glob("*")]
    found = sorted((int(match[1]), path) for match, path in numbered if match)
    return [path for _, path in found if (path / "trainer_state.json").is_file()]

"""Imports hf_stateless into every Python process that loads the arguments of the Trainer, and into no other.

Python imports `sitecustomize` at its start from the folder in front of PYTHONPATH. This one waits in `sys.meta_path`
until `transformers.training_args` is there and no import of transformers or accelerate is under way: earlier,
hf_stateless would meet half-initialised modules. It needs the standard library only, loads none of it at start, and
never raises: a process in which hf_stateless cannot be imported runs as if this file did not exist.
Set HF_STATELESS_DEBUG to see why.
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

TRIGGER = "transformers.training_args"
WATCHED = ("transformers", "accelerate")
"""The packages that hf_stateless imports and that may import the trigger while they are half-initialised."""


class Watch:
    """A finder that finds nothing itself; it learns when imports of the watched packages end."""

    def __init__(self) -> None:
        self.depth: dict[int, int] = {}
        self.asking: set[tuple[int, str]] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders find, with a loader that reports the end of the import."""
        key = (get_ident(), name)
        # The second test: other finders of this kind may ask all finders in turn, and so this one again.
        if name.partition(".")[0] not in WATCHED or key in self.asking:
            return None
        self.asking.add(key)
        try:
            others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            specs = (finder.find_spec(name, path, target) for finder in others)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self.asking.discard(key)
        if spec is not None and spec.loader is not None:
            self._report_end(spec.loader)
        return spec

    def _report_end(self, loader: Any) -> None:
        """Wrap `exec_module` of one loader for its next call only, so that the module keeps a loader of plain type."""
        # Built-in and frozen modules have classes for loaders; none of the watched modules is one.
        if isinstance(loader, type) or not hasattr(loader, "exec_module"):
            return
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            thread = get_ident()
            self.depth[thread] = self.depth.get(thread, 0) + 1
            try:
                execute(module)
            finally:
                self.depth[thread] -= 1
            if not self.depth[thread] and TRIGGER in sys.modules:
                self.leave()

        try:
            loader.exec_module = exec_module
        except AttributeError:
            debug(f"cannot watch the loader {loader!r}")

    def leave(self) -> None:
        """Import hf_stateless, and watch no longer."""
        if self not in sys.meta_path:
            return
        sys.meta_path.remove(self)
        try:
            __import__("hf_stateless")
        except Exception as error:
            debug(f"{type(error).__name__}: {error}")


def debug(message: str) -> None:
    """Say why the names are missing, on one line of stderr, to those who ask."""
    if os.environ.get("HF_STATELESS_DEBUG"):
        print("hf_stateless: names not registered: " + " ".join(message.split()), file=sys.stderr)


def step_aside() -> None:
    """Take this folder off `sys.path` and run the `sitecustomize` that the process would have had without it.

    What that one raises is raised here too: Python reports it as usual and goes on.
    """
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != own]
    this = sys.modules.pop("sitecustomize")
    try:
        __import__("sitecustomize")
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
        sys.modules["sitecustomize"] = this


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, Watch())
    step_aside()

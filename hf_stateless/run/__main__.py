"""`python -m hf_stateless.run SCRIPT ...`: a script that knows nothing of hf_stateless, with the names registered.

Running this module imports the package, which registers the names; then the script runs as `python SCRIPT ...` or
`python -m MODULE ...` would run it: `__main__`, `__file__`, `sys.argv`, `sys.path[0]`, exit status and tracebacks.
"""

from __future__ import annotations

import builtins
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType
from typing import NoReturn


USAGE = """\
usage: python -m hf_stateless.run SCRIPT [ARGUMENT ...]
       python -m hf_stateless.run -m MODULE [ARGUMENT ...]

Runs an unchanged Python script or module in which optim= and --optim know the names of hf_stateless.
Under a launcher: accelerate launch -m hf_stateless.run SCRIPT --optim sinkgd
For a command that starts Python by itself, like trl sft: hf-stateless run trl sft --optim sinkgd"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script or module in place of this one.

    Args:
        argv: script or `-m module`, then its arguments; `sys.argv[1:]` when None.

    Raises:
        SystemExit: what the script exits with; 2 and one line on stderr where there is no script, 1 where there is no
            such module, as `python` does.
    """
    first, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if first in ("-h", "--help"):
        print(USAGE)
        return
    if first == "-m" and not rest:
        _stop("-m stands alone, expected a module after it, like: -m trl.scripts.sft", status=2)
    if not first or (first.startswith("-") and first != "-m"):
        got = f"the option {first}" if first else "nothing"
        _stop(f"got {got}, expected a script or -m MODULE; type: python -m hf_stateless.run --help", status=2)
    try:
        if first == "-m":
            module, sys.argv = rest[0], ["-m", *rest[1:]]
            runpy.run_module(module, run_name="__main__", alter_sys=True)  # sets sys.argv[0] to the file of the module
        else:
            _run_script(first, *rest)
    except SystemExit:
        raise
    except BaseException as error:
        trace = _from_script_on(error.__traceback__)
        if trace is None and isinstance(error, ImportError):
            _stop(str(error), status=1)
        _show_from(trace)
        raise


def _run_script(path: str, *arguments: str) -> None:
    """Run a file as `python path` does.

    Not by `runpy.run_path`, which gives `sys.argv[0]` and `__file__` one value, while Python makes only the second
    absolute, and which takes `__main__` away before exit handlers and threads of the script have ended.
    """
    file = os.path.join(os.getcwd(), path)
    module = ModuleType("__main__")
    vars(module).update(__file__=file, __cached__=None, __builtins__=builtins)
    module.__loader__ = loader = SourceFileLoader("__main__", file)
    try:
        source = loader.get_data(file)
    except OSError as error:
        _stop(f"can't open the script {path!r}: {error.strerror}; -m MODULE runs a module", status=2)
    sys.argv = [path, *arguments]
    # Safe path and isolated mode put no folder in front, so there is none to replace.
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = os.path.dirname(os.path.realpath(file))
    sys.modules["__main__"] = module
    exec(compile(source, file, "exec", dont_inherit=True), vars(module))


def _stop(message: str, *, status: int) -> NoReturn:
    """Exit with one line on stderr."""
    print(f"hf_stateless.run: {message}", file=sys.stderr)
    raise SystemExit(status)


def _from_script_on(trace: TracebackType | None) -> TracebackType | None:
    """Drop the leading frames that belong to this file or to `runpy`; None when there are no others."""
    while trace is not None:
        names = trace.tb_frame.f_globals
        if names is not globals() and names.get("__name__") != "runpy":
            break
        trace = trace.tb_next
    return trace


def _show_from(trace: TracebackType | None) -> None:
    """Show the error that is about to end the process from one frame on, by whatever hook the script has installed.

    The error goes on to the interpreter, which alone ends a process by the right signal after Ctrl-C.
    """
    show = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        show(kind, error.with_traceback(trace), trace)

    sys.excepthook = excepthook


if __name__ == "__main__":
    main()

"""`hf-stateless`: the command line of the package.

`start.py` runs this file by its path, so that `run` starts without importing torch: it names modules of the package
whole, and loads little of the standard library.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path


AUTOLOAD = Path(__file__).resolve().parent / "autoload"
# Each is loaded when it is called: torch takes seconds.
SUBCOMMANDS: dict[str, Callable[[list[str]], int]] = {
    "memory": lambda argv: import_module("hf_stateless.reports.predicted.command").main(argv),
    "explain": lambda argv: import_module("hf_stateless.run.explain").main(argv),
    "compare": lambda argv: import_module("hf_stateless.reports.compare").main(argv),
    "card": lambda argv: import_module("hf_stateless.reports.card.command").main(argv),
    "push": lambda argv: import_module("hf_stateless.reports.card.push_command").main(argv),
    "export": lambda argv: import_module("hf_stateless.run.export").main(argv),
    "convert-config": lambda argv: import_module("hf_stateless.run.convert.command").main(argv),
}

_USAGE = """\
usage: hf-stateless SUBCOMMAND [ARGUMENT ...]
       hf-stateless --version

    run             run any command, with the optimizer names known in every Python process that it starts
    memory          predict the memory of a training run, and which GPUs have enough
    explain         say which parameter of a model gets which update
    compare         print loss, time and memory of finished runs side by side
    card            write the model card of a finished run anew, also beside other runs
    push            push the folder of a run to the Hub
    export          write a model trained in 8 bits for other programs
    convert-config  write a config of DeepSpeed or FSDP1 as one of FSDP2

More about one of them: hf-stateless memory --help
"""
_RUN_USAGE = """\
usage: hf-stateless run COMMAND [ARGUMENT ...]

Runs any command; in every Python process that it starts, optim= and --optim know the names of hf_stateless:
    hf-stateless run trl sft --optim sinkgd --model_name_or_path MODEL --dataset_name DATASET
    hf-stateless run accelerate launch train.py --optim swan
A command that is not on PATH is taken from beside the Python of hf-stateless.
It works through PYTHONPATH, which python -I, -E and -S do not read.
If a name stays unknown, HF_STATELESS_DEBUG=1 says why.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: subcommand and its arguments; `sys.argv[1:]` when None.

    Returns:
        The exit status; `run` does not return, since the command takes the place of this process.
    """
    first, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if first in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if first == "--version":
        from importlib.metadata import version

        print(f"hf-stateless {version('hf_stateless')}")
        return 0
    if first == "run":
        return _run(rest)
    if first in SUBCOMMANDS:
        return SUBCOMMANDS[first](rest)
    got = repr(first) if first else "nothing"
    return _error(f"got {got}, expected one of {', '.join(['run', *SUBCOMMANDS])}; type: hf-stateless --help")


def _run(command: list[str]) -> int:
    """Start a command with the folder `autoload` in front of PYTHONPATH, in place of this process where that works."""
    first = command[0] if command else ""
    if first in ("-h", "--help"):
        print(_RUN_USAGE, end="")
        return 0
    if not first or first.startswith("-"):
        got = f"the option {first}" if first else "nothing"
        return _error(f"run got {got}, expected a command, like: hf-stateless run trl sft --optim sinkgd")
    program = shutil.which(first)
    if program is None:
        # An environment that was not activated. Its Python finds its packages by the name that it is started with.
        program = shutil.which(first, path=os.pathsep.join(own_programs()))
        command = [program or first, *command[1:]]
    if program is None:
        return _not_found(first)
    os.environ["PYTHONPATH"] = python_path(os.environ.get("PYTHONPATH", ""))
    if os.name == "nt":
        # On Windows exec detaches from the terminal and loses the exit status.
        import subprocess

        return subprocess.call([program, *command[1:]])
    # Python ignores these two, and a program started by exec would go on ignoring them.
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    sys.stdout.flush()
    try:
        os.execv(program, command)
    except OSError as error:
        return _error(f"run cannot start {first!r}: {error.strerror}", status=126)


def own_programs() -> list[str]:
    """Return the folders of the programs that were installed with this Python: of its environment, then beside it."""
    import sysconfig

    return list(dict.fromkeys([sysconfig.get_path("scripts"), os.path.dirname(sys.executable or "")]))


def _not_found(first: str) -> int:
    hint = f"hf-stateless run python {first}" if first.endswith(".py") else "a program that is on PATH"
    return _error(f"run found no command {first!r}, on PATH or beside {sys.executable}; type: {hint}", status=127)


def python_path(existing: str) -> str:
    """Return a PYTHONPATH with the folder `autoload` in front and everything that was there behind it."""
    folders = existing.split(os.pathsep) if existing else []
    return os.pathsep.join([str(AUTOLOAD), *(folder for folder in folders if folder != str(AUTOLOAD))])


def _error(message: str, *, status: int = 2) -> int:
    """Say on one line of stderr what went wrong, and return the exit status."""
    print(f"hf-stateless: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

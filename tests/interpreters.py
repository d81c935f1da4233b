"""Interpreters started in an empty folder, with the package or with a light stand-in for it, and a cheaper twin."""

import contextlib
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rank_processes import FORKED

import hf_stateless


PACKAGE = Path(hf_stateless.__file__).parent
RUN = ["-m", "hf_stateless.run"]
CLI = ["-m", "hf_stateless.run.command"]
# What the console script that pip makes does.
CONSOLE = ["-c", f"import runpy, sys; sys.exit(runpy.run_path({str(PACKAGE / 'run' / 'start.py')!r})['main']())"]


def write(folder, files):
    """Write files by name; the text may be indented."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def forked(arguments, folder, output):
    """Run `python ARGUMENTS` in a folder without the seconds that imports take; return its exit status.

    The process is a fork of one that has imported torch and transformers, so nothing about imports can be tested by
    it. What is printed goes to the file `output`.
    """
    process = FORKED.Process(target=_as_main, args=([str(a) for a in arguments], str(folder), str(output)))
    process.start()
    process.join(400)
    return process.exitcode


def _as_main(arguments, folder, output):
    os.chdir(folder)
    is_module = arguments[0] == "-m"
    name, *flags = arguments[is_module:]
    sys.argv = [name, *flags]
    sys.path.insert(0, folder if is_module else os.path.dirname(os.path.abspath(name)))
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if is_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")


@pytest.fixture
def python(tmp_path):
    """`python(*arguments, **environment)`: an interpreter started in `tmp_path`, without network."""

    def start(*arguments, **environment):
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_STATELESS_DEBUG")}
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env={**inherited, **offline, **environment},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    return start


@pytest.fixture
def light(tmp_path, python):
    """As `python`, with a package that has the real `run`, `cli` and `autoload`, and imports in no time.

    It says `registered` on stdout when it is imported.
    """
    front = tmp_path / "front"
    body = f"__path__ = [{str(PACKAGE)!r}]\n__version__ = 'light'\nprint('registered')\n"
    write(front, {"hf_stateless/__init__.py": body})
    (front / "hf_stateless" / "run").symlink_to(PACKAGE / "run")

    def start(*arguments, **environment):
        path = os.pathsep.join(filter(None, [str(front), environment.pop("PYTHONPATH", "")]))
        return python(*arguments, PYTHONPATH=path, **environment)

    return start

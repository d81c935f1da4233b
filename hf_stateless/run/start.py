"""Where `hf-stateless` starts; installed as `hf_stateless_command.py` beside the package.

Importing the package takes seconds and half a GiB, and `hf-stateless run` hands over to another program at once.
"""

import runpy
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    """Run `hf_stateless/run/command.py` as a file, which imports no package; return the exit status."""
    spec = find_spec("hf_stateless")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'hf_stateless': type pip install hf_stateless")
    status: int = runpy.run_path(str(Path(spec.origin).parent / "run" / "command.py"))["main"]()
    return status

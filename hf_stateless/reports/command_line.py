"""What the subcommands of `hf-stateless` share: errors of one line that say what to type."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError instead of printing its usage, which `main` of a subcommand prints as a line."""

    def error(self, message: str) -> NoReturn:
        """Raise what was wrong with the arguments."""
        raise ValueError(f"{message} (type {self.prog} --help)")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

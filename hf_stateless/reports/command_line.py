"""What the subcommands of `hf-stateless` share: an error is one line, and for arguments it says where to look."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError instead of printing its usage, which `main` of a subcommand prints as a line.

    Example:
        >>> from hf_stateless.reports.command_line import Parser
        >>> Parser(prog="hf-stateless compare").parse_args(["--nonsense"])
        Traceback (most recent call last):
            ...
        ValueError: unrecognized arguments: --nonsense (type hf-stateless compare --help)
    """

    def error(self, message: str) -> NoReturn:
        """Raise what was wrong with the arguments."""
        raise ValueError(f"{message} (type {self.prog} --help)")


def first_line(error: BaseException) -> str:
    r"""Return the first line of what an error says, or its type if it says nothing.

    Example:
        >>> from hf_stateless.reports.command_line import first_line
        >>> first_line(OSError("no disk\nat all")), first_line(OSError())
        ('no disk', 'OSError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]

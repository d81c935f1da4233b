"""What the subcommands of `hf-stateless` share: errors of one line that say what to type."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError instead of printing its usage, which `main` of a subcommand prints as a line."""

    def error(self, message: str) -> NoReturn:
        """Raise what was wrong with the arguments."""
        raise ValueError(f"{message} (type {self.prog} --help)")


def one_line(text: object, most: int = 1000) -> str:
    r"""Return a text as one line that a terminal shows as it is: no escapes and line breaks, a long one cut.

    Example:
        >>> from hf_stateless.reports.command_line import one_line
        >>> one_line("two\nlines, \x1b[31mred"), one_line("x" * 200, most=10)
        ('two lines, ?[31mred', 'xxxxxxx...')
    """
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return line if len(line) <= most else line[: most - 3] + "..."


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

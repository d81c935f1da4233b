"""`hf-stateless card`: the card of a finished run written anew, with another run beside it; or a table of cards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError

from ..command_line import Parser, one_line
from .beside import read_beside
from .facts import CARD_FILE, DATA_FILE, CardFacts
from .folder import write_card
from .markdown import metadata_values
from .render import render
from .table import cards_table


def main(argv: Sequence[str] | None = None) -> int:
    """Write the card of a run; return 0, or 2 after one line on stderr that says what was wrong."""
    parser = Parser(prog="hf-stateless card", description="Write the model card of a finished run anew.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="its output folder")
    parser.add_argument(
        "--beside", type=Path, nargs="+", metavar="RUN", help="runs of other optimizers to compare with"
    )
    parser.add_argument("--limit", nargs="+", metavar="TEXT", help="sentences for the section Limits")
    parser.add_argument("--table", action="store_true", help="print a table of several cards, and write nothing")
    parser.add_argument("--license", metavar="NAME", help="as the Hub names it, such as apache-2.0")
    try:
        args = parser.parse_args(argv)
        for folder in args.runs:
            _expect_card(folder)
        if not args.table and len(args.runs) > 1:
            raise ValueError(f"got {len(args.runs)} runs, expected one; --table prints a table of several")
        print(cards_table(args.runs) if args.table else _write(args))
    except (OSError, AttributeError, KeyError, TypeError, ValueError, TemplateError) as error:
        print(f"hf-stateless card: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _expect_card(folder: Path) -> None:
    if not (folder / DATA_FILE).is_file():
        raise ValueError(
            f"{folder}: no {DATA_FILE}; expected the output_dir of a run with "
            "hf_stateless.attach_memory_report(trainer), as the recipes have it"
        )


def _write(args: argparse.Namespace) -> Path:
    """Write the card of one run with what was said of it, and return its path."""
    (folder,) = args.runs
    facts = CardFacts.load(folder)
    if args.beside is not None:
        facts.beside = [read_beside(other) for other in args.beside]
    if args.limit is not None:
        facts.limits = args.limit
    if args.license:
        facts.metadata = metadata_values({**facts.metadata, "license": args.license})
    render(facts)  # before a file is touched: the JSON may hold anything
    write_card(facts, folder)
    return Path(folder, CARD_FILE)

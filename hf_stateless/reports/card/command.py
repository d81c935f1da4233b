"""`hf-stateless card RUN`: the card of a finished run written anew, with another run beside it."""

from __future__ import annotations

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


def main(argv: Sequence[str] | None = None) -> int:
    """Write the card of a run; return 0, or 2 after one line on stderr that says what was wrong."""
    parser = Parser(prog="hf-stateless card", description="Write the model card of a finished run anew.")
    parser.add_argument("run", type=Path, metavar="RUN", help="its output folder")
    parser.add_argument(
        "--beside", type=Path, nargs="+", metavar="RUN", help="runs of other optimizers to compare with"
    )
    parser.add_argument("--limit", nargs="+", metavar="TEXT", help="sentences for the section Limits")
    parser.add_argument("--license", metavar="NAME", help="as the Hub names it, such as apache-2.0")
    try:
        args = parser.parse_args(argv)
        if not (args.run / DATA_FILE).is_file():
            raise ValueError(
                f"{args.run}: no {DATA_FILE}; expected the output_dir of a run with "
                "hf_stateless.attach_memory_report(trainer), as the recipes have it"
            )
        facts = CardFacts.load(args.run)
        if args.beside is not None:
            facts.beside = [read_beside(folder) for folder in args.beside]
        if args.limit is not None:
            facts.limits = args.limit
        if args.license:
            facts.metadata = metadata_values({**facts.metadata, "license": args.license})
        render(facts)  # before a file is touched: the JSON may hold anything
        write_card(facts, args.run)
    except (OSError, AttributeError, KeyError, TypeError, ValueError, TemplateError) as error:
        print(f"hf-stateless card: {one_line(error)}", file=sys.stderr)
        return 2
    print(args.run / CARD_FILE)
    return 0

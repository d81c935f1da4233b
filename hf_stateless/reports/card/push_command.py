"""`hf-stateless push FOLDER REPO`: what a run left in its folder goes to the Hub, also after a push that failed."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path

from huggingface_hub import HfApi

from ..command_line import Parser, first_line, one_line
from ..run_facts import is_hub_id
from .contents import Contents, collect, listing, whole_checkpoints
from .hub_client import limit_waits
from .private import Machine
from .pushing import WAITS, PushError, command_for_later, repeated, upload


def main(argv: list[str] | None = None) -> int:
    """Push one folder, and print what goes and what stays before.

    Args:
        argv: arguments after `hf-stateless push`; those of the process when None.

    Returns:
        0, or 2 after one line on stderr that says what was wrong.
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        contents = _contents(args)
        print(listing(contents, args.repository), flush=True)
        if not contents.has_weights:
            raise ValueError(f"{args.folder} holds no weights to push, such as model.safetensors")
        if not args.list:
            print(_push(args, contents))
    except (ValueError, OSError, PushError) as error:
        print(f"hf-stateless push: {one_line(first_line(error), 2000)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="hf-stateless push",
        description="Push the folder of a run to the Hub: model, card and report, nothing that names this machine. "
        "The token is that of `hf auth login`, or in HF_TOKEN. What the Hub has already is not sent again.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="output folder of a run, a checkpoint, or a saved model")
    parser.add_argument("repository", metavar="REPO", help="NAME or OWNER/NAME on the Hub; made if there is none")
    parser.add_argument("--list", action="store_true", help="only print what would go, and what would stay")
    parser.add_argument("--without", action="append", default=[], metavar="PATTERN", help="leave out such names")
    parser.add_argument(
        "--checkpoints",
        choices=("last", "all"),
        help="also the newest checkpoint as last-checkpoint/, or all, with optimizer state",
    )
    parser.add_argument("--revision", metavar="BRANCH", help="an existing branch; default: main")
    parser.add_argument("--private", action="store_true", help="make a private repository, if there is none")
    parser.add_argument("--message", default="Pushed by hf-stateless", help="of the commit")
    return parser


def _contents(args: Namespace) -> Contents:
    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"got {args.folder}, which is no folder; expected the output folder of a run")
    _check_name(args.repository)
    whole = whole_checkpoints(folder)
    if args.checkpoints and not whole:
        raise ValueError(f"got --checkpoints {args.checkpoints}, but {args.folder} holds no whole checkpoint")
    saved = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    named = {
        None: [],
        "last": [("last-checkpoint", whole[-1])] if whole else [],
        "all": [(path.name, path) for path in whole],
    }
    return collect(
        folder,
        Machine([os.environ.get("HF_TOKEN")], [folder]),
        checkpoint=None if saved or not whole else whole[-1],  # a run that was killed saved no model at its end
        checkpoints=named[args.checkpoints],
        without=args.without,
    )


def _check_name(repository: str) -> None:
    if not is_hub_id(repository):
        raise ValueError(f"got {repository!r}, expected NAME or OWNER/NAME on the Hub")


def _push(args: Namespace, contents: Contents) -> str:
    token = os.environ.get("HF_TOKEN") or None
    limit_waits()
    more = [word for pattern in args.without for word in ("--without", pattern)]
    more += ["--checkpoints", args.checkpoints] if args.checkpoints else []

    def action() -> str:
        private = True if args.private else None
        made = HfApi(token=token).create_repo(args.repository, private=private, exist_ok=True)
        return str(upload(contents, made.repo_id, args.message, token=token, revision=args.revision).commit_url)

    def advice(failure: str) -> str:
        later = command_for_later(args.folder, args.repository, revision=args.revision, token=None, more=more)
        return f"not pushed to {args.repository} {failure}. Nothing is lost in {args.folder}; {later}"

    return repeated(action, WAITS, advice)


if __name__ == "__main__":
    sys.exit(main())

"""`hf-stateless convert-config FILE`: a config of DeepSpeed or FSDP1 as an accelerate config of FSDP2."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from accelerate.commands.config.config_args import ClusterConfig

from ...reports.command_line import Parser, one_line
from ...reports.files import write_text
from .files import convert_file


DESCRIPTION = """\
Write the accelerate config of FSDP2 that does what a config of DeepSpeed or FSDP1 does.

FILE is a DeepSpeed JSON (ds_config.json, the deepspeed= file of the Trainer, "auto" values included), or an
accelerate config with distributed_type: DEEPSPEED or FSDP. What has no counterpart is named, with what to type
instead. Without -o the config is printed, with that as comments.
"""
EXAMPLE = """\
for example:
  hf-stateless convert-config ds_config.json -o fsdp2.yaml
  accelerate launch --config_file fsdp2.yaml --num_processes 8 train.py
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hf-stateless convert-config",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="config of DeepSpeed, or of accelerate")
    parser.add_argument("-o", "--output", metavar="OUT", help="new file, such as fsdp2.yaml")
    parser.add_argument("--force", action="store_true", help="write over OUT")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Convert one config; print it, or write it and print what to know beside it.

    Args:
        argv: arguments after `hf-stateless convert-config`; those of the process when None.

    Returns:
        0, or 2 after one line on stderr that says what was wrong; then nothing is written.
    """
    try:
        args = _parser().parse_args(argv)
        print(_convert(args.file, args.output, args.force))
    except OSError as error:
        return _error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ValueError as error:
        return _error(str(error))
    return 0


def _error(line: str) -> int:
    print(f"hf-stateless convert-config: {one_line(line)}", file=sys.stderr)
    return 2


def _convert(source: str, out: str | None, force: bool) -> str:
    """Write the config if a file is named; return what is printed."""
    if out is not None:
        if Path(out).suffix not in (".yaml", ".yml"):
            raise ValueError(
                f"-o {out}: expected a name that ends in .yaml or .yml, since accelerate reads it by that"
            )
        if Path(out).exists() and not force:
            raise ValueError(f"{out} exists: type --force to write over it, or another name")
    try:
        conversion = convert_file(source)
        ClusterConfig(**ClusterConfig.process_config(dict(conversion.config)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: {error}") from None
    text = conversion.text(source, out or "fsdp2.yaml")
    if out is None:
        return text.rstrip("\n")
    write_text(out, text)
    return "\n".join([f"{one_line(out)}: written from {one_line(source)}. Now type:", *conversion.comments(out)])


if __name__ == "__main__":
    sys.exit(main())

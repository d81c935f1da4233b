"""`hf-stateless export MODEL OUT`: a model that was trained in 8 bits as a folder that loads without this package."""

from __future__ import annotations

import shlex
import sys

from ..reports.command_line import Parser, first_line
from ..weights.int8.export import FORMATS, export_model


def main(argv: list[str] | None = None) -> int:
    """Export one model, and print how to load it.

    Args:
        argv: arguments after `hf-stateless export`; those of the process when None.

    Returns:
        0, or 2 after one line on stderr that says what was wrong.
    """
    parser = Parser(prog="hf-stateless export", description="Write a model trained in 8 bits for other programs.")
    parser.add_argument("source", metavar="MODEL", help="folder of a saved 8-bit model, or its id on the Hub")
    parser.add_argument("output", metavar="OUT", help="new folder")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="bf16",
        help="default bf16, also for GGUF; vllm is for quant_method hf_stateless_int8, others load as they are",
    )
    try:
        args = parser.parse_args(argv)
        folder = export_model(args.source, args.output, args.format)
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-stateless export: {first_line(error)}", file=sys.stderr)
        return 2
    print(f'{folder}: {args.format}, for from_pretrained("{folder}")')
    if args.format == "vllm":
        print(f"vllm serve {shlex.quote(str(folder))}")
    if args.format == "bf16":
        print(f"A GGUF file of it, with llama.cpp: python convert_hf_to_gguf.py {folder} --outfile model.gguf")
    return 0


if __name__ == "__main__":
    sys.exit(main())

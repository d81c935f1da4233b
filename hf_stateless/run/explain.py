"""`hf-stateless explain MODEL`: which parameter of a model gets which update, without loading its weights."""

from __future__ import annotations

import argparse
import sys

from ..reports.command_line import Parser
from ..reports.predicted.model import build_model, load_config
from ..reports.predicted.table import Settings
from ..reports.run_facts import base_of, option_pairs
from ..trainer.assumed import assumptions
from ..trainer.factory import parameter_groups
from ..trainer.optim_args import parse_options, refuse_repeated_keys
from ..trainer.table import describe, explain


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="hf-stateless explain", description="Say which parameter of a model gets which update.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="id on the Hub, folder with a config.json, or such a file")
    add("--optim", default="sinkgd", help="a name, as swan or sinkgd_layerwise (default sinkgd)")
    add("--optim-args", default="", help="key=value,key=value, as in TrainingArguments")
    add("--target-modules", metavar="REGEX", help="as optim_target_modules, such as '.*(q_proj|v_proj)'")
    add("--lora", type=int, metavar="R", help="with LoRA adapters of rank R on all linear layers")
    add("--trust-remote-code", action="store_true", help="let a model of the Hub run its own code")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the whole table of who goes where, and the short one below it.

    Args:
        argv: arguments after `hf-stateless explain`; those of the process when None.

    Returns:
        0, or 2 after one line on stderr that says what was wrong.
    """
    try:
        print(_answer(_parser().parse_args(argv)))
    except (ImportError, ValueError) as error:
        line = " ".join(str(error).split()).replace("optim_target_modules=", "--target-modules ")
        print(f"hf-stateless explain: {line}", file=sys.stderr)
        return 2
    return 0


def _answer(args: argparse.Namespace) -> str:
    pairs = option_pairs(args.optim_args)
    if not all(key and value and "=" not in value for key, value in pairs):
        raise ValueError(f"--optim-args {args.optim_args!r}: expected key=value,key=value, such as num_iterations=3.")
    if args.lora is not None and args.lora < 1:
        raise ValueError(f"--lora {args.lora}: expected a rank of at least 1.")
    refuse_repeated_keys(args.optim_args)
    options = parse_options(args.optim, dict(pairs))
    config = load_config(args.model, trust_remote_code=args.trust_remote_code)
    model = build_model(config, Settings(lora=args.lora))
    groups = parameter_groups(model, options, lr=0.0, target_modules=args.target_modules)
    trained = f"{type(base_of(model)).__name__} of {args.model}, as it is trained with optim={args.optim}:"
    if getattr(config, "quantization_config", None):
        trained += "\nThe quantization that the config names is left out: quantised weights are frozen in a run."
    notes = list(assumptions(model, groups)) if args.target_modules is None else []
    table = [explain(groups, args.optim), "", describe(groups, args.optim, model)]
    return "\n".join([trained, "", *table, *(f"\n{note}" for note in notes)])


if __name__ == "__main__":
    sys.exit(main())

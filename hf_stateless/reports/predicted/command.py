"""`hf-stateless memory MODEL`: a table of what training a model takes, and which GPUs have enough memory."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from ...optimizer.option_kinds import LAYERWISE
from ...trainer.optim_args import parse_options, refuse_repeated_keys
from ..command_line import Parser, one_line
from ..run_facts import base_of, option_pairs
from .batch import example_batch, max_positions
from .estimate import estimate
from .limits import bounded
from .model import DTYPES, build_model, load_config
from .parallel import check_parallel, whole_numel
from .state import is_ours, known_in_parts, known_optimizers
from .table import GPUS, Settings, as_json, as_table, plot
from .zero import check_zero


_DEFAULT_OPTIMIZERS = ("sinkgd_layerwise", "swan_layerwise", "sinkgd", "swan", "adamw_bnb_8bit", "adamw_torch_fused")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="hf-stateless memory", description="Predict the memory of a training run.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="id on the Hub, folder with a config.json, or such a file")
    add(
        "--optim",
        help=f"names joined by commas (default {', '.join(_DEFAULT_OPTIMIZERS)}, less what the other flags rule out); "
        f"known: {', '.join(known_optimizers())}",
    )
    add("--optim-args", default="", help="key=value,key=value: options of ours, and rank of galore_adamw")
    add("--layerwise", action="store_true", help="let our optimizers update in backward")
    add("--dtype", default="bf16", help="bf16 (default), fp32, or int8 for 8-bit linear layers")
    add("--batch", type=_count, default=1, help="sequences per GPU (default 1)")
    add("--seq", type=_count, help=f"tokens per sequence (default {Settings.seq}, or as many as the model takes)")
    add("--checkpointing", action="store_true", help="activation checkpointing")
    add("--lora", type=_count, metavar="R", help="train LoRA adapters of rank R on all linear layers")
    add("--fsdp", type=_count, default=1, metavar="N", help="shard with FSDP2 over N GPUs")
    add(
        "--zero", type=int, choices=(1, 2, 3), default=0, metavar="STAGE", help="shard with DeepSpeed ZeRO-1, -2 or -3"
    )
    add("--ranks", type=_count, default=1, metavar="N", help="the GPUs of --zero")
    add("--tp", type=_count, default=1, metavar="N", help="cut matrices over N GPUs by the tp_plan of transformers")
    add("--ep", type=_count, default=1, metavar="N", help="spread experts over N of the GPUs of --fsdp and --tp")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where it would run (default cuda)")
    add("--gpus", help=f"their sizes in GiB joined by commas (default {','.join(f'{gib:g}' for gib in GPUS)})")
    add("--trust-remote-code", action="store_true", help="let a model of the Hub run its own code")
    add("--json", action="store_true", help="print JSON, all sizes in bytes")
    add("--plot", type=Path, metavar="FILE", help="also draw a picture, such as memory.png")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print what training a model takes; return 0, or 2 after one line on stderr that says what was wrong."""
    try:
        with bounded():
            args = _parser().parse_args(argv)
            found = _report(args)
            if args.plot:
                plot(found, args.plot)
            answer = json.dumps(found, indent=2) if args.json else as_table(found)
    except (ImportError, OSError, ValueError) as error:
        print(f"hf-stateless memory: {one_line(error, most=1500)}", file=sys.stderr)
        return 2
    print(answer)
    return 0


def report(argv: Sequence[str]) -> dict[str, Any]:
    """Return what `hf-stateless memory` prints with `--json`, for programs that show it in another way.

    Args:
        argv: the arguments of `hf-stateless memory`; those that change the output do nothing here.

    Raises:
        ValueError: what the command would say in one line.
        ImportError: the same, where a package is missing.
    """
    with bounded():
        return _report(_parser().parse_args(argv))


def _report(args: argparse.Namespace) -> dict[str, Any]:
    optim_args = _options(args.optim_args)
    gpus = _gpus(args.gpus)
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype}: expected {' or '.join(DTYPES)}.")
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    settings = Settings(**{**given, "seq": args.seq or Settings.seq})
    names = _names(args, settings, optim_args)
    check_zero(names, settings)
    check_parallel(names, settings)
    config = load_config(args.model, trust_remote_code=args.trust_remote_code)
    model = build_model(config, settings)
    if args.seq is None:
        settings = replace(settings, seq=min(settings.seq, max_positions(model) or settings.seq))
    estimates = estimate(model, names, settings, optim_args)
    return as_json(_facts(args.model, model, optim_args, settings, config), settings, estimates, gpus)


def _names(args: argparse.Namespace, settings: Settings, optim_args: Mapping[str, str]) -> list[str]:
    """Return the optimizers that are asked for; where none is, the usual ones that go with the other flags."""
    asked = _DEFAULT_OPTIMIZERS if args.optim is None else [name.strip() for name in args.optim.split(",")]
    if args.layerwise:
        asked = [name + LAYERWISE if is_ours(name) and not name.endswith(LAYERWISE) else name for name in asked]
    names = list(dict.fromkeys(asked))
    if args.optim is None:
        return _going_with(names, args, settings, optim_args)
    foreign = [name for name in names if not is_ours(name)]
    if foreign and settings.dtype == "int8":
        raise ValueError(f"--dtype int8: {foreign[0]} cannot train 8-bit weights; type --optim sinkgd,swan.")
    return names


def _going_with(
    names: list[str], args: argparse.Namespace, settings: Settings, optim_args: Mapping[str, str]
) -> list[str]:
    """Return those of the usual optimizers that the other flags do not rule out."""
    if settings.dtype == "int8":
        names = [name for name in names if is_ours(name)]
    if settings.zero or settings.tp * settings.ep > 1:
        names = known_in_parts(names)
    if settings.zero and not args.layerwise:  # typed, it is refused
        names = [name for name in names if not name.endswith(LAYERWISE)]
    refusing = [name for name in names if is_ours(name) and not _takes(name, optim_args)]
    # Options that none of ours takes are wrong: the prediction says how.
    return [name for name in names if name not in refusing] if any(map(is_ours, {*names} - {*refusing})) else names


def _takes(name: str, optim_args: Mapping[str, str]) -> bool:
    try:
        parse_options(name, optim_args)
    except ValueError:
        return False
    return True


def _options(text: str) -> dict[str, str]:
    pairs = option_pairs(text)
    if not all(key and value and "=" not in value for key, value in pairs):
        raise ValueError(f"--optim-args {text!r}: expected key=value,key=value, such as num_iterations=3.")
    refuse_repeated_keys(text)
    return dict(pairs)


def _gpus(text: str | None) -> Sequence[float]:
    if text is None:
        return sorted(GPUS)
    try:
        sizes = sorted({float(size) for size in text.split(",")})
    except ValueError:
        sizes = [0.0]
    if not all(0 < size < 1e6 for size in sizes):
        raise ValueError(f"--gpus {text!r}: expected sizes in GiB joined by commas, such as 24,80.")
    return sizes


def _facts(
    source: str, model: nn.Module, optim_args: Mapping[str, str], settings: Settings, config: Any
) -> dict[str, Any]:
    """Return what the report says about the model; of a local path only the last name, since reports are published."""
    notes = []
    if settings.fsdp > 1:
        notes.append("gathered: the layers that FSDP2 puts together, from a formula; step temporaries are of one GPU.")
    if settings.tp > 1:
        notes.append("Whitening puts whole matrices together: its temporary is that of one GPU.")
    if settings.ep > 1:
        notes.append("Activations of experts are those of one GPU that has all: tokens are taken to be spread evenly.")
    if settings.zero:
        notes.append("State has the float32 masters of ZeRO; its buckets (reduce_bucket_size) come on top.")
    if getattr(config, "quantization_config", None) and settings.dtype != "int8":
        notes.append(f"The quantization that the config names is left out: weights are taken in {settings.dtype}.")
    base, batch = base_of(model), example_batch(model, settings)
    params = list(model.parameters())
    path = Path(source).resolve()
    return {
        "model": path.parent.name if path.is_file() else path.name if path.is_dir() else source,
        "model_class": type(base).__name__,
        "has_tokens": "input_ids" in batch.inputs,
        "parameters": sum(map(whole_numel, params)),
        "trained_parameters": sum(whole_numel(p) for p in params if p.requires_grad),
        "optim_args": optim_args,
        "notes": [*notes, *batch.notes],
    }

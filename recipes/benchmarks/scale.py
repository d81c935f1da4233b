"""What the exchange and the whitening of one step cost beside training itself, on 8 to 4,096 cards: on paper.

    python recipes/benchmarks/scale.py --output results.json

Counted: bytes and collectives of a step of `sinkgd` and `swan` under FSDP2 over all cards, for the card that sends
most, by the rules of hf_stateless.ranks, and which card whitens how much. Stacks of experts are cut between experts
over as many cards as there are experts, and sent nowhere. Predicted: all times. Cards are H100 with 8,192 tokens each:
products at 990 TFLOP/s in the whitening, training at 400, bytes of memory at 3.0 TB/s, between cards at 360 GB/s in
one machine of 8 and at 45 from there on, 30 microseconds for each collective and 1 for each message of an all-to-all.
The table stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from result_files import write_results
from whitening_cost import ROWS, count

import hf_stateless
from hf_stateless.reports.predicted.wire import Shape, exchanged_bytes, exchanges, fsdp_bytes, sinkhorn_bytes


TRAINING, TOKENS = 400e12, 8192
IN_A_MACHINE, BETWEEN_MACHINES, MACHINE = 360e9, 45e9, 8
COLLECTIVE, MESSAGE = 30e-6, 1e-6
ITERATIONS = 5
"""Of `sinkgd`."""
CARDS = (8, 64, 512, 4096)


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape, of so many layers; each is a stack of experts where there are several."""

    shape: Shape
    count: int
    experts: int = 1


@dataclass(frozen=True)
class Model:
    """The matrices of a model, from its config, and the parameters that a token goes through."""

    stacks: tuple[Stack, ...]
    active: float


def llama(hidden: int, intermediate: int, layers: int, key_values: int, active: float) -> Model:
    """Return a LLaMA; its keys and values have so many rows."""
    shapes = [(hidden, hidden)] * 2 + [(key_values, hidden)] * 2
    shapes += [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    return Model(tuple(Stack(shape, times * layers) for shape, times in Counter(shapes).items()), active)


def experts(hidden: int, intermediate: int, layers: int, number: int) -> tuple[Stack, ...]:
    """Return the gates, the up and the down projections of so many experts."""
    return (
        Stack((intermediate, hidden), 2 * layers, number),
        Stack((hidden, intermediate), layers, number),
    )


MODELS = {
    "7B": llama(4096, 11008, 32, 4096, 6.7e9),
    "70B": llama(8192, 28672, 80, 1024, 69e9),
    "Qwen3-235B-A22B": Model(
        (
            Stack((8192, 4096), 94),
            Stack((512, 4096), 2 * 94),
            Stack((4096, 8192), 94),
            *experts(4096, 1536, 94, 128),
        ),
        22e9,
    ),
    "DeepSeek-V3": Model(
        (
            Stack((1536, 7168), 61),
            Stack((24576, 1536), 61),
            Stack((576, 7168), 61),
            Stack((32768, 512), 61),
            Stack((7168, 16384), 61),
            Stack((18432, 7168), 2 * 3),
            Stack((7168, 18432), 3),
            Stack((2048, 7168), 2 * 58),  # the shared expert
            Stack((7168, 2048), 58),
            *experts(7168, 2048, 58, 256),
        ),
        37e9,
    ),
}


def bandwidth(cards: int) -> float:
    """Return the bytes a second that a card sends to so many others."""
    return IN_A_MACHINE if cards <= MACHINE else BETWEEN_MACHINES


def exchanged(stacks: Sequence[Stack], cards: int) -> dict[str, float]:
    """Return what `swan` sends and whitens; the matrices of a stack of experts lie whole on their cards."""
    shapes = {stack.shape: stack.count for stack in stacks if stack.experts == 1}
    seconds, collectives = [0.0] * cards, 0
    for shape, owners in exchanges(shapes, cards):
        collectives += 1 if owners is None else 2
        for card, own in Counter(range(cards) if owners is None else owners).items():
            seconds[card] += own * whitening_seconds(shape)
    local = [stack for stack in stacks if stack.experts > 1]
    held = {stack: -(-stack.experts // min(cards, stack.experts)) * stack.count for stack in local}
    together = sum(count * whitening_seconds(stack.shape) for stack, count in held.items())
    most = max(exchanged_bytes(shapes, cards))
    return {"bytes": most, "collectives": collectives, "whitening": max(seconds) + together}


def summed(stacks: Sequence[Stack], cards: int) -> dict[str, float]:
    """Return what `sinkgd` sends: one ring each iteration."""
    shapes = {stack.shape: stack.count for stack in stacks if stack.experts == 1}
    return {"bytes": sinkhorn_bytes(shapes, cards, ITERATIONS), "collectives": ITERATIONS}


@cache
def whitening_seconds(shape: Shape) -> float:
    """Return the predicted time of one matrix on one card."""
    return count(ROWS["`swan`"], [shape]).seconds


def record(name: str, cards: int) -> dict[str, Any]:
    """Return one line of the table, and the numbers that it is made of."""
    model = MODELS[name]
    swan, sinkgd, rate = exchanged(model.stacks, cards), summed(model.stacks, cards), bandwidth(cards)
    weights = sum(s.count * s.shape[0] * s.shape[1] for s in model.stacks if s.experts == 1)
    fsdp = fsdp_bytes(2 * weights, 2 * weights, cards)
    training = 6 * model.active * TOKENS / TRAINING
    messages = swan["collectives"] * (cards - 1) * MESSAGE
    exchange = swan["bytes"] / rate + swan["collectives"] * COLLECTIVE + messages
    return {
        "model": name,
        "cards": cards,
        "training_seconds": training,
        "fsdp_gib": fsdp / 2**30,
        "sinkgd_mib": sinkgd["bytes"] / 2**20,
        "sinkgd_exchange_seconds": sinkgd["bytes"] / rate + sinkgd["collectives"] * COLLECTIVE,
        "swan_gib": swan["bytes"] / 2**30,
        "swan_part_of_fsdp": swan["bytes"] / fsdp,
        "swan_collectives": swan["collectives"],
        "swan_exchange_seconds": exchange,
        "swan_whitening_seconds": swan["whitening"],
        "swan_part_of_training": (exchange + swan["whitening"]) / training,
    }


def table(records: list[dict[str, Any]]) -> str:
    """Render the records as a Markdown table."""
    lines = [
        "| Model | Cards | Training | FSDP2 sends | `sinkgd` sends | in | `swan` sends | in | whitens in | together |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        times = [r[f"{key}_seconds"] * 1e3 for key in ("sinkgd_exchange", "swan_exchange", "swan_whitening")]
        lines.append(
            f"| {r['model']} | {r['cards']:,} | {r['training_seconds']:.1f} s | {r['fsdp_gib']:.1f} GiB "
            f"| {r['sinkgd_mib']:.0f} MiB | {times[0]:.1f} ms | {r['swan_gib']:.3f} GiB | {times[1]:.0f} ms "
            f"| {times[2]:.0f} ms | {r['swan_part_of_training']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, count, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cards", nargs="+", type=int, default=list(CARDS))
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    args = parser.parse_args()
    if min(args.cards) < 2:
        parser.error(f"--cards {min(args.cards)}: at least 2 are needed to send anything")
    records = [record(name, cards) for name in args.models for cards in args.cards]
    print(table(records))
    if args.output:
        setup = {"hf_stateless": hf_stateless.__version__, "how": "bytes and collectives counted, times predicted"}
        write_results(args.output, setup, records=records)


if __name__ == "__main__":
    main()

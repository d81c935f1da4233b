"""Pairs of questions and answers of a reasoning-gym task, for benchmarks that have to run without a download.

    python recipes/benchmarks/reasoning_pairs.py sorting --task word_sorting:min_words=4,max_words=5

Writes `train.jsonl` and `test.jsonl` with a `prompt` and a `completion` on each line. No question is in both.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from datasets import Dataset


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reasoning_tasks import InputError, ReasoningTasks, TaskArguments


def write(folder: Path, task: str, train: int, test: int) -> dict[str, int]:
    """Write both files and return how many pairs each has."""
    tasks = ReasoningTasks(TaskArguments(task=[task], train_size=train, eval_size=test, system_prompt=None))
    folder.mkdir(parents=True, exist_ok=True)
    sides: dict[str, Dataset] = {"train": tasks.train, "test": tasks.held_out}
    for name, side in sides.items():
        entries = [tasks.questions[number].entry for number in side["question"]]
        rows = [{"prompt": f"{entry['question'].strip()}\n", "completion": entry["answer"]} for entry in entries]
        part = folder / f"{name}.jsonl.part"
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        part.replace(folder / f"{name}.jsonl")
    return {name: len(side) for name, side in sides.items()}


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--task", default="word_sorting", help="NAME or NAME:KEY=VALUE,KEY=VALUE of reasoning-gym")
    parser.add_argument("--train", type=int, default=1000, help="different questions to train on")
    parser.add_argument("--test", type=int, default=200, help="different held-out questions")
    args = parser.parse_args()
    try:
        counts = write(args.output, args.task, args.train, args.test)
    except InputError as error:
        parser.error(str(error))
    print(", ".join(f"{name}: {count:,} pairs" for name, count in counts.items()))


if __name__ == "__main__":
    main()

"""Instruction pairs about words, made from WordNet's own files, for benchmarks that have to run without a download.

    python recipes/benchmarks/wordnet_pairs.py pairs --wordnet /usr/share/wordnet   # Debian: apt install wordnet-base

Writes `train.jsonl` and `test.jsonl` with a `prompt` and a `completion` on each line: definitions, example sentences
and synonyms. A word is in one of the files only, so that no answer about a test word is trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path


KINDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
TEST_SHARE = 50  # one word in so many is a test word


def senses(folder: Path) -> Iterator[tuple[str, list[str], str, list[str]]]:
    """Yield part of speech, words, definition and example sentences of each synset of WordNet's `data.*` files."""
    for suffix, kind in KINDS.items():
        for line in (folder / f"data.{suffix}").read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, _, gloss = line.partition(" | ")
            fields = fields.split()
            words = [
                re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            ]
            definition, *examples = gloss.strip().split('; "')
            yield kind, words, definition.strip(" ;"), [example.strip('"; ') for example in examples]


def pairs(folder: Path, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Yield word, prompt and completion."""
    for kind, words, definition, examples in senses(folder):
        word = rng.choice(words)
        if word[0].isupper() or len(definition.split()) < 3:
            continue
        article = "an" if kind.startswith("a") else "a"
        yield word, f'What does the {kind} "{word}" mean?', f'As {article} {kind}, "{word}" means: {definition}.'
        if examples:
            yield word, f'Use the {kind} "{word}" in a sentence.', examples[0][0].upper() + examples[0][1:]
        others = [other for other in words if other != word]
        if others:
            yield word, f'What is a synonym of the {kind} "{word}"?', ", ".join(others[:3])


def write(folder: Path, wordnet: Path, seed: int = 0) -> dict[str, int]:
    """Write both files, shuffled, and return how many pairs each has."""
    rng = random.Random(seed)
    rows = list(pairs(wordnet, rng))
    rng.shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, wanted in (("train", False), ("test", True)):
        lines = [
            json.dumps({"prompt": f"{prompt}\n", "completion": completion}, ensure_ascii=False) + "\n"
            for word, prompt, completion in rows
            if (zlib.crc32(word.lower().encode()) % TEST_SHARE == 0) == wanted
        ]
        part = folder / f"{name}.jsonl.part"
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(folder / f"{name}.jsonl")
        counts[name] = len(lines)
    return counts


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder of data.noun")
    args = parser.parse_args()
    if not (args.wordnet / "data.noun").is_file():
        parser.error(
            f"no data.noun in {args.wordnet}: install WordNet's files (apt install wordnet-base) or give --wordnet"
        )
    print(", ".join(f"{name}: {count:,} pairs" for name, count in write(args.output, args.wordnet).items()))


if __name__ == "__main__":
    main()

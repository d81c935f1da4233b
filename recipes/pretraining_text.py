"""Text for `pretrain.py`: where it comes from and which part of it is held out.

Text comes from one of three places, in this order:

* `--dataset_name`: a dataset on the Hub or a dataset folder, optionally streamed;
* `--train_files`: local text, JSON lines or parquet files (a text file is one document);
* neither: the sources and documentation of Python's standard library, which every installation already holds.
"""

import glob
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from hf_stateless.reports.command_line import first_line


Documents = Dataset | IterableDataset

# Data folders and near-duplicates (one table per code page) of the standard library, and what others installed there.
NOT_TEXT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}  # any other suffix is read as text
SHUFFLE_BUFFER = 10_000  # documents of a stream that are shuffled among each other
STREAM_HELD_OUT_DOCUMENTS = 5_000  # held out of a stream that has no validation split


class InputError(ValueError):
    """What the user asked for cannot be done; the message says what was got and what to type."""


@dataclass
class DataArguments:
    """Where the text comes from; without any of these it is Python's standard library."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub (`allenai/c4`) or the path of a dataset folder."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, such as `en`."})
    streaming: bool = field(default=False, metadata={"help": "Read `dataset_name` while training; needs max_steps."})
    train_files: list[str] | None = field(
        default=None,
        metadata={"help": "Local text, .jsonl or .parquet files; names or patterns such as `data/*.txt`."},
    )
    validation_files: list[str] | None = field(
        default=None, metadata={"help": "Held-out text; default: the validation split, else a part of the train text."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    held_out_fraction: float = field(
        default=0.05, metadata={"help": "Part of the documents held out where the data has no validation split."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer on the Hub or its folder; default: train one from the data."}
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Vocabulary of a trained tokenizer; default: that of the model config."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens in one training sequence."})
    max_eval_tokens: int = field(default=1_000_000, metadata={"help": "Evaluate on at most this many tokens."})

    def __post_init__(self):
        if self.dataset_name and self.train_files:
            raise InputError("Got both dataset_name and train_files: keep one of them.")
        if self.streaming and not self.dataset_name:
            raise InputError("streaming=True needs dataset_name; local files are read from disk as they are.")
        if not 0 < self.held_out_fraction < 1:
            raise InputError(f"Got held_out_fraction={self.held_out_fraction}, expected a number between 0 and 1.")
        if self.block_size < 2:
            raise InputError(f"Got block_size={self.block_size}, expected at least 2 tokens.")


def standard_library_files() -> list[str]:
    """Return the .py files of Python's standard library in a fixed order: about 11 MB of code and documentation."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (file.relative_to(root) for file in root.rglob("*.py"))
    return [
        str(root / file)
        for file in sorted(files)
        if NOT_TEXT.isdisjoint(file.parts) and not file.name.startswith("_sysconfigdata")
    ]


def load_documents(args: DataArguments) -> tuple[Documents, Documents]:
    """Return (train, held-out) documents with one column, `text`. No document is in both."""
    splits = _load_splits(args)
    if "train" not in splits:
        raise InputError(f"{args.dataset_name} has no split 'train'. Splits: {', '.join(splits)}.")
    train = _text_only(splits["train"], args)
    if "validation" in splits:
        held_out = _text_only(splits["validation"], args)
    else:
        train, held_out = hold_out(train, args.held_out_fraction)
    if args.streaming:  # after the split: the order differs from epoch to epoch
        train = train.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER)
    return train, held_out


def hold_out(documents: Documents, fraction: float) -> tuple[Documents, Documents]:
    """Split documents into (train, held-out); a single document is cut in two."""
    if isinstance(documents, IterableDataset):
        return documents.skip(STREAM_HELD_OUT_DOCUMENTS), documents.take(STREAM_HELD_OUT_DOCUMENTS)
    if len(documents) == 1:
        text = documents[0]["text"]
        cut = int(len(text) * (1 - fraction))
        return Dataset.from_dict({"text": [text[:cut]]}), Dataset.from_dict({"text": [text[cut:]]})
    parts = documents.train_test_split(test_size=max(1, round(len(documents) * fraction)), seed=0)
    return parts["train"], parts["test"]


def expand_files(patterns: Iterable[str]) -> list[str]:
    """Return the files that names or patterns stand for; refuse a name that stands for none."""
    files = []
    for pattern in patterns:
        found = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
        if not found:
            raise InputError(f"File not found: {pattern}")
        files += found
    if all(os.path.getsize(name) == 0 for name in files):
        raise InputError(f"No text: {', '.join(files[:3])} {'is' if len(files) == 1 else 'are'} empty.")
    return files


def _load_splits(args: DataArguments) -> dict[str, Documents]:
    if args.dataset_name:
        try:
            return load_dataset(args.dataset_name, args.dataset_config, streaming=args.streaming)
        except (OSError, ValueError, DatasetsError) as error:
            raise InputError(
                f"Cannot load the dataset {args.dataset_name!r}: {as_sentence(error)} Without a network, give local "
                "files with --train_files 'data/*.txt', or no data argument at all to train on Python's own library."
            ) from error
    patterns = {"train": args.train_files, "validation": args.validation_files}
    files = {split: expand_files(names) for split, names in patterns.items() if names}
    files.setdefault("train", standard_library_files())
    if not files["train"]:
        raise InputError("This Python has no library sources to train on: give --train_files 'data/*.txt'.")
    kinds = {_kind(name) for name in chain(*files.values())}
    if len(kinds) > 1:
        raise InputError(f"The local files are of several kinds ({', '.join(sorted(kinds))}): give one kind.")
    kind = kinds.pop()
    options = {"sample_by": "document", "encoding_errors": "replace"} if kind == "text" else {}
    try:
        return load_dataset(kind, data_files=files, **options)
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(
            f"Cannot read {files['train'][0]} as {kind}: {as_sentence(error.__cause__ or error)}"
        ) from error


def _kind(file: str) -> str:
    suffixes = Path(file).suffixes  # two of them in `part.jsonl.gz`
    return next((FORMATS[suffix] for suffix in suffixes if suffix in FORMATS), "text")


def _text_only(documents: Documents, args: DataArguments) -> Documents:
    columns = documents.column_names or list(next(iter(documents)))
    if args.text_column not in columns:
        raise InputError(f"No column {args.text_column!r}. Columns: {', '.join(columns)}. Set --text_column.")
    documents = documents.select_columns([args.text_column]).filter(bool, input_columns=args.text_column)
    if args.text_column != "text":
        documents = documents.rename_column(args.text_column, "text")
    first = next(iter(documents), None)
    if first is None:
        raise InputError(f"No text: every row of column {args.text_column!r} is empty.")
    if not isinstance(first["text"], str):
        raise InputError(f"Column {args.text_column!r} holds {type(first['text']).__name__}, expected text.")
    return documents


def as_sentence(error: BaseException) -> str:
    """Return the first line of what an error says, with a full stop."""
    return first_line(error).removesuffix(".") + "."

"""Rows for `sft.py` and `dpo.py`: where they come from, which part is held out, and whether they have the right form.

Rows come from one of four places, in this order:

* `datasets:` in the YAML file, TRL's mixture of several data sets;
* `--dataset_name`: a dataset on the Hub or a dataset folder;
* `--train_files`: local .json, .jsonl or .parquet files;
* none of them: questions and answers that reasoning-gym makes on the spot.
"""

import importlib.util
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from pretraining_text import InputError, as_sentence, expand_files
from reasoning_tasks import ReasoningTasks, TaskArguments
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset


Rows = Dataset | IterableDataset

HELD_OUT = 0.05  # of the rows, where neither a test split nor test_split_size says otherwise
STREAM_HELD_OUT = 500  # rows held out of a stream that has no test split
TEST_SPLITS = ("test", "validation")  # where `dataset_test_split` is not there
EXAMPLE_TASKS = [
    "chain_sum:min_terms=2,max_terms=3,min_digits=1,max_digits=2",
    "leg_counting:min_animals=2,max_animals=4",
    "syllogism",
]
# The columns of each kind of training, as TRL has them; the first that is there decides.
FORMS = {
    "sft": [{"messages"}, {"prompt", "completion"}, {"text"}, {"conversations"}, {"input_ids"}],
    "dpo": [{"chosen", "rejected"}],
}
_MESSAGES = 'messages: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'


@dataclass
class DataArguments(ScriptArguments):
    """Where the rows come from; without any of these they are made by reasoning-gym."""

    _argument_group_name = "data"

    train_files: list[str] | None = field(
        default=None, metadata={"help": "Local .json, .jsonl or .parquet files; names or patterns: `data/*.jsonl`."}
    )
    validation_files: list[str] | None = field(
        default=None, metadata={"help": "Held-out rows; default: the test split, else a part of the train rows."}
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on at most this many rows."})
    max_eval_rows: int = field(default=500, metadata={"help": "Evaluate on at most this many rows."})
    example_rows: int = field(default=2000, metadata={"help": "Rows that are made where no data is named."})
    example_tasks: list[str] = field(
        default_factory=lambda: list(EXAMPLE_TASKS),
        metadata={"help": "Tasks of reasoning-gym that they are made of, as in grpo.py: chain_sum:max_digits=1"},
    )

    def __post_init__(self):
        if self.dataset_name and self.train_files:
            raise InputError("Got both dataset_name and train_files: keep one of them.")
        if self.validation_files and not self.train_files:
            raise InputError("Got validation_files without train_files.")
        for name in ("max_train_rows", "max_eval_rows", "example_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"Got {name}={value}, expected at least 1.")


def load_rows(
    task: str, args: DataArguments, mixture: DatasetMixtureConfig, text_column: str = "text"
) -> tuple[Rows, Rows]:
    """Return (train, held-out) rows for `task`, `sft` or `dpo`. No row is in both."""
    if not (mixture.datasets or args.dataset_name or args.train_files):
        parts = example_rows(task, args.example_rows, args.example_tasks)
    else:
        parts = split_rows(_load_splits(args, mixture), args, mixture.test_split_size)
    train, held_out = _head(parts[0], args.max_train_rows), _head(parts[1], args.max_eval_rows)
    for rows in (train, held_out):
        check_form(rows, task, text_column)
    return train, held_out


def split_rows(splits: DatasetDict, args: DataArguments, test_size: float | None) -> tuple[Rows, Rows]:
    """Return (train, held-out) rows: two splits where there are two, else two parts of one."""
    name = args.dataset_train_split
    if name not in splits:
        raise InputError(f"No split {name!r}. Splits: {', '.join(splits)}. Set --dataset_train_split.")
    train = splits[name]
    for other in (args.dataset_test_split, *TEST_SPLITS):
        if other in splits and other != name and test_size is None:
            return train, splits[other]
    if isinstance(train, IterableDataset):
        return train.skip(STREAM_HELD_OUT), train.take(STREAM_HELD_OUT)
    test_size = HELD_OUT if test_size is None else test_size
    if not 0 < test_size < 1:
        raise InputError(f"Got test_split_size={test_size}, expected a number between 0 and 1.")
    if len(train) < 2:
        raise InputError(f"Got {len(train)} row, expected at least two: one to train on and one to hold out.")
    parts = train.train_test_split(test_size=min(max(1, round(len(train) * test_size)), len(train) - 1), seed=0)
    return parts["train"], parts["test"]


def example_rows(task: str, count: int, names: Sequence[str] = EXAMPLE_TASKS) -> tuple[Dataset, Dataset]:
    """Return (train, held-out) questions with their answers; no question is in both. For `dpo` a wrong answer too.

    `grpo.py` holds out the same questions of the tasks `names`.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise InputError(
            "No data: give --train_files FILE.jsonl or --dataset_name NAME, or pip install reasoning-gym, "
            "which makes questions on the spot."
        )
    held_out = max(2, len(names), round(count * HELD_OUT))
    sizes = {"train_size": count, "eval_size": held_out, "system_prompt": None}
    tasks = ReasoningTasks(TaskArguments(task=list(names), **sizes))
    answers = [question.entry["answer"] for question in tasks.questions]
    of_task = defaultdict(set)
    for question, answer in zip(tasks.questions, answers, strict=True):
        of_task[question.task].add(answer)
    rng = random.Random(0)

    def answered(row: dict) -> dict:
        right = answers[row["question"]]
        if task == "sft":
            return {"completion": _answer(right)}
        wrong = sorted(of_task[tasks.questions[row["question"]].task] - {right})
        return {"chosen": _answer(right), "rejected": _answer(rng.choice(wrong))}

    parts = []
    for part in (tasks.train, tasks.held_out):
        rows = [{"prompt": row["prompt"], **answered(row)} for row in part]
        rng.shuffle(rows)
        parts.append(Dataset.from_list(rows))
    return parts[0], parts[1]


def describe_rows(args: DataArguments, mixture: DatasetMixtureConfig) -> dict[str, object]:
    """Return what the model card says about the rows."""
    names = [part.path for part in mixture.datasets] or ([args.dataset_name] if args.dataset_name else [])
    on_hub = [name for name in names if name.count("/") == 1 and not os.path.exists(name)]
    if names or args.train_files:
        data = "The data are " + (", ".join(on_hub) or "local files") + "."
    else:
        tasks = ", ".join(task.partition(":")[0] for task in args.example_tasks)
        data = f"The data are questions that reasoning-gym made ({tasks})."
    return {"datasets": on_hub, "data": data}


def check_form(rows: Rows, task: str, text_column: str = "text") -> None:
    """Refuse rows without the columns of `task`, empty ones, and chats that are not lists of messages."""
    first = next(iter(rows), None)
    if first is None:
        raise InputError("No rows: the data is empty.")
    forms = [*FORMS[task], {text_column}] if task == "sft" else FORMS[task]
    form = next((form for form in forms if form <= first.keys()), None)
    if form is None:
        expected = " or ".join("+".join(sorted(form, reverse=True)) for form in FORMS[task][:3])
        raise InputError(f"Got the columns {', '.join(first)}; expected {expected}.")
    prompts = {"prompt"} & first.keys() if task == "dpo" else set()  # which may be part of both answers
    for column in sorted((form | prompts) - {"input_ids", "conversations"}):
        values = _column(rows, column) if isinstance(rows, Dataset) else [first[column]]  # of a stream the first only
        bad = [value for value in values if not _is_read(value, column, text_column)]
        if bad:
            expected = {text_column: "text.", "messages": _MESSAGES}.get(column, f"text or {_MESSAGES}")
            line = f"Column {column!r} holds {str(bad[0])[:60]!r}, expected {expected}"
            if isinstance(rows, Dataset):
                line += f" {len(bad)} of {len(rows)} rows are like this: leave them out."
            raise InputError(line)


def _column(rows: Dataset, column: str) -> Iterator[object]:
    """Yield the values of a column, read in batches: one by one takes four times as long."""
    for batch in rows.select_columns(column).iter(1000):
        yield from batch[column]


def _is_read(value: object, column: str, text_column: str) -> bool:
    """Tell whether TRL can read a value: text or, but in the column of texts, turns that say something each."""
    if isinstance(value, str):
        return column == text_column or column != "messages"
    return column != text_column and isinstance(value, list) and bool(value) and all(map(_says_something, value))


def _says_something(turn: object) -> bool:
    return isinstance(turn, dict) and "role" in turn and any(turn[key] is not None for key in turn.keys() - {"role"})


def _load_splits(args: DataArguments, mixture: DatasetMixtureConfig) -> DatasetDict:
    if not (mixture.datasets or args.dataset_name):
        patterns = {args.dataset_train_split: args.train_files, args.dataset_test_split: args.validation_files}
        files = {split: expand_files(names) for split, names in patterns.items() if names}
        kinds = {_kind(file) for names in files.values() for file in names}
        if len(kinds) > 1:
            raise InputError("The local files are of several kinds (json, parquet): give one kind.")
        source, options = kinds.pop(), {"data_files": files}
    else:
        source, options = args.dataset_name, {"name": args.dataset_config, "streaming": args.dataset_streaming}
    try:
        if mixture.datasets:
            # TRL's own split is drawn anew in every process and every resumed run.
            return get_dataset(replace(mixture, test_split_size=None))
        return load_dataset(source, **options)
    except (OSError, ValueError, DatasetsError) as error:
        what = "datasets" if mixture.datasets else args.dataset_name or ", ".join(args.train_files)
        raise InputError(
            f"Cannot load {what}: {as_sentence(error.__cause__ or error)} Without a network, give local files with "
            "--train_files 'data/*.jsonl'."
        ) from error


def _kind(file: str) -> str:
    for suffix, kind in ((".jsonl", "json"), (".json", "json"), (".parquet", "parquet")):
        if file.endswith((suffix, f"{suffix}.gz")):
            return kind
    raise InputError(f"Got the file {file}, expected a name that ends in .jsonl, .json or .parquet.")


def _head(rows: Rows, count: int | None) -> Rows:
    return rows if count is None else rows.take(count)


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]

"""Questions of reasoning-gym for `grpo.py`: train and held-out questions, their prompts, and rewards by verifiers.

Which side a question is on follows from a hash of its text. A question held out in one run is held out in every run,
whatever the seed and the sizes.
"""

import difflib
import hashlib
import importlib.util
import re
from dataclasses import dataclass, field, fields
from typing import Any

import yaml
from datasets import Dataset
from pretraining_text import InputError


HELD_OUT_PART = 0.25  # of all question texts; a task with few different questions loses this part of its train set
DRAWS_PER_QUESTION = 50  # questions drawn for each one wanted, before a task counts as too small
NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?")

Completions = list[str] | list[list[dict[str, str]]]


@dataclass
class TaskArguments:
    """Which questions are asked, and what counts as an answer."""

    _argument_group_name = "tasks"

    task: list[str] = field(
        default_factory=lambda: ["chain_sum"],
        metadata={
            "help": "Tasks of reasoning-gym, perhaps with options: chain_sum:max_terms=3,max_digits=1 leg_counting"
        },
    )
    train_size: int = field(default=1000, metadata={"help": "Different questions trained on, over all tasks."})
    eval_size: int = field(default=200, metadata={"help": "Different held-out questions, over all tasks."})
    task_seed: int = field(default=0, metadata={"help": "Seed of the questions."})
    system_prompt: str | None = field(
        default="Answer with the final answer only.", metadata={"help": "Put before each question; empty for none."}
    )
    answer_tag: str | None = field(
        default=None, metadata={"help": "Score what stands in <TAG></TAG>; default: score the whole completion."}
    )
    eval_samples: int = field(
        default=0, metadata={"help": "Completions sampled for each held-out question; 0 for a single greedy one."}
    )

    def __post_init__(self):
        self.task = [self.task] if isinstance(self.task, str) else self.task
        for name, least in (("train_size", 1), ("eval_size", 2), ("task_seed", 0), ("eval_samples", 0)):
            if getattr(self, name) < least:
                raise InputError(f"Got {name}={getattr(self, name)}, expected at least {least}.")


@dataclass(frozen=True)
class Question:
    """One question with the task that scores its answers."""

    task: Any
    """The reasoning-gym data set; `score_answer` is its verifier."""
    entry: dict[str, Any]
    """What the task made: `question`, `answer`, `metadata`."""


class ReasoningTasks:
    """Questions by number, the two sides of the split, and the two rewards.

    `train` and `held_out` are data sets as `GRPOTrainer` takes them; their column `question` holds numbers.
    """

    def __init__(self, args: TaskArguments):
        self.args = args
        self.questions: list[Question] = []
        train: list[int] = []
        held_out: list[int] = []
        seen: set[str] = set()
        for i, text in enumerate(args.task):
            sizes = [_share(size, i, len(args.task)) for size in (args.train_size, args.eval_size)]
            task = make_task(text, args.task_seed, DRAWS_PER_QUESTION * sum(sizes))
            sides: tuple[list[int], list[int]] = ([], [])
            for entry in (task[index] for index in range(len(task))):
                side = is_held_out(entry["question"])
                if entry["question"] not in seen and len(sides[side]) < sizes[side]:
                    seen.add(entry["question"])
                    sides[side].append(len(self.questions))
                    self.questions.append(Question(task, entry))
                if [len(found) for found in sides] == sizes:
                    break
            else:
                raise InputError(
                    f"{text} gave {len(sides[0])} train and {len(sides[1])} held-out different questions in "
                    f"{len(task)} draws, expected {sizes[0]} and {sizes[1]}: lower --train_size and --eval_size, "
                    "or widen the options of the task."
                )
            train += sides[0]
            held_out += sides[1]
        self.train, self.held_out = self._dataset(train), self._dataset(held_out)

    def _dataset(self, numbers: list[int]) -> Dataset:
        opening = [{"role": "system", "content": self.args.system_prompt}] if self.args.system_prompt else []
        questions = [self.questions[number].entry["question"] for number in numbers]
        prompts = [[*opening, {"role": "user", "content": question}] for question in questions]
        return Dataset.from_dict({"prompt": prompts, "question": numbers})

    def answer(self, completion: str) -> str | None:
        """Return the part of a completion that is scored, or None where it lacks the tag."""
        if not self.args.answer_tag:
            return completion.strip()
        tag = re.escape(self.args.answer_tag)
        found = re.findall(f"<{tag}>(.*?)</{tag}>", completion, flags=re.DOTALL)
        return found[-1].strip() if found else None

    def verifier_reward(self, completions: Completions, question: list[int], **kwargs: Any) -> list[float]:
        """Return the score of each answer by the verifier of its task, from 0 to 1."""
        return [
            score(self.questions[number], self.answer(text))
            for text, number in zip(map(_text, completions), question, strict=True)
        ]

    def format_reward(self, completions: Completions, question: list[int], **kwargs: Any) -> list[float]:
        """Return 1 where an answer has the shape of the true one, right or wrong: a number, or as many words."""
        return [
            float(has_shape(self.answer(text), self.questions[number].entry["answer"]))
            for text, number in zip(map(_text, completions), question, strict=True)
        ]


def score(question: Question, answer: str | None) -> float:
    """Return what the verifier of the task gives for an answer."""
    try:
        return float(question.task.score_answer(answer, question.entry))
    except Exception:  # some verifiers raise at an answer that they cannot parse: prime_factorization, boxnet
        return 0.0


def is_held_out(question: str) -> bool:
    """Return which side a question text is on, by its hash."""
    return hashlib.sha256(question.encode()).digest()[0] < 256 * HELD_OUT_PART


def has_shape(answer: str | None, truth: str) -> bool:
    """Return whether an answer is a number where the true answer is one, else whether it has as many words."""
    if answer is None:
        return False
    if NUMBER.fullmatch(truth.strip()):
        return NUMBER.fullmatch(answer) is not None
    return len(answer.split()) == len(truth.split())


def make_task(text: str, seed: int, size: int) -> Any:
    """Make a reasoning-gym data set of `size` draws from `NAME` or `NAME:KEY=VALUE,KEY=VALUE`."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise InputError('The tasks come from reasoning-gym: pip install -e ".[grpo]"')
    from reasoning_gym import create_dataset
    from reasoning_gym.factory import DATASETS

    name, _, options_text = text.partition(":")
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        raise InputError(
            f"Unknown task {name!r}, expected one of the {len(DATASETS)} of reasoning-gym."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    known = {option.name for option in fields(DATASETS[name][1])} - {"seed", "size"}
    options = {}
    for part in re.split(r",(?=\w+=)", options_text) if options_text else []:
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            raise InputError(f"Got {part!r} in --task {text}, expected KEY=VALUE of: {', '.join(sorted(known))}.")
        options[key] = yaml.safe_load(value)
    try:
        return create_dataset(name, seed=seed, size=size, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"{name} refuses the options of --task {text}: {error}") from error


def _share(size: int, i: int, parts: int) -> int:
    return size // parts + (i < size % parts)


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]

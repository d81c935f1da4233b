"""Trains and pushes tiny models in a process that takes `HubServer` for the Hub; `Worker` sends it the work.

huggingface_hub reads its variables when it is imported, and the tests themselves run offline. One process serves
several tests, because importing takes longer than the work.
"""

import contextlib
import inspect
import io
import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock


class Worker:
    """A process that runs the functions of this file: `worker.train_and_push("runs/a", ...)`."""

    def __init__(self, hub, folder, **environment):
        command = [sys.executable, __file__]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=folder, env=hub.environment(**environment), **streams)

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.process.stdin.write(json.dumps([name, args, kwargs]) + "\n")
            self.process.stdin.flush()
            result, error = json.loads(self.process.stdout.readline())
            assert error is None, error
            return result

        return call

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def _wide_model(width):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes))


def _trainer(output_dir, kind, base, later, options):
    import torch
    from conftest import TINY_MODELS
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    import hf_stateless
    from hf_stateless.reports.card.pushing import repository_later

    torch.manual_seed(0)
    common = {
        "output_dir": output_dir,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "optim": "sinkgd",
    }
    model = AutoModelForCausalLM.from_pretrained(base) if base else TINY_MODELS["llama"]()
    model = _wide_model(options.pop("width")) if "width" in options else model
    tokens = list(range(3, 19))
    if kind == "int8":
        model = hf_stateless.quantize(model, hf_stateless.Int8TrainingConfig(16))
    if kind in ("trainer", "int8"):
        rows = Dataset.from_list([{"input_ids": tokens, "labels": tokens}] * 8)
        args = TrainingArguments(**{**common, **options})
        with repository_later(args) if later else contextlib.nullcontext():
            return Trainer(model, args, train_dataset=rows, data_collator=default_data_collator)
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": tokens}] * 8)
    args = SFTConfig(**{**common, "gradient_checkpointing": False, "bf16": False, **options})
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    return SFTTrainer(model, args, train_dataset=rows, processing_class=tiny_tokenizer(), peft_config=lora)


def tiny_tokenizer():
    """A tokenizer of 96 whole words, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(92))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def train_and_push_without_variable(*args, **kwargs):
    """Do as `train_and_push` does where the token is among the arguments only."""
    with mock.patch.dict(os.environ):
        del os.environ["HF_TOKEN"]
        return train_and_push(*args, **kwargs)


def train_and_push_impatiently(*args, silence=0.5, longest_wait=0.2, implicit_token=True, **kwargs):
    """Do as `train_and_push` does with shorter waits; `implicit_token=False` forbids tokens that are no argument."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    from hf_stateless.reports.card import during_training, hub_client, push_command

    before = _http._GLOBAL_CLIENT_FACTORY
    bounds = {"SILENCE": silence, "LONGEST_WAIT": longest_wait}
    slept = []
    with (
        mock.patch.multiple(hub_client, **bounds),
        mock.patch.object(during_training, "WAITS", (0.1,)),
        mock.patch.object(push_command, "WAITS", (0.1,)),
        mock.patch.object(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", not implicit_token),
        mock.patch.object(_http.time, "sleep", lambda seconds: slept.append(seconds)),
    ):
        set_client_factory(_http.default_client_factory)
        try:
            message = train_and_push(*args, **kwargs)
        finally:
            set_client_factory(before)
    return message, slept


def train_and_hear(*args, **kwargs):
    """Do as `train_and_push_impatiently` does; return its message and what was logged about pushes."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("hf_stateless.reports.card")
    logger.addHandler(handler)
    tables = mock.patch("builtins.print", lambda *texts, **_: heard.append(" ".join(map(str, texts))))
    try:
        with tables:
            message, _ = train_and_push_impatiently(*args, **kwargs)
    finally:
        logger.removeHandler(handler)
    return message, heard


def command(*arguments):
    """Type `hf-stateless` with these arguments; return its status, stdout and stderr."""
    from hf_stateless.reports.card import push_command
    from hf_stateless.run.command import main as hf_stateless

    told, complained = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(complained),
        mock.patch.object(push_command, "WAITS", (0.1,)),
    ):
        status = hf_stateless(list(arguments))
    return status, told.getvalue(), complained.getvalue()


def plant(files, links=()):
    """Write files by name and make links."""
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    for name, target in links:
        Path(name).symlink_to(target)


def train_and_push(
    output_dir, kind="trainer", base=None, way="ours", times=1, waits=(0.1,), later=False, asked=(), **options
):
    """Train two steps and push; return the message of a `PushError`, or None.

    `later` makes the repository as the recipes do; `asked` is for `attach_push`.
    """
    from hf_stateless import attach_memory_report
    from hf_stateless.reports.card.attach import attach_model_card, save
    from hf_stateless.reports.card.during_training import attach_push
    from hf_stateless.reports.card.pushing import PushError, create_repository, push

    try:
        trainer = _trainer(output_dir, kind, base, later, options)
        attach_memory_report(trainer)
        attach_model_card(trainer, datasets=["someone/counting"])
        if asked:
            attach_push(trainer, **asked)
        create_repository(trainer, waits=waits)
        trainer.train()
        for _ in range(times):
            if way == "ours":
                save(trainer)
                push(trainer, waits=waits)
            else:
                trainer.push_to_hub()
    except PushError as error:
        return str(error)
    return None


def resume(output_dir, checkpoint, **options):
    """Train on from a checkpoint; return the step that was reached."""
    trainer = _trainer(output_dir, "trainer", None, False, options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.state.global_step


def save_base(folder):
    """Save the tiny model and its tokenizer with a card that names a licence."""
    from conftest import TINY_MODELS

    TINY_MODELS["llama"]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    Path(folder, "README.md").write_text("---\nlicense: mit\n---\n# Base\n", encoding="utf-8")


def push_base(folder, repository):
    """Push a folder with nothing but huggingface_hub."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repository, exist_ok=True)
    HfApi().upload_folder(repo_id=repository, folder_path=folder)


def equal_to_disk(repository, folder, adapter=False, in_8_bits=False):
    """Load a model from the Hub and from disk, and tell whether all tensors are equal."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    from hf_stateless import Int8TrainingConfig

    loader = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    options = {"quantization_config": Int8TrainingConfig()} if in_8_bits else {}
    pushed, local = (loader.from_pretrained(place, **options).state_dict() for place in (repository, folder))
    return pushed.keys() == local.keys() and all(torch.equal(pushed[name], local[name]) for name in pushed)


def card(repository):
    """Return the metadata of the card on the Hub after huggingface_hub has validated it."""
    from huggingface_hub import ModelCard

    loaded = ModelCard.load(repository)
    loaded.validate()
    return loaded.data.to_dict()


def main():
    answers, sys.stdout = sys.stdout, sys.stderr
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    functions = {name: value for name, value in globals().items() if inspect.isfunction(value)}
    for line in sys.stdin:
        name, args, kwargs = json.loads(line)
        try:
            answer = [functions[name](*args, **kwargs), None]
        except Exception:
            answer = [None, traceback.format_exc()]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

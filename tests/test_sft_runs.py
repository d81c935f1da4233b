"""The fine-tuning recipes: runs as a user starts them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documents import card_commands
from int8_folders import load_int8_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


pytest.importorskip("trl")
import dpo
import finetuning_model
import sft
from finetuning_place import RECIPES, RUN, answer, question, run_in_process
from peft import AutoPeftModelForCausalLM

from hf_stateless import Int8TrainingConfig


pytest_plugins = ["finetuning_place"]

# PEFT and TRL still ask transformers for the older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
ADAPTERS = {
    "full": "",
    "LoRA": "--use_peft --lora_r 4 ",
    "8-bit LoRA": "--use_peft --lora_r 4 --load_in_8bit ",
    "4-bit LoRA": "--use_peft --lora_r 4 --load_in_4bit ",
}


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
    start, trained = start.state_dict(), load_int8_folder("out").state_dict()
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


@pytest.mark.parametrize("card", card_commands("sft.py"))
def test_the_command_of_a_card_trains(card, workplace, monkeypatch, capsys):
    typed = shlex.join(card_commands("sft.py")[card])
    run_in_process(sft, f"{typed} {RUN} --train_files chats.jsonl --max_steps 1", monkeypatch)
    assert "after 1 steps" in capsys.readouterr().out
    assert Path("out/memory_report.json").is_file()

"""Scripts that do not import the package train with its names, under launchers and by TRL's entry points."""

import json
import sys

import pytest
from interpreters import CLI, RUN, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


pytest_plugins = ["interpreters"]


TRAIN = """
    import json, os, sys
    import torch
    from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    def main():
        args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(32, (16, 8)).tolist()]
        trainer = Trainer(model, args, train_dataset=rows)
        loss = trainer.train().training_loss
        found = [args.world_size, type(trainer.optimizer.optimizer).__name__, trainer.state.global_step, loss > 0]
        with open(f"rank{args.process_index}.json", "w") as file:
            json.dump(found, file)

    if __name__ == "__main__":
        main()
    """
TRAIN_FLAGS = (
    "--output_dir out --optim sinkgd --max_steps 2 --per_device_train_batch_size 2 --use_cpu --report_to none"
)
# Port 0 is any free one.
TWO_PROCESSES = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *RUN],
        ["-m", *TWO_PROCESSES, *RUN],
        [*CLI, "run", sys.executable, "-m", *TWO_PROCESSES],
    ],
    ids=["torchrun", "accelerate", "command"],
)
def test_two_processes_train_under_a_launcher(tmp_path, python, launcher):
    write(tmp_path, {"script.py": TRAIN})
    for _ in range(3):  # a thread of gloo, still alive at exit, now and then aborts a process that has done its work
        done = python(*launcher, "script.py", *TRAIN_FLAGS.split(), CUDA_VISIBLE_DEVICES="")
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [[2, "StatelessOptimizer", 2, True]] * 2


SFT_FLAGS = (
    "--model_name_or_path model --dataset_name data --output_dir out --optim sinkgd --optim_args num_iterations=2 "
    "--max_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-2 --logging_steps 1 --save_strategy no "
    "--bf16 false --use_cpu --report_to none"
)


@pytest.fixture
def tiny_sft(tmp_path):
    """What `SFT_FLAGS` name: a model with its tokenizer, and a data set."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=1, **sizes)).save_pretrained(tmp_path / "model")
    rows = [json.dumps({"text": " ".join(words[3 + (i + j) % 29] for j in range(8))}) for i in range(16)]
    write(tmp_path, {"data/train.jsonl": "\n".join(rows)})


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [[*CLI, "run", sys.executable, "-m", "trl.cli.main", "sft"], [*RUN, "-m", "trl.scripts.sft"]],
    ids=["trl sft", "trl.scripts.sft"],
)
def test_trl_trains_by_its_own_entry_points(tmp_path, python, tiny_sft, launcher):
    before = LlamaForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    done = python(*launcher, *SFT_FLAGS.split(), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    after = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    matrices = [name for name in before if name.endswith("proj.weight")]
    assert matrices
    assert all((after[name] - before[name]).abs().max() > 0 for name in matrices)

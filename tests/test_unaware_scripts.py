"""Scripts that do not import hf_stateless train with TRL and transformers, in one process and in two."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from datasets import Dataset
from tiny_models import CHATS, WORDS, changed, save_chat_model
from transformers import AutoModelForCausalLM

from hf_stateless import PRESETS


peft = pytest.importorskip("peft")

# TRL asks for gradient checkpointing by the name that transformers is about to give up.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


SFT_SCRIPT = """
    import sys

    from datasets import load_dataset
    from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

    def main():
        script, args, model = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config()
        dataset = load_dataset("json", data_files=script.dataset_name, split="train")
        trainer = SFTTrainer(
            model.model_name_or_path, args=args, train_dataset=dataset, peft_config=get_peft_config(model)
        )
        trainer.train()
        trainer.save_model(args.output_dir)
        # In one write: the processes share their standard output, and print writes each of its arguments on its own.
        sys.stdout.write(f"world {args.world_size} {args.optim!s}\\n")

    if __name__ == "__main__":
        main()
    """
SFT_CONFIG = """
    dataset_name: chats.jsonl
    output_dir: out
    optim: sinkgd
    optim_args: num_iterations=2
    learning_rate: 1.0e-2
    use_peft: true
    lora_r: 2
    lora_dropout: 0.0
    max_steps: 2
    save_steps: 2
    use_cpu: true
    bf16: false
    gradient_checkpointing: false
    report_to: none
    """
# In the manner of run_clm.py of transformers: three groups of arguments, text cut into blocks, resumed by itself.
CLM_SCRIPT = """
    import math, os, sys
    from dataclasses import dataclass, field
    from datasets import load_dataset
    from transformers import (
        AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments,
        default_data_collator, set_seed,
    )
    from transformers.trainer_utils import get_last_checkpoint

    @dataclass
    class ModelArguments:
        model_name_or_path: str | None = field(default=None)

    @dataclass
    class DataTrainingArguments:
        train_file: str | None = field(default=None)
        validation_file: str | None = field(default=None)
        block_size: int = field(default=8)

    def main():
        parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
        set_seed(training_args.seed)
        checkpoint = get_last_checkpoint(training_args.output_dir) if os.path.isdir(training_args.output_dir) else None
        files = {"train": data_args.train_file, "validation": data_args.validation_file}
        raw = load_dataset("text", data_files=files)
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        config = AutoConfig.from_pretrained(model_args.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, config=config)

        def group(examples):
            joined = sum(tokenizer(examples["text"])["input_ids"], [])
            size = data_args.block_size
            blocks = [joined[i : i + size] for i in range(0, len(joined) // size * size, size)]
            return {"input_ids": blocks, "labels": blocks}

        with training_args.main_process_first():
            data = raw.map(group, batched=True, remove_columns="text")
        trainer = Trainer(
            model=model,
            args=training_args,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            processing_class=tokenizer,
            data_collator=default_data_collator,
        )
        if training_args.do_train:
            result = trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model()
            trainer.log_metrics("train", result.metrics)
            trainer.save_metrics("train", result.metrics)
            trainer.save_state()
        if training_args.do_eval:
            metrics = trainer.evaluate()
            metrics["perplexity"] = math.exp(metrics["eval_loss"])
            trainer.save_metrics("eval", metrics)
        trainer.create_model_card(model_name="model", tasks="text-generation")
        print("from", checkpoint, "to", trainer.state.global_step)

    if __name__ == "__main__":
        main()
    """
RUN = ["-m", "hf_stateless.run"]
COMMAND = ["-m", "hf_stateless.run.command", "run", sys.executable]
# Port 0 is any free one.
TWO_PROCESSES = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture
def workplace(tmp_path):
    """`workplace(*arguments)` starts Python in a folder with scripts, a model and data; returns what it printed."""
    for name, text in {"sft.py": SFT_SCRIPT, "sft.yaml": SFT_CONFIG, "run_clm.py": CLM_SCRIPT}.items():
        assert "hf_stateless" not in text
        (tmp_path / name).write_text(textwrap.dedent(text))
    save_chat_model(tmp_path / "model")
    Dataset.from_list(CHATS).to_json(tmp_path / "chats.jsonl")
    (tmp_path / "text.txt").write_text("\n".join(" ".join(WORDS[i % 20 :]) for i in range(20)))

    def start(*arguments):
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**inherited, **own, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    start.folder = tmp_path
    return start


def saved_groups(checkpoint):
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]


@pytest.mark.slow
def test_a_trl_script_trains_the_same_adapters_in_one_process_and_in_two(workplace):
    for launcher, output, size, world in ((RUN, "one", "2", "1"), ([*TWO_PROCESSES, *RUN], "two", "1", "2")):
        flags = ["--output_dir", output, "--per_device_train_batch_size", size]
        # The adapter's config names the model, which is read from another folder below.
        flags += ["--model_name_or_path", str(workplace.folder / "model")]
        printed = workplace(*launcher, "sft.py", "--config", "sft.yaml", *flags)
        assert printed.count(f"world {world} OptimizerNames.SINKGD") == int(world)
        assert printed.count("optim=sinkgd updates ") == 1
        (group,) = saved_groups(workplace.folder / output / "checkpoint-2")
        assert (group["norms"], group["num_iterations"]) == (PRESETS["sinkgd"].norms, 2)
    one, two = (
        peft.AutoPeftModelForCausalLM.from_pretrained(workplace.folder / output).state_dict()
        for output in ("one", "two")
    )
    assert any(value.abs().max() > 0 for name, value in one.items() if "lora_B" in name)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


CLM_FLAGS = (
    "--model_name_or_path model --train_file text.txt --validation_file text.txt --output_dir out --do_train "
    "--do_eval --optim swan --learning_rate 1e-2 --per_device_train_batch_size 2 --max_steps 2 --save_steps 2 "
    "--use_cpu --report_to none"
)


@pytest.mark.slow
def test_a_script_in_the_manner_of_run_clm_trains(workplace):
    assert "from None to 2" in workplace(*COMMAND, "run_clm.py", *CLM_FLAGS.split())
    out = workplace.folder / "out"
    assert saved_groups(out / "checkpoint-2")[0]["norms"] == PRESETS["swan"].norms
    assert (out / "eval_results.json").exists()
    before = AutoModelForCausalLM.from_pretrained(workplace.folder / "model").state_dict()
    assert changed(AutoModelForCausalLM.from_pretrained(out).state_dict(), before) == set(before)

"""Fine-tuning with TRL and PEFT: every trainer saves, loads and resumes to the bit; adapters of every kind train."""

import contextlib
import functools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from datasets import Dataset
from tiny_models import (
    CHATS,
    PREFERENCES,
    PROMPTS,
    TOKEN_ROWS,
    WORDS,
    bits_and_bytes,
    changed,
    chat_tokenizer,
    save_chat_model,
    weights_of,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_stateless import PRESETS, StatelessOptimizer


trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

# TRL asks for gradient checkpointing by the name that transformers is about to give up.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

SAMPLING = {"num_generations": 2, "max_completion_length": 6}
TRAINERS = {
    "SFT": (CHATS, {"max_length": 32}),
    "DPO": (PREFERENCES, {"max_length": 32}),
    "GRPO": (PROMPTS, SAMPLING),
    "RLOO": (PROMPTS, SAMPLING),
    "Reward": (PREFERENCES, {"max_length": 32}),
}
each_trainer = pytest.mark.parametrize("kind", TRAINERS)
RUNS = [(tuning, optim) for tuning in ("full", "lora", "int8") for optim in ("sinkgd", "swan")]
# The control: what it does not repeat, the trainer itself does not.
RUNS += [("lora", "adamw_torch")]
each_run = pytest.mark.parametrize(("tuning", "optim"), RUNS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where each trainer finds its model."""
    chat = save_chat_model(tmp_path_factory.mktemp("chat"))
    score = save_chat_model(tmp_path_factory.mktemp("score"), score=True)
    return {kind: score if kind == "Reward" else chat for kind in TRAINERS}


def word_sum(completions, **kwargs):
    """A reward that differs from answer to answer, so that every batch has a gradient."""
    return [float(sum(map(ord, completion[0]["content"])) % 97) for completion in completions]


class Watch(TrainerCallback):
    """Keeps the weights of the beginning and after step 2."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.first = weights_of(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            self.second = weights_of(model)


def auto_class(kind, prefix="AutoModelFor"):
    return f"{prefix}{'SequenceClassification' if kind == 'Reward' else 'CausalLM'}"


def new_trainer(kind, folder, tuning, optim, output, seed=0, callbacks=()):
    rows, options = TRAINERS[kind]
    # Adapters are drawn from `seed`; a resumed run has to take them from the checkpoint.
    torch.manual_seed(seed)
    auto = {"AutoModelForCausalLM": AutoModelForCausalLM}.get(auto_class(kind), AutoModelForSequenceClassification)
    adapter = peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        lora_dropout=0.1,
        task_type="SEQ_CLS" if kind == "Reward" else "CAUSAL_LM",
    )
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(output),
        optim=optim,
        learning_rate=1e-2,
        max_steps=3,
        save_steps=2,
        per_device_train_batch_size=2,
        # TRL casts the whole of a quantised model's trainable part, the float32 input of a score head not.
        bf16=(kind, tuning) == ("Reward", "int8"),
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return getattr(trl, f"{kind}Trainer")(
        model=auto.from_pretrained(folder, **bits_and_bytes(tuning)),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=chat_tokenizer(),
        callbacks=list(callbacks),
        **({} if tuning == "full" else {"peft_config": adapter}),
        **({"reward_funcs": word_sum} if options is SAMPLING else {}),
    )


def keep_dtype(model):
    """Over a quantised base TRL trains adapters in bfloat16, but those of a checkpoint come back in float32.

    `test_a_resume_changes_the_dtype_of_adapters_over_a_quantised_base` says when this can go.
    """
    model.load_adapter = functools.partial(model.load_adapter, autocast_adapter_dtype=False)


def train(trainer, resume=None):
    with contextlib.redirect_stdout(None):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


@each_run
@each_trainer
def test_a_trainer_saves_loads_and_resumes_to_the_bit(kind, tuning, optim, folders, tmp_path):
    if tuning == "int8":
        pytest.importorskip("bitsandbytes")
    watch = Watch()
    whole = train(new_trainer(kind, folders[kind], tuning, optim, tmp_path, callbacks=[watch]))
    final = weights_of(whole.model)
    trained = {name for name, p in whole.model.named_parameters() if p.requires_grad}
    assert changed(final, watch.first) == changed(final, watch.second) == trained
    if optim in PRESETS:
        optimizer = whole.optimizer.optimizer
        assert isinstance(optimizer, StatelessOptimizer)
        assert optimizer.param_groups[0]["norms"] == PRESETS[optim].norms

    half = new_trainer(kind, folders[kind], tuning, optim, tmp_path, seed=1)
    if tuning == "int8":
        keep_dtype(half.model)
    resumed = train(half, str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3
    assert changed(weights_of(resumed.model), final) == set()

    whole.save_model(str(tmp_path / "saved"))
    if tuning == "full":
        auto = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    else:
        auto = getattr(peft, auto_class(kind, "AutoPeftModelFor"))
    loaded = auto.from_pretrained(tmp_path / "saved", **bits_and_bytes(tuning))
    assert changed({k: v.to(final[k].dtype) for k, v in loaded.state_dict().items()}, final) == set()


def test_a_resume_changes_the_dtype_of_adapters_over_a_quantised_base(folders, tmp_path):
    """What transformers, TRL and PEFT do with any optimizer; when this fails, `keep_dtype` can go (the page too)."""
    pytest.importorskip("bitsandbytes")

    def dtypes(trainer):
        return {p.dtype for p in trainer.model.parameters() if p.requires_grad}

    args = ("SFT", folders["SFT"], "int8", "sgd", tmp_path)
    assert dtypes(train(new_trainer(*args))) == {torch.bfloat16}
    assert dtypes(train(new_trainer(*args), str(tmp_path / "checkpoint-2"))) == {torch.float32}


# ---- Adapters


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embeddings": {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_name = pytest.mark.parametrize("name", ["sinkgd", "swan"])


def adapted(folder, dtype=torch.float32, **options):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = peft.LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    # Adapters as wide as the base, so that bfloat16 is trained.
    return peft.get_peft_model(base, config, autocast_adapter_dtype=False)


def steps(model, name, output, **options):
    """A Trainer that has made 3 steps."""
    args = TrainingArguments(
        str(output),
        optim=name,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"max_steps": 3, "save_strategy": "no", "logging_steps": 1, **options},
    )
    return train(Trainer(model, args, train_dataset=TOKEN_ROWS))


def without_gradient(model):
    """The factors that get no gradient while the one they are multiplied with is zero, which is how PEFT starts."""
    return {name for name, _ in model.named_parameters() if "lora_A" in name or "lora_embedding_B" in name}


@each_name
@each_variant
def test_adapters_of_every_kind_train_merge_and_generate(variant, name, folders, tmp_path):
    model = adapted(folders["SFT"], **VARIANTS[variant])
    before = weights_of(model)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    steps(model, name, tmp_path)
    assert changed(weights_of(model), before) == trained
    assert all(value.isfinite().all() for value in model.state_dict().values())

    model.eval()
    prompt = torch.tensor([TOKEN_ROWS[0]["input_ids"]])
    expected = model(prompt).logits
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(prompt).logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.generate(prompt, max_new_tokens=3, min_new_tokens=3).shape == (1, prompt.shape[1] + 3)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert changed(loaded.state_dict(), weights_of(merged)) == set()
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(prompt).logits, expected, rtol=0, atol=0)


@each_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["lora", "dora", "embeddings"])
def test_a_factor_whose_partner_is_zero_is_left_alone_in_the_first_step(variant, dtype, name, folders, tmp_path):
    model = adapted(folders["SFT"], dtype, **VARIANTS[variant])
    before = weights_of(model)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    waiting = without_gradient(model)
    assert waiting
    assert all((before[key.replace("lora_A", "lora_B")] == 0).all() for key in waiting if "lora_A" in key)
    steps(model, name, tmp_path, max_steps=1)
    assert changed(weights_of(model), before) == trained - waiting
    assert all(value.isfinite().all() for value in model.state_dict().values())


@each_name
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_layerwise_updates_of_adapters_are_those_of_step(variant, name, folders, tmp_path):
    runs = {}
    for optim in (name, f"{name}_layerwise"):
        model = adapted(folders["SFT"], **VARIANTS[variant])
        # A clipped gradient is rounded once more, which whitening amplifies; clipping is tested by itself.
        options = {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "max_grad_norm": 1e3}
        trainer = steps(model, optim, tmp_path, **options)
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        runs[optim] = (weights_of(model), torch.tensor(norms))
    # The norms are added up in another order.
    torch.testing.assert_close(*runs.values(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=3, target_modules=["q_proj"]), "ADALORA"),
        (lambda: peft.IA3Config(task_type="CAUSAL_LM"), "IA3"),
        (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
    ],
    ids=["adalora", "ia3", "prompt tuning"],
)
def test_methods_that_train_no_linear_layer_are_refused_by_name(config, method, folders, tmp_path):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folders["SFT"]), config())
    message = rf"no trainable matrix.*PEFT's {method} .*Type optim=adamw_torch, or use LoraConfig"
    with pytest.raises(ValueError, match=message) as error:
        steps(model, "sinkgd", tmp_path)
    assert "\n" not in str(error.value)


# ---- Scripts that do not import hf_stateless


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
COMMAND = ["-m", "hf_stateless.cli", "run", sys.executable]
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

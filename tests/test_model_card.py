"""The model card: once, coherent, with valid metadata and nothing private, for transformers, TRL and PEFT."""

import copy
import getpass
import json
import os
import re
from pathlib import Path

import pytest
from conftest import TINY_MODELS
from datasets import Dataset
from huggingface_hub import ModelCard
from push_worker import tiny_tokenizer
from transformers import Trainer, TrainingArguments, default_data_collator

import hf_stateless
from hf_stateless import PRESETS
from hf_stateless.reports.card.attach import attach_model_card
from hf_stateless.reports.card.facts import CARD_FILE, DATA_FILE, CardFacts
from hf_stateless.reports.card.memory_section import number
from hf_stateless.reports.card.render import render, render_folder
from hf_stateless.reports.card.sources import _optimizer_options
from hf_stateless.reports.files import GIB, size_text
from hf_stateless.reports.measured.schema import REPORT_FILE, MemoryReport


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

BEGIN, END = "<!-- hf_stateless:memory-report -->", "<!-- /hf_stateless:memory-report -->"
TOKENS = list(range(3, 19))
COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "report_to": "none",
    "optim": "sinkgd",
}


def plain_trainer(folder, model=None, **options):
    rows = Dataset.from_list([{"input_ids": TOKENS, "labels": TOKENS}] * 8)
    args = TrainingArguments(output_dir=str(folder), **{**COMMON, **options})
    model = model or TINY_MODELS["llama"]()
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows, data_collator=default_data_collator)


def sft_trainer(folder, base, **options):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": TOKENS}] * 8)
    args = SFTConfig(output_dir=str(folder), gradient_checkpointing=False, bf16=False, **{**COMMON, **options})
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    model = AutoModelForCausalLM.from_pretrained(base)
    return SFTTrainer(model, args, train_dataset=rows, processing_class=tiny_tokenizer(), peft_config=lora)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A model on disk whose card names a licence."""
    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    TINY_MODELS["llama"]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / CARD_FILE).write_text("---\nlicense: mit\n---\n# Base\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """Two steps of pretraining with evaluation, and the card written three times."""
    folder = tmp_path_factory.mktemp("runs") / "counting"
    trainer = plain_trainer(folder, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    hf_stateless.attach_memory_report(trainer)
    attach_model_card(trainer, datasets=["someone/counting"], data="The text counts.")
    trainer.create_model_card()
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(tags="mine", language="en")
    trainer.create_model_card(language="en")
    return trainer, folder


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory, base_folder):
    """Two steps of SFT of an adapter, with a checkpoint, after which PEFT has saved its own card over ours."""
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    trainer = sft_trainer(folder, base_folder, save_strategy="steps", save_steps=1, optim_args="num_iterations=3")
    hf_stateless.attach_memory_report(trainer)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return trainer, folder


def card(folder):
    return (Path(folder) / CARD_FILE).read_text(encoding="utf-8")


def in_bytes(text):
    """The number that a size says."""
    number, unit = text.split(" ")
    return float(number) * {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB}[unit]


def table(text, first_cell):
    """The cells of the row of a Markdown table that begins with a word."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {first_cell} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


@pytest.mark.parametrize("run", ["plain_run", "adapter_run"])
def test_the_section_is_there_once_and_nothing_is_left_open(run, request):
    text = card(request.getfixturevalue(run)[1])
    assert text.count(BEGIN) == text.count(END) == text.count("## Memory report") == 1
    assert "more information needed" not in text.lower()
    headings = re.findall(r"^#+ .*$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    assert len(headings) == len(set(headings)) > 5


@pytest.mark.parametrize("run", ["plain_run", "adapter_run"])
def test_writing_it_again_changes_nothing(run, request):
    trainer, folder = request.getfixturevalue(run)
    before = card(folder)
    trainer.create_model_card(**({"language": "en"} if run == "plain_run" else {}))
    assert card(folder) == before == render_folder(folder)


def test_a_trainer_that_leaves_the_card_alone_keeps_it(plain_run):
    trainer, folder = plain_run
    writer, before = trainer.create_model_card, card(folder)
    own_method, writer.own_method = writer.own_method, lambda: None
    try:
        trainer.create_model_card()
    finally:
        writer.own_method = own_method
    assert card(folder) == before


def test_metadata_of_a_pretraining(plain_run):
    data = ModelCard.load(plain_run[1] / CARD_FILE).data
    assert {"hf_stateless", "sinkgd", "multi-normalization", "memory-efficient", "pretraining"} <= set(data.tags)
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "text-generation", ["en"])
    assert data.datasets == ["someone/counting"]
    assert data.base_model is None
    last = [entry for entry in plain_run[0].state.log_history if "eval_loss" in entry][-1]
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values["loss"] == last["eval_loss"]
    assert values["perplexity"] == pytest.approx(2.718281828 ** last["eval_loss"])


def test_metadata_of_an_adapter(adapter_run, base_folder):
    data = ModelCard.load(adapter_run[1] / CARD_FILE).data
    assert {"hf_stateless", "sinkgd", "sft", "trl"} <= set(data.tags)
    assert not any(tag.startswith("base_model:") for tag in data.tags)
    assert (data.library_name, data.license, data.base_model) == ("peft", "mit", None)
    assert "licence" not in data.to_dict()
    assert f"LoRA adapter for `{base_folder.name}`" in card(adapter_run[1])


def test_the_base_model_and_licence_that_are_given_win(adapter_run):
    trainer, folder = adapter_run
    attach_model_card(trainer, base_model="someone/tiny-base", license="apache-2.0")
    trainer.create_model_card()
    data = ModelCard.load(folder / CARD_FILE).data
    assert (data.base_model, data.license) == ("someone/tiny-base", "apache-2.0")
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert "[someone/tiny-base](https://huggingface.co/someone/tiny-base)" in card(folder)


def test_the_table_has_the_numbers_of_the_report_and_says_how(plain_run):
    text, report = card(plain_run[1]), MemoryReport.load(plain_run[1])
    adamw = report.predicted["adamw_torch_fused"]
    state = table(text, "optimizer state")
    assert [in_bytes(state[0]), in_bytes(state[1])] == pytest.approx(
        [report.counted.optimizer_state, adamw.optimizer_state], rel=6e-3
    )
    assert state[-1] == "counted; others predicted"
    peak = table(text, "**peak**")
    assert in_bytes(peak[0]) == pytest.approx(report.measured.peak.max, rel=6e-3)
    assert peak[-1] == "measured; others predicted"
    assert table(text, "activations and temporaries")[-1].startswith("residual")
    parts = [in_bytes(table(text, name)[0]) for name in ("weights and buffers", "gradients", "optimizer state")]
    parts += [in_bytes(table(text, name)[0]) for name in ("activations and temporaries", "held before training")]
    assert sum(parts) == pytest.approx(in_bytes(peak[0]), rel=0.02)


def test_options_of_the_optimizer_are_those_of_its_groups(plain_run, adapter_run):
    assert table(card(plain_run[1]), "num_iterations (multinorm)") == ["5"]
    assert table(card(adapter_run[1]), "num_iterations (multinorm)") == ["3"]
    assert table(card(adapter_run[1]), "norms (multinorm)") == ["row_l2, col_l2"]
    assert table(card(adapter_run[1]), "target_modules")[0].split(", ")[:2] == ["down_proj", "gate_proj"]


@pytest.mark.parametrize("name", ["swan", "sinkgd"])
def test_options_of_lora_pairs_are_told(base_folder, tmp_path, name):
    trainer = sft_trainer(tmp_path, base_folder, optim=name, optim_args="lora=product,lr_scale=0.3,min_signal=0.1")
    trainer.create_optimizer()
    told = {key: value for key, value in _optimizer_options(trainer).items() if key.endswith("(lora_product)")}
    assert told == {
        "norms (lora_product)": ("spectral",) if name == "swan" else ("row_l2", "col_l2"),
        "num_iterations (lora_product)": PRESETS[name].num_iterations,
        "lr_scale (lora_product)": 0.3,
        "stochastic_rounding (lora_product)": True,
        "min_signal (lora_product)": 0.1,
    }


def test_options_of_sinkhorn_momentum_are_told(tmp_path):
    trainer = plain_trainer(tmp_path, optim_args="embeddings=sinkhorn_momentum")
    trainer.create_optimizer()
    told = {key: value for key, value in _optimizer_options(trainer).items() if key.endswith("(sinkhorn_momentum)")}
    expected = {"momentum": 0.95, "num_iterations": 5.5, "row_threshold": 1e-3, "lr_scale": 0.18}
    assert told == {f"{key} (sinkhorn_momentum)": value for key, value in expected.items()}


def test_options_of_another_optimizer_are_not_told(tmp_path):
    trainer = plain_trainer(tmp_path, optim="adamw_torch")
    assert _optimizer_options(trainer) == {}
    trainer.create_optimizer()
    assert _optimizer_options(trainer) == {}


def test_what_trl_says_is_taken_over(adapter_run):
    text = card(adapter_run[1])
    assert "This model was trained with SFT" in text
    assert text.count("@software{vonwerra2020trl") == text.count("@inproceedings{scetbon2025gradient") == 1
    assert "- trl " in text
    assert "- peft " in text


def test_nothing_private_is_told(plain_run, adapter_run, base_folder, monkeypatch):
    trainer, folder = adapter_run
    monkeypatch.setenv("HF_TOKEN", "")
    trainer.args.hub_token = "hf_secretsecretsecretsecret"
    attach_model_card(trainer, data=f"Read from {base_folder}/texts.")
    assert trainer.args.hub_token == copy.deepcopy(trainer.args).hub_token == "hf_secretsecretsecretsecret"
    assert os.environ["HF_TOKEN"] == "", "a token of one trainer is none of the process"
    assert "hf_secretsecret" not in f"{trainer.args} {trainer.args!r} {[trainer.args.hub_token]}"
    trainer.create_model_card()
    trainer.save_model()
    trainer.create_model_card()
    private = [str(base_folder), str(folder), str(folder.parent), str(Path.home()) + "/", "hf_secretsecret"]
    private += [f"/{getpass.getuser()}/", str(Path.cwd())]
    for run_folder in (plain_run[1], folder):
        for name in (CARD_FILE, DATA_FILE, REPORT_FILE):
            text = (run_folder / name).read_text(encoding="utf-8")
            assert [secret for secret in private if secret in text] == [], f"{name} tells where it was made"
    assert b"hf_secretsecret" not in (folder / "training_args.bin").read_bytes()


def test_a_card_in_the_middle_of_a_training_has_tags_and_says_so(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder, save_strategy="steps", save_steps=1, max_steps=2)
    hf_stateless.attach_memory_report(trainer)
    seen = []
    save = trainer._save_checkpoint

    def look(*args, **kwargs):
        save(*args, **kwargs)
        seen.append(card(tmp_path / "run"))

    trainer._save_checkpoint = look
    trainer.train()
    assert len(seen) == 2
    assert all(text.count(BEGIN) == 1 and "- hf_stateless\n" in text for text in seen)
    assert "Training was not finished" in seen[0]
    trainer.create_model_card()
    assert "Training was not finished" not in card(tmp_path / "run")


def test_resuming_keeps_one_section(tmp_path):
    folder = tmp_path / "run"
    for steps, resume in ((1, None), (2, True)):
        trainer = plain_trainer(folder, max_steps=steps, save_strategy="steps", save_steps=1)
        hf_stateless.attach_memory_report(trainer)
        trainer.train(resume_from_checkpoint=resume)
        trainer.create_model_card()
    assert card(folder).count(BEGIN) == 1
    assert "over 2 steps" in card(folder)


def test_another_optimizer_is_not_called_stateless(tmp_path):
    trainer = plain_trainer(tmp_path / "run", optim="adamw_torch")
    hf_stateless.attach_memory_report(trainer)
    trainer.train()
    trainer.create_model_card()
    data = ModelCard.load(tmp_path / "run" / CARD_FILE).data
    assert "memory-efficient" not in data.tags
    assert "keeps no state" not in card(tmp_path / "run")


def test_evaluation_json_of_a_recipe_is_told(tmp_path):
    trainer = plain_trainer(tmp_path / "run")
    attach_model_card(trainer)
    figures = {"passed": {"mean": 0.25, "standard_error": 0.03}}
    evaluation = {"tasks": ["chain_sum"], "questions": 200, "decoding": "greedy", "after": figures}
    evaluation["before"] = {"passed": {"mean": 0.125, "standard_error": 0.02}}
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    trainer.create_model_card()
    where = "200 held-out questions of chain_sum, greedy decoding"
    assert table(card(tmp_path / "run"), "Passed") == ["0.1250", "0.2500 (standard error 0.030)", where]
    (result,) = ModelCard.load(tmp_path / "run" / CARD_FILE).data.eval_results
    assert (result.metric_type, result.metric_value) == ("passed", 0.25)


@pytest.mark.parametrize("size", [0, 1, 84, 1023, 1024, 10**6, 2**20, 10**8, GIB, 3 * GIB + 7, 80 * GIB, 1400 * GIB])
def test_sizes_are_right_to_three_digits_in_a_unit_that_needs_no_zeros(size):
    assert in_bytes(size_text(size)) == pytest.approx(size, rel=6e-3)
    assert re.fullmatch(r"(0|[1-9]\d{0,3}|[1-9]\.\d\d|[1-9]\d\.\d|0\.[1-9]\d\d) ([GMK]i)?B", size_text(size))


@pytest.mark.parametrize("value", [4238.4, 85.279, 0.0512345, 1.0, -3.25])
def test_numbers_are_right_to_four_digits(value):
    assert float(number(value)) == pytest.approx(value, rel=6e-4)


def test_a_card_without_a_report_has_no_section():
    facts = CardFacts(name="m", model="LlamaForCausalLM", parameters=1, optimizer="swan")
    assert BEGIN not in render(facts)
    assert "SWAN" in render(facts)


def test_facts_of_another_schema_are_refused(tmp_path):
    facts = CardFacts(name="m", model="LlamaForCausalLM", parameters=1, optimizer="swan")
    facts.save(tmp_path)
    assert CardFacts.load(tmp_path) == facts
    values = json.loads((tmp_path / DATA_FILE).read_text(encoding="utf-8"))
    (tmp_path / DATA_FILE).write_text(json.dumps({**values, "schema_version": 99}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"schema_version is 99, expected 1"):
        CardFacts.load(tmp_path)

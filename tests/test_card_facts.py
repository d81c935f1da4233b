"""What a card says of a run: the caller's words before guesses, code that a reader can run, and true counts."""

import pytest
from conftest import TINY_MODELS
from documents import ROOT
from huggingface_hub import ModelCard
from push_worker import tiny_tokenizer
from test_model_card import card, plain_trainer, sft_trainer
from transformers import AutoModelForCausalLM

import hf_stateless
from hf_stateless.reports.card.attach import attach_model_card, save
from hf_stateless.reports.card.facts import CARD_FILE, CardFacts
from hf_stateless.reports.card.render import render
from hf_stateless.reports.card.training_log import LONGEST_TABLE, results
from hf_stateless.reports.files import size_text
from hf_stateless.reports.measured.picture import draw
from hf_stateless.reports.measured.schema import MemoryReport
from hf_stateless.reports.predicted.table import Estimate, Settings, as_json, as_table


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """One that has evaluated."""
    trainer = plain_trainer(tmp_path_factory.mktemp("run"))
    trainer.state.log_history = [{"step": 2, "loss": 4.0}, {"step": 2, "eval_loss": 3.0}]
    attach_model_card(trainer)
    return trainer


SAID = [
    {"model_name": "My model", "finetuned_from": "ada/base", "dataset_tags": "ada/rows", "dataset": "The rows"},
    {
        "model_name": "B",
        "finetuned_from": "org/b",
        "dataset_tags": ["x/y", "x/z"],
        "dataset": ["Y", "Z"],
        "license": "mit",
    },
    {
        "model_name": "C",
        "finetuned_from": "gpt2",
        "dataset_tags": "imdb",
        "dataset_args": "plain_text",
        "language": "fr",
    },
    {"model_name": "D", "finetuned_from": "a/b", "tasks": "text-classification", "tags": ["own", "tag"]},
]


@pytest.mark.parametrize("said", SAID, ids=lambda said: said["model_name"])
@pytest.mark.parametrize("given", [{}, {"base_model": "", "datasets": ["given/rows"], "license": "bsd"}])
def test_what_the_caller_says_wins(said, given, trainer, tmp_path):
    trainer.create_model_card.given = given
    trainer.args.output_dir = str(tmp_path)
    by_name = {name: value for name, value in said.items() if name not in ("language", "license")}
    trainer.create_model_card(said.get("language"), said.get("license"), **by_name)
    text, data = card(tmp_path), ModelCard.load(tmp_path / CARD_FILE).data
    assert f"# {said['model_name']}\n" in text
    assert "random weights" not in text
    assert f"[{said['finetuned_from']}](https://huggingface.co/{said['finetuned_from']}), trained further" in text
    assert (data.model_name, data.base_model) == (said["model_name"], said["finetuned_from"])
    assert data.license == said.get("license", given.get("license"))
    tags = said.get("dataset_tags", given.get("datasets"))
    assert data.datasets == ([tags] if isinstance(tags, str) else tags)
    names = said.get("dataset", tags)
    for name in ([names] if isinstance(names, str) else names) if "dataset_tags" in said else ():
        assert name in text.split("## ")[0]
    if "language" in said:
        assert data.language == [said["language"]]
    if "dataset_args" in said:
        assert data.eval_results[0].dataset_args == said["dataset_args"]
    assert data.pipeline_tag == said.get("tasks", "text-generation")
    assert set(said.get("tags", ())) <= set(data.tags)


def test_what_trl_is_told_wins(tmp_path):
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "base")
    trainer = sft_trainer(tmp_path, tmp_path / "base")
    attach_model_card(trainer, datasets=["given/rows"])
    trainer.create_model_card("Named", "ada/rows", tags="own")
    data = ModelCard.load(tmp_path / CARD_FILE).data
    assert (data.model_name, data.datasets) == ("Named", ["ada/rows"])
    assert {"own", "trl", "sinkgd"} <= set(data.tags)
    assert "# Named\n" in card(tmp_path)
    assert "It was trained on ada/rows." in card(tmp_path)


@pytest.mark.parametrize("origin", ["ada/base", "/mnt/ada/base", "[ada/base, ada/other]"])
def test_a_base_in_a_folder_is_traced_to_what_its_card_says_it_was_made_of(origin, tmp_path):
    base = tmp_path / "first-step"
    TINY_MODELS["llama"]().save_pretrained(base)
    (base / CARD_FILE).write_text(f"---\nlicense: mit\nbase_model: {origin}\n---\n")
    trainer = plain_trainer(tmp_path / "run", AutoModelForCausalLM.from_pretrained(base))
    attach_model_card(trainer)
    trainer.create_model_card()
    data, text = ModelCard.load(tmp_path / "run" / CARD_FILE).data, card(tmp_path / "run")
    known = origin == "ada/base"
    assert data.license == "mit"
    assert (data.base_model, data.get("base_model_relation")) == (("ada/base", "finetune") if known else (None, None))
    made_of = ", made of [ada/base](https://huggingface.co/ada/base)" if known else ""
    assert f"\n`first-step`{made_of}, trained further with" in text
    assert "mnt/ada" not in text


def test_a_training_log_is_told_in_means_and_evaluations_as_they_are():
    log = [{"step": step, "loss": 1.0, "reward": float(step % 2)} for step in range(1, 101)]
    rows = results([*log, {"step": 100, "train_loss": 9.0}])
    assert len(rows) == LONGEST_TABLE
    assert [rows[0]["step"], rows[-1]["step"]] == [8, 100]
    assert all(0.4 < row["mean reward"] < 0.6 and row["loss"] == 1.0 for row in rows)
    assert results(log[:3]) == [{"step": s, "loss": 1.0, "mean reward": float(s % 2)} for s in (1, 2, 3)]
    assert results([]) == []
    held_out = [{"step": step, "eval_loss": float(step)} for step in range(100)]
    assert all(row["held-out loss"] == row["step"] for row in results(held_out))
    facts = {"name": "m", "model": "LlamaForCausalLM", "parameters": 1, "optimizer": "swan"}
    told = "Each row is the mean since the row before."
    assert told in render(CardFacts(**facts, results=rows))
    assert told not in render(CardFacts(**facts, results=results(held_out)))


def quick_start(text):
    return text.split("## Quick start\n")[1].split("\n## ")[0].strip()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("tokenizer", "size"), [(False, 128), (True, 16), (True, None)])
def test_the_quick_start_runs_in_the_folder_of_the_card(int8, tokenizer, size, tmp_path, monkeypatch):
    model = TINY_MODELS["llama"]()
    model = hf_stateless.quantize(model, hf_stateless.Int8TrainingConfig(size)) if int8 else model
    trainer = plain_trainer(tmp_path, model, **({"bf16": True} if int8 else {}))
    trainer.processing_class = tiny_tokenizer() if tokenizer else None
    attach_model_card(trainer)
    save(trainer)
    told = quick_start(card(tmp_path))
    assert told.startswith("In the folder of this card:\n\n```python\n")
    code = told.split("```python\n")[1].split("\n```")[0]
    assert ("pip install compressed-tensors" in code) == int8
    assert told.endswith("```bash\nvllm serve .\n```") == (int8 and size != 16)
    assert "import hf_stateless" not in code
    if int8:
        pytest.importorskip("compressed_tensors")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("64", "1"), "card", "exec"), {})


def test_the_quick_start_names_the_repository_once_there_is_one_and_no_base_that_nobody_has():
    values = {"name": "m", "model": "LlamaForCausalLM", "parameters": 1, "optimizer": "swan"}
    values["metadata"] = {"pipeline_tag": "text-generation"}
    assert 'model="a/b")' in quick_start(render(CardFacts(**values, repository="a/b")))
    assert 'model=".")' in quick_start(render(CardFacts(**values, repository='a"b')))
    local = CardFacts(**values, adapter="LoRA", base_model="base", base_is_local=True)
    assert quick_start(render(local)) == "The adapter works on its base model `base`, which is in no known repository."


def test_scales_of_8_bit_weights_are_no_parameters(tmp_path):
    plain, stored = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    stored = hf_stateless.quantize(stored, hf_stateless.Int8TrainingConfig(16))
    trainer = plain_trainer(tmp_path, stored, optim="sinkgd_layerwise", bf16=True, optim_args="embeddings=stateless")
    hf_stateless.attach_memory_report(trainer)
    trainer.train()
    trainer.create_model_card()
    setup, number_of = MemoryReport.load(tmp_path).setup, plain.num_parameters()
    assert setup.parameters == setup.trainable_parameters == sum(setup.dtypes.values()) == number_of
    assert f"with {number_of:,} parameters" in card(tmp_path)
    assert f"{number_of:,} parameters, all of them trained" in card(tmp_path)


@pytest.mark.parametrize("name", [r"$\frac$", "$x", "a_b^c$$", "\\"])
def test_names_in_a_picture_are_no_formulas(name, tmp_path):
    report = MemoryReport.load(ROOT / "hub_cards" / "llama-10m-pretrain-swan")
    report.setup.model = report.setup.optimizer = report.setup.device = name
    draw(report, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 1000


@pytest.mark.parametrize("peak", [900, 3 << 10, 5 << 20, 20 << 30])
def test_the_table_of_memory_shows_no_zeros_for_what_is_there(peak):
    estimate = Estimate("sinkgd", peak, peak // 7, 84, peak // 500, 0, 0, peak, "step")
    facts = {
        "model": "m",
        "model_class": "M",
        "parameters": 1,
        "trained_parameters": 1,
        "has_tokens": True,
        "notes": [],
    }
    lines = as_table(as_json(facts, Settings(), [estimate], [24])).splitlines()
    assert lines[2].startswith(size_text(peak).split(" ")[1])
    cells = next(line for line in lines if line.startswith("sinkgd"))
    assert cells.split().count("0.00") == 1, "nothing is told of the temporary part only"

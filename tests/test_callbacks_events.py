"""A memory report over resumed, failing and pushed runs, and in trainers and models of other kinds."""

import pytest
import torch
from conftest import TINY_MODELS, VOCAB_SIZE
from measured_runs import KEYS, bytes_of, new_trainer, run
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import hf_stateless
from hf_stateless.reports.measured.schema import MemoryReport
from hf_stateless.reports.predicted import optimizer_state_bytes


pytest_plugins = ["measured_runs"]
pytestmark = pytest.mark.usefixtures("without_picture")


@pytest.mark.parametrize("save_only_model", [False, True])
def test_a_resumed_run_adds_to_the_report_of_its_checkpoint(save_only_model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": save_only_model}
    _, straight = run(tmp_path, **options)
    half = MemoryReport.load(tmp_path / "checkpoint-2")
    assert (half.measured.steps, half.complete) == (2, False)
    trainer = new_trainer(tmp_path, **options)
    hf_stateless.attach_memory_report(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = MemoryReport.load(tmp_path)
    assert (resumed.measured.from_step, resumed.measured.steps, resumed.complete) == (0, 4, True)
    assert resumed.cost.tokens == straight.cost.tokens
    assert resumed.counted == straight.counted
    assert resumed.measured.peak.max >= half.measured.peak.max
    assert resumed.cost.seconds > half.cost.seconds


def test_a_resume_without_an_earlier_report_says_from_which_step_on_it_measured(tmp_path):
    new_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    trainer = new_trainer(tmp_path)
    hf_stateless.attach_memory_report(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    measured = MemoryReport.load(tmp_path).measured
    assert (measured.from_step, measured.steps) == (2, 2)


def test_an_exception_in_training_leaves_nothing_half_written(tmp_path):
    class Failing(TrainerCallback):
        def on_step_begin(self, args, state, *rest, **kwargs):
            if state.global_step == 3:
                raise RuntimeError("as it happens")

    trainer = new_trainer(tmp_path, "sinkgd_layerwise", callbacks=[Failing()])
    hf_stateless.attach_memory_report(trainer)
    with pytest.raises(RuntimeError, match="as it happens"):
        trainer.train()
    assert not [path for path in tmp_path.rglob("*") if "memory" in path.name]
    trainer.callback_handler.remove_callback(Failing)
    trainer.train()
    assert MemoryReport.load(tmp_path).measured.steps == 4


def test_a_push_in_the_middle_has_report_and_picture_so_far(tmp_path):
    pushed = []

    class Pushing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (1, 3):
                trainer.callback_handler.on_push_begin(args, state, control)
                pushed.extend(MemoryReport.load(file) for file in tmp_path.glob("memory_report.json"))

    trainer = new_trainer(tmp_path)
    hf_stateless.attach_memory_report(trainer)
    trainer.add_callback(Pushing())
    trainer.train()
    assert [(report.measured.steps, report.complete) for report in pushed] == [(3, False)]
    assert (tmp_path / "memory.png").read_bytes()[1:4] == b"PNG"


def test_a_folder_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    trainer = new_trainer(tmp_path / "run")
    hf_stateless.attach_memory_report(trainer)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "memory_report.json").mkdir()
    trainer.train()
    assert trainer.state.global_step == 4
    assert "The memory report cannot be written" in caplog.text


def test_an_optimizer_that_was_handed_over_goes_by_its_class(tmp_path):
    model = TINY_MODELS["llama"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _, report = run(tmp_path, model=model, optimizers=(optimizer, None))
    assert report.setup.optimizer == "SGD"
    assert report.counted.optimizer_state == bytes_of(model.parameters())
    assert [(group.role, group.algorithm) for group in report.groups] == [("all", "SGD")]


def test_a_model_without_tokens_has_no_rate_of_them(tmp_path):
    trainer = new_trainer(tmp_path, model="vit")
    pixels = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 3} for i in range(16)]
    trainer.train_dataset = pixels
    trainer.data_collator = lambda rows: {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
    hf_stateless.attach_memory_report(trainer)
    trainer.train()
    report = MemoryReport.load(tmp_path)
    assert (report.cost.tokens, report.cost.tokens_per_second, report.setup.sequence_length) == (None, None, 0)
    assert KEYS - trainer.state.log_history[0].keys() == {"throughput/tokens_per_second"}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_trainers_of_trl_measure_too(kind, tmp_path):
    trl = pytest.importorskip("trl")
    from tiny_models import CHATS, PREFERENCES, PROMPTS, chat_tokenizer, save_chat_model

    data = {"SFT": CHATS, "DPO": PREFERENCES, "GRPO": PROMPTS}[kind]
    from datasets import Dataset

    options = {"GRPO": {"num_generations": 2, "max_completion_length": 6}}.get(kind, {"max_length": 32})
    args = getattr(trl, f"{kind}Config")(
        str(tmp_path), optim="sinkgd", use_cpu=True, bf16=False, report_to=[], max_steps=2, logging_steps=1,
        per_device_train_batch_size=2, save_strategy="steps", save_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip
    reward = {"reward_funcs": lambda completions, **_: [float(i) for i in range(len(completions))]}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=LlamaForCausalLM.from_pretrained(save_chat_model(tmp_path / "model")),
        args=args,
        train_dataset=Dataset.from_list(data),
        processing_class=chat_tokenizer(),
        **(reward if kind == "GRPO" else {}),
    )
    hf_stateless.attach_memory_report(trainer)
    trainer.train()
    report = MemoryReport.load(tmp_path)
    assert all(entry.keys() >= KEYS for entry in trainer.state.log_history if "loss" in entry)
    assert report.cost.tokens > 0
    assert report.measured.steps == 2
    assert report.setup.sequence_length > 3
    if kind == "SFT":  # which counts tokens itself
        assert report.cost.tokens == [e["num_tokens"] for e in trainer.state.log_history if "num_tokens" in e][-1]


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "lion_8bit"])
def test_states_of_bitsandbytes_are_counted_with_their_scales(optim, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    sizes = {"hidden_size": 72, "intermediate_size": 200, "num_hidden_layers": 1, "num_attention_heads": 6}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCAB_SIZE))
    trainer, report = run(tmp_path, optim, model)
    assert report.counted.optimizer_state == optimizer_state_bytes(trainer.model, optim)

"""Who is told how to pretrain: new models of any kind once, and nobody else."""

import logging
import re

import pytest
import torch
from conftest import TINY_MODELS, VOCAB_SIZE, tiny_inputs
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_stateless import Int8TrainingConfig, quantize
from hf_stateless.optimizer.rates import SCALES
from hf_stateless.trainer.untrained import NOTE, is_untrained, untrained_note
from hf_stateless.update.rate import rate_scale


# PEFT 0.21 reads `is_gradient_checkpointing`, which transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4}


def untied(**options):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options}))


NEW = {
    "gains of one": untied,
    "biases of zero": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "gains that the class adds one to": lambda: GemmaForCausalLM(
        GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8)
    ),
    "bf16": lambda: untied().to(torch.bfloat16),
    "wide": lambda: untied(hidden_size=256, vocab_size=2000),
    "another deviation": lambda: untied(initializer_range=0.5),
    "a row of padding": lambda: untied(pad_token_id=0),
    "narrow": lambda: untied(hidden_size=8),
    "another distribution": lambda: drawn(untied(), lambda table: table.uniform_(-1, 1)),
}


def drawn(model, fill):
    fill(model.get_input_embeddings().weight.data)
    return model


def trained(lr, steps=1, *, folded=False):
    model = untied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        model(**tiny_inputs("llama")).loss.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        if folded and "norm" in name:
            p.data.fill_(1.0)  # as where gains were multiplied into the weights
    return model


def frozen(part):
    model = untied()
    for name, p in model.named_parameters():
        p.requires_grad_(part not in name)
    return model


def with_lora():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(untied(), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def on_meta():
    with torch.device("meta"):
        return untied()


def spiked(model):
    """One direction that every token has, as in trained tables."""
    return drawn(model, lambda table: table[:, 3].add_(table.std()))


OTHERS = {
    "one step": lambda: trained(1e-3),
    "one small step": lambda: trained(1e-5),
    "gains folded into the weights": lambda: trained(1e-1, 5, folded=True),
    "a direction in common": lambda: spiked(untied(vocab_size=512)),
    "rows of different length": lambda: drawn(
        untied(vocab_size=512, hidden_size=64), lambda t: t.mul_(1 + torch.rand(512, 1))
    ),
    "a constant table": lambda: drawn(untied(), lambda table: table.fill_(0.1)),
    "frozen layers": lambda: frozen("mlp"),
    "frozen norms": lambda: frozen("norm"),
    "a frozen table": lambda: frozen("embed_tokens"),
    "LoRA": with_lora,
    "8 bits": lambda: quantize(untied(), Int8TrainingConfig(None)),
    "no weights here": on_meta,
    "no norms": lambda: torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4)),
    "one norm": lambda: torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)),
    "no table": lambda: TINY_MODELS["vit"](),
}


@pytest.mark.parametrize("make", NEW.values(), ids=NEW)
def test_a_new_model_is_told_what_to_type(make):
    assert untrained_note(make(), {}) == NOTE
    assert "\n" not in NOTE


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_any_other_model_is_not(make):
    assert not is_untrained(make())


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "qwen3_moe", "t5", "bert"])
def test_new_models_of_any_kind_are_told(kind, make_model):
    assert is_untrained(make_model(kind))


@pytest.mark.parametrize(
    "given", [{"rates": "finetuning"}, {"adamw_lr": 1e-3}, *({scale: 1} for scale in SCALES)], ids=str
)
def test_who_has_set_rates_is_told_nothing(given):
    assert untrained_note(untied(), given) == ""
    assert untrained_note(untied(), {"lr_scale": 1, "seed": 3}) == NOTE


@pytest.fixture
def run(tmp_path):
    def make(model, **options):
        given = {"optim": "sinkgd", "max_steps": 2, "save_strategy": "no", "report_to": [], "use_cpu": True, **options}
        args = TrainingArguments(str(tmp_path), disable_tqdm=True, **given)
        row = {key: value[0] for key, value in tiny_inputs("llama").items()}
        return Trainer(model, args, train_dataset=[row] * 4)

    return make


@pytest.mark.parametrize(("optim_args", "level", "times"), [(None, "passive", 1), ("rates=pretraining", "passive", 0)])
def test_a_trainer_prints_the_line_once_below_its_table(
    optim_args, level, times, run, make_model, capsys, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("hf_stateless"), "level", logging.ERROR)
    logging.getLogger("hf_stateless.trainer.table")._cache.clear()
    run(make_model("llama"), optim_args=optim_args, log_level=level).create_optimizer()
    out = capsys.readouterr().out
    assert out.count(NOTE) == times
    assert not times or out.splitlines()[-1] == NOTE
    logging.getLogger("hf_stateless.trainer.table")._cache.clear()


def test_the_line_says_what_can_be_typed(run, make_model):
    (typed,) = re.findall(r'optim_args="([^"]*)"', NOTE)
    trainer = run(make_model("llama"), optim_args=typed)
    trainer.create_optimizer()
    assert {g["role"]: rate_scale(g) for g in trainer.optimizer.param_groups}["embedding"] == 48

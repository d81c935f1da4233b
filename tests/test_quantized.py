"""Adapters over a base that bitsandbytes holds in 8 or 4 bits: the base stays as it is, to the byte."""

import pytest
import torch
from tiny_models import BLOCK_SIZES, TOKEN_ROWS, bits_and_bytes, changed, save_chat_model, weights_of
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_stateless.trainer.optim_args import optimizer_names


peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

# PEFT and transformers know gradient checkpointing by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

PROMPT = torch.tensor([TOKEN_ROWS[0]["input_ids"]])
each_base = pytest.mark.parametrize("base", ["int8", "nf4"])
each_name = pytest.mark.parametrize("name", optimizer_names())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("chat"), **BLOCK_SIZES)


def adapted(folder, base, seed=0, dropout=0.1):
    """A quantised model under LoRA; the adapters are drawn from the seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, **bits_and_bytes(base))
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def train(model, name, output, resume=None, callbacks=(), **options):
    args = TrainingArguments(
        str(output),
        optim=name,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"learning_rate": 1e-2, "max_steps": 3, "save_steps": 2, **options},
    )
    trainer = Trainer(model, args, train_dataset=TOKEN_ROWS, eval_dataset=TOKEN_ROWS[:2], callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def quantised_layers(model):
    kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    return [module for module in model.modules() if isinstance(module, kinds)]


@each_name
@each_base
def test_adapters_train_and_resume_over_a_base_that_stays_as_it_is(base, name, folder, tmp_path):
    model = adapted(folder, base)
    assert len(quantised_layers(model)) == 7
    before = weights_of(model)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 14
    train(model, name, tmp_path)
    final = weights_of(model)
    # Everything else is codes, scales and the weights that are not quantised.
    assert changed(final, before) == trained
    resumed = train(adapted(folder, base, seed=1), name, tmp_path, str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3
    assert changed(weights_of(resumed.model), final) == set()

    model.save_pretrained(tmp_path / "saved")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", **bits_and_bytes(base))
    assert changed(weights_of(loaded), final) == set()
    # On CPUs with AVX512-BF16 bitsandbytes computes otherwise where a gradient is asked for, as of trained adapters.
    with torch.no_grad():
        expected, logits = model.eval()(PROMPT).logits, loaded.eval()(PROMPT).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sinkgd", "swan"])
@pytest.mark.parametrize("base", ["int8", "nf4_double"])
def test_adapters_are_merged_into_the_base_and_generate(base, name, folder, tmp_path):
    untrained = adapted(folder, base).eval()(PROMPT).logits
    model = adapted(folder, base)
    train(model, name, tmp_path, max_steps=10, save_strategy="no", learning_rate=5e-2)
    # A copy is asked for the logits, since an evaluation may repack the weights that are merged.
    model.save_pretrained(tmp_path / "saved")
    copy = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", **bits_and_bytes(base))
    expected = copy.eval()(PROMPT).logits
    merged = model.eval().merge_and_unload()
    assert len(quantised_layers(merged)) == 7
    # What rounding to the codes of the base costs, as a part of what was learnt.
    cost = (merged(PROMPT).logits - expected).norm() / (untrained - expected).norm()
    assert cost < {"int8": 0.05, "nf4_double": 0.25}[base]
    assert merged.generate(PROMPT, max_new_tokens=3, min_new_tokens=3).shape == (1, PROMPT.shape[1] + 3)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map={"": "cpu"})
    assert changed(weights_of(loaded), weights_of(merged)) == set()


@pytest.mark.parametrize("name", ["sinkgd", "sinkgd_layerwise"])
@each_base
def test_the_usual_preparation_and_checkpointing_change_nothing(base, name, folder, tmp_path):
    runs = []
    for prepared in (False, True):
        model = adapted(folder, base)
        if prepared:
            model = peft.prepare_model_for_kbit_training(model)
            for key, p in model.named_parameters():
                p.requires_grad_("lora_" in key)
        train(model, name, tmp_path, gradient_checkpointing=prepared, save_strategy="no")
        runs.append(weights_of(model))
    assert changed(*runs) == set()


class Gradients(TrainerCallback):
    """Keeps the gradients of the adapters before each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def packs_for_cpu(layer):
    return getattr(layer, "support_avx512bf16_for_cpu", False)


@each_base
def test_gradients_after_an_evaluation_are_those_without_it(base, folder, tmp_path, request):
    """Where the CPU has AVX512-BF16, an evaluation repacks 4-bit weights, and backward no longer passes through them.

    It is so in bitsandbytes 0.50, with any optimizer; when the mark fails, it is repaired, and the page can say so.
    """
    if base == "nf4" and any(map(packs_for_cpu, quantised_layers(adapted(folder, base)))):
        request.applymarker(pytest.mark.xfail(strict=True, reason="bitsandbytes repacks 4-bit weights in evaluation"))
    runs = []
    for evaluation in ("no", "steps"):
        gradients = Gradients()
        options = {"eval_strategy": evaluation, "eval_steps": 1, "save_strategy": "no"}
        # Evaluation draws random numbers, so that dropout would differ.
        trainer = train(adapted(folder, base, dropout=0), "sinkgd", tmp_path, callbacks=[gradients], **options)
        assert any("eval_loss" in entry for entry in trainer.state.log_history) == (evaluation == "steps")
        runs.append(gradients.steps)
    assert all(len(step) == 14 for steps in runs for step in steps)
    torch.testing.assert_close(*runs, rtol=0, atol=0)

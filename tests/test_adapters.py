"""Adapters of every kind train, merge and generate."""

import pytest
import torch
from finetuning_models import train
from tiny_models import TOKEN_ROWS, changed, weights_of
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


pytest_plugins = ["finetuning_models"]
peft = pytest.importorskip("peft")

# TRL asks for gradient checkpointing by the name that transformers is about to give up.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


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
        (
            lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
            "P_TUNING",
        ),
        (
            lambda: peft.PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8, prefix_projection=True
            ),
            "PREFIX_TUNING",
        ),
    ],
    ids=["adalora", "ia3", "prompt tuning", "P-tuning", "prefix tuning"],
)
def test_methods_that_train_no_linear_layer_are_refused_by_name(config, method, folders, tmp_path):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folders["SFT"]), config())
    message = rf"no trainable matrix.*PEFT's {method} .*Type optim=adamw_torch, or use LoraConfig"
    with pytest.raises(ValueError, match=message) as error:
        steps(model, "sinkgd", tmp_path)
    assert "\n" not in str(error.value)

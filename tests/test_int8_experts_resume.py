"""A Trainer over experts in 8 bits: what is resumed ends in the bytes of a run that was never stopped."""

import pytest
import torch
from expert_models import expert_model
from transformers import Trainer, TrainingArguments

import hf_stateless
from hf_stateless import Int8TrainingConfig
from hf_stateless.weights.int8.weight import Int8Weight


ROWS = [{"input_ids": [1 + (5 * i + 7 * j) % 31 for j in range(8)], "labels": [3] * 8} for i in range(16)]
RUNS = {
    "mixtral": ("swan_layerwise", "release=all"),
    "gpt_oss": ("sinkgd", None),
    "qwen3_moe": ("sinkgd", "embeddings=factored"),  # with its tables in 8 bits
}


def trained(folder, kind, resume=None, **settings):
    optim, options = RUNS[kind]
    config = Int8TrainingConfig(group_size=8, embeddings=bool(options and "embeddings" in options))
    model = hf_stateless.quantize(expert_model(kind), config)
    args = TrainingArguments(
        output_dir=folder, optim=optim, optim_args=options, learning_rate=0.01, per_device_train_batch_size=4,
        max_grad_norm=0, report_to=[], use_cpu=True, disable_tqdm=True, max_steps=4, **settings,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=ROWS).train(resume_from_checkpoint=resume)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_ends_in_the_same_bytes(kind, tmp_path):
    whole = trained(tmp_path, kind, save_steps=2)
    resumed = trained(tmp_path / "again", kind, resume=str(tmp_path / "checkpoint-2"), save_strategy="no")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    stacks = [p for p in expert_model(kind).parameters() if p.ndim == 3 and not isinstance(p, Int8Weight)]
    assert stacks

"""LoRA over stacks of experts in 8 bits: PEFT's own adapters of parameters, and those of linear layers."""

import copy

import peft
import pytest
import torch
from expert_models import expert_model

import hf_stateless
from hf_stateless import Int8TrainingConfig, create_optimizer
from hf_stateless.weights.int8.weight import Int8Weight


pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = torch.tensor([[3, 7, 1, 9, 30, 2, 5, 5, 8], [4, 4, 6, 1, 1, 2, 3, 9, 20]])
TARGETS = {
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "attention": {"target_modules": ["q_proj", "v_proj"]},
}


def adapted(model, targets):
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, **TARGETS[targets]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model


def in_float(model):
    plain = copy.deepcopy(model)
    return hf_stateless.dequantize(plain)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_adapters_train_over_frozen_stacks_and_merge(kind, targets):
    base = hf_stateless.quantize(expert_model(kind), Int8TrainingConfig(group_size=8))
    plain = adapted(in_float(base), targets)
    model = adapted(base, targets)
    losses = [m(input_ids=ROWS, labels=ROWS).loss for m in (model, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=2e-3)
    for loss in losses:
        loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    assert all("lora_" in name for name in got)
    for name, grad in got.items():
        scale = float(expected[name].abs().max())
        assert torch.allclose(grad.float(), expected[name].float(), atol=0.05 * scale)
    stored = {name: p.codes.clone() for name, p in model.named_parameters() if isinstance(p, Int8Weight)}
    optimizer = create_optimizer(model, "sinkgd", lr=1e-2)
    for _ in range(4):
        loss = model(input_ids=ROWS, labels=ROWS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < losses[0].item()
    assert all(torch.equal(p.codes, stored[n]) for n, p in model.named_parameters() if n in stored)
    logits = model.eval()(ROWS).logits
    merged = hf_stateless.dequantize(model).merge_and_unload()
    assert float((merged(ROWS).logits - logits).abs().max()) < 0.05 * float(logits.abs().max())

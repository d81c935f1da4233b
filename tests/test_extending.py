"""A new norm is one `Norm`, a new rule one `Rule`: each in one place, and trained with through `optim=`."""

import pytest
import torch
from conftest import TINY_MODELS, tiny_inputs
from transformers import Trainer, TrainingArguments

from hf_stateless import NORMS
from hf_stateless.norms.projections import Norm
from hf_stateless.optimizer.rule import Rule, counter
from hf_stateless.optimizer.rules import RULES


def trained(folder, optim, optim_args):
    """The parameters before and after two steps, and the optimizer."""
    model = TINY_MODELS["llama"]()
    rows = [{name: tensor[0] for name, tensor in tiny_inputs("llama").items()}] * 2
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = {"optim": optim, "optim_args": optim_args, "max_steps": 2, "learning_rate": 1e-2}
    fixed = {"report_to": [], "save_strategy": "no", "use_cpu": True, "per_device_train_batch_size": 1}
    trainer = Trainer(model=model, args=TrainingArguments(folder, **arguments, **fixed), train_dataset=rows)
    trainer.train()
    return before, dict(model.named_parameters()), trainer.optimizer.optimizer


def test_a_norm_is_added_in_one_place(tmp_path, monkeypatch):
    def signed_root(grad):
        root = grad.sign() * grad.abs().sqrt()
        return root / root.square().mean((-2, -1), keepdim=True).sqrt()

    monkeypatch.setitem(NORMS, "signed_root", Norm(signed_root))

    before, after, optimizer = trained(tmp_path, "multinorm", "norms=row_l2+signed_root")
    assert optimizer.param_groups[0]["norms"] == ("row_l2", "signed_root")
    moved = [name for name, p in after.items() if "_proj" in name and not torch.equal(p, before[name])]
    assert len(moved) == sum("_proj" in name for name in after)


def test_a_rule_is_added_in_one_place(tmp_path, monkeypatch):
    def update(entries, host):
        for entry in entries:
            entry.param.sub_(entry.group["step"] * entry.group["lr"] * entry.grad.sign())
        host.count(entries, [True] * len(entries))

    def state(param, group):
        return {"step": counter(param)}

    rule = Rule(update, state, state_bytes=lambda *_: 4, options={"step": 0.5}, for_tables=True)
    monkeypatch.setitem(RULES, "sign_descent", rule)

    before, after, optimizer = trained(tmp_path, "sinkgd", "embeddings=sign_descent")
    table = after["model.embed_tokens.weight"]
    moved = table.detach() - before["model.embed_tokens.weight"]
    assert [tuple(tensor.shape) for tensor in optimizer.state[table].values()] == [(1,)]
    assert moved.abs().max().item() == pytest.approx(0.5 * (1e-2 + 0.5e-2), rel=1e-4)  # two steps of a linear schedule

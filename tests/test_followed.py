"""Checkpoints of tables under any rule, resumed by runs that ask for none: they go on to the bit, and say so once."""

import copy
import io
import logging

import pytest
import torch
from layerwise_runs import loss_of, make, take_steps, weights_of
from torch import nn
from torch.distributed.checkpoint import save as save_distributed
from transformers.optimization import get_cosine_schedule_with_warmup

from hf_stateless import create_optimizer
from hf_stateless.optimizer.followed import said
from hf_stateless.optimizer.options import OPTIONS
from hf_stateless.optimizer.rules import RULES
from hf_stateless.trainer import sharded_resume


TABLES = [name for name, rule in RULES.items() if rule.for_tables]
DEFAULT = OPTIONS["embeddings"].default
# A rule that is not the default one, whichever that is.
OTHER = "adamw" if DEFAULT != "adamw" else "row_moment"
NAMES = {"sinkgd": {}, "swan": {}, "sinkgd_layerwise": {"release": "all"}}


def through_file(state):
    """As the Trainer saves and loads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def optimizer_for(model, name="sinkgd", **options):
    settings = {"lr": 1e-2, "weight_decay": 0.1, "adamw_beta1": 0.8, "adamw_eps": 1e-6}
    return create_optimizer(model, name, **{**settings, **NAMES[name], **options})


def train(model, optimizer, schedule, steps, key):
    for step in steps:
        optimizer.train()
        loss_of(model, key, step).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def resumed(key, name, dtype, asked, **options):
    """Weights and last state of four steps with `asked`, and of two with it and two more of a run with `options`."""
    finals = []
    for resumes in (False, True):
        model = make(key, dtype)
        optimizer = optimizer_for(model, name, **asked)
        schedule = get_cosine_schedule_with_warmup(optimizer, 1, 6)
        train(model, optimizer, schedule, range(2), key)
        if resumes:
            saved = through_file(optimizer.state_dict()), copy.deepcopy(schedule.state_dict())
            optimizer = optimizer_for(model, name, **options)
            schedule = get_cosine_schedule_with_warmup(optimizer, 1, 6)
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        train(model, optimizer, schedule, range(2, 4), key)
        finals.append((weights_of(model), optimizer.state_dict()))
    return finals


def assert_same(first, second):
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert first[1]["param_groups"] == second[1]["param_groups"]
    for i, state in first[1]["state"].items():
        assert state.keys() == second[1]["state"][i].keys()
        assert all(torch.equal(tensor, second[1]["state"][i][name]) for name, tensor in state.items())


def told(caplog):
    return [line for line in caplog.messages if "its tables go on so" in line]


@pytest.mark.parametrize("rule", TABLES)
@pytest.mark.parametrize("key", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_asks_for_nothing_goes_on_to_the_bit(rule, key, name, caplog):
    if rule == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    with caplog.at_level(logging.WARNING):
        assert_same(*resumed(key, name, torch.bfloat16, {"embeddings": rule}))
    assert len(told(caplog)) == (rule != DEFAULT)
    assert all(f'Type optim_args="embeddings={rule}"' in line for line in told(caplog))


@pytest.mark.parametrize("heads", ["adamw", "row_moment", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_and_embeddings_are_followed_each_on_its_own(heads, dtype, caplog):
    asked = {"embeddings": "column_moment", "heads": heads}
    assert_same(*resumed("llama", "sinkgd", dtype, asked))
    changed = ["embeddings=column_moment"] + [f"heads={heads}"] * (heads != DEFAULT)
    assert [f'"{",".join(changed)}"' in line for line in told(caplog)] == [True]
    caplog.clear()
    assert_same(*resumed("llama", "sinkgd", dtype, asked, heads=heads))  # asks for what the checkpoint has
    assert [line.count("heads=") for line in told(caplog)] == [0]


@pytest.mark.parametrize(
    ("saved", "options"),
    [
        ({"embeddings": "adamw"}, {"embeddings": "row_moment"}),
        ({"embeddings": "row_moment"}, {"embeddings": "adamw"}),
        ({"embeddings": "factored"}, {"embeddings": "row_moment"}),
        ({"embeddings": DEFAULT, "heads": OTHER}, {"heads": DEFAULT}),
        ({"embeddings": "stateless"}, {}),
        ({"embeddings": "stateless", "heads": "adamw"}, {}),
    ],
    ids=str,
)
def test_a_rule_that_was_asked_for_and_differs_is_refused_with_what_to_type(saved, options):
    model = make("llama")
    before = optimizer_for(model, **saved)
    take_steps(model, before, 1)
    after = optimizer_for(model, **options)
    groups = [group["algorithm"] for group in after.param_groups]
    asked = ",".join(f"{key}={value}" for key, value in saved.items())
    with pytest.raises(ValueError, match=rf'groups \(algorithm, parameters\).*embeddings \(optim_args="{asked}"\)'):
        after.load_state_dict(before.state_dict())
    assert [group["algorithm"] for group in after.param_groups] == groups
    assert not after.state


def test_a_checkpoint_that_is_refused_for_its_values_changes_no_rule():
    model = make("llama")
    before = optimizer_for(model, embeddings=OTHER)
    take_steps(model, before, 1)
    saved = before.state_dict()
    last = saved["param_groups"][-1]["params"][-1]
    saved["state"][last]["exp_avg"] = torch.full_like(saved["state"][last]["exp_avg"], torch.nan)
    after = optimizer_for(model)
    with pytest.raises(ValueError, match="not finite"):
        after.load_state_dict(saved)
    assert [group["algorithm"] for group in after.param_groups][1] == DEFAULT
    take_steps(model, after, 1)


def test_options_that_changed_beside_a_followed_rule_are_those_of_the_run(caplog):
    model = make("llama")
    before = optimizer_for(model, embeddings=OTHER, seed=3)
    take_steps(model, before, 1)
    after = optimizer_for(model, adamw_beta1=0.5, table_beta2=0.5, seed=4)
    after.load_state_dict(before.state_dict())
    group = after.param_groups[1]
    assert (group["algorithm"], group["seed"]) == (OTHER, 4)
    assert group["betas"] == (0.5, 0.999) if OTHER == "adamw" else group["table_beta2"] == 0.5
    assert sum("this run goes on with" in line for line in caplog.messages) == 1


def test_low_rank_factors_in_one_group_with_tables_are_refused_with_what_to_type():
    peft = pytest.importorskip("peft")

    def adapted():
        config = peft.LoraConfig(r=2, target_modules=["c_attn", "wte"], modules_to_save=["wpe"], fan_in_fan_out=True)
        return peft.get_peft_model(make("gpt2"), config)

    model = adapted()
    before = optimizer_for(model, embeddings=OTHER)
    take_steps(model, before, 1, "gpt2")
    with pytest.raises(ValueError, match=rf'optim_args="embeddings={OTHER}"'):
        optimizer_for(model).load_state_dict(before.state_dict())


@pytest.mark.parametrize("layout", ["distributed", "one file", "a file for each rank", "none", "no checkpoint"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_rules_are_taken_from_the_files_of_fsdp2_before_they_are_loaded(layout, wrapped, tmp_path, caplog):
    model = make("llama")
    before = optimizer_for(model, embeddings=OTHER)
    names = [name for group in before.param_groups for name in group["param_names"]]
    groups = [{**group, "params": group["param_names"]} for group in before.state_dict()["param_groups"]]
    state = {"state": {name: {"step": torch.zeros(1)} for name in names}, "param_groups": groups}
    if layout == "distributed":
        save_distributed({"optimizer": state}, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    elif layout != "none":
        name = "optimizer.bin" if layout == "one file" else "optimizer_0_rank0.bin"
        torch.save(state if layout != "no checkpoint" else {}, tmp_path / name)
    after = optimizer_for(model)
    wrapper = nn.Module()
    wrapper.optimizer = after
    sharded_resume.prepare(wrapper if wrapped else after, str(tmp_path), 0)
    follows = layout not in ("none", "no checkpoint")
    assert after.param_groups[1]["algorithm"] == (OTHER if follows else DEFAULT)
    assert len(told(caplog)) == follows
    if follows:
        asked = optimizer_for(model, embeddings=DEFAULT)
        with pytest.raises(ValueError, match=rf'this run has.*optim_args="embeddings={OTHER}"'):
            sharded_resume.prepare(asked, tmp_path, 0)


def test_other_optimizers_are_left_alone(tmp_path):
    torch.save({}, tmp_path / "optimizer.bin")
    sharded_resume.prepare(torch.optim.SGD([nn.Parameter(torch.zeros(2))]), tmp_path, 0)


def test_what_is_said_of_groups_is_what_may_be_typed():
    table = {"role": "embedding", "algorithm": "adamw"}
    head, bias = {"role": "head", "algorithm": "factored"}, {"role": "head", "algorithm": "adamw"}
    found = [said(groups) for groups in ([table], [table, bias], [head, bias], [bias, head, table], [], [{}])]
    assert found == ["embeddings=adamw"] * 2 + ["heads=factored", "embeddings=adamw,heads=factored", "", ""]

"""Which ways of sharding are refused by the optimizer's factory, with what to type, and which are taken."""

import shlex
from types import SimpleNamespace

import pytest
from factories import arguments, plain_environment, refusal  # noqa: F401
from torch import nn
from transformers import Trainer
from transformers.trainer_optimizer import OptimizerContext

from hf_stateless import StatelessOptimizer, SwanFactory, create_optimizer
from hf_stateless.optimizer.partitioned import PartitionedOptimizer
from hf_stateless.trainer.handler import handle


# TRL and PEFT read a name that transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def ask(model, name="sinkgd", **announced):
    """Call the handler with stand-ins for training arguments that need hardware or DeepSpeed to be made."""
    values = {"learning_rate": 1e-3, "weight_decay": 0.0, "optim_target_modules": None}
    args = SimpleNamespace(**values, gradient_accumulation_steps=1, **announced)
    adam = {"betas": (0.9, 0.999), "eps": 1e-8}
    return handle(name, OptimizerContext(args, model, {"lr": 1e-3}, adam, {}))


@pytest.mark.parametrize("announced", [{"deepspeed": "zero2.json"}, {"deepspeed": {}, "deepspeed_plugin": object()}])
def test_deepspeed_in_the_arguments_is_refused(make_model, announced):
    message = refusal(ask, make_model("llama"), **announced)
    assert message.startswith("DeepSpeed ZeRO hands the optimizer flat partitions")
    assert "fsdp_version: 2" in message


def test_deepspeed_of_accelerate_launch_is_refused(make_model, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "DeepSpeed ZeRO" in refusal(ask, make_model("llama"), deepspeed=None)


@pytest.mark.parametrize("file", ["zero2.json", "configs/my run.json", None])
@pytest.mark.parametrize("told", ["arguments", "environment"])
def test_the_refusal_of_deepspeed_names_what_converts_its_file(make_model, monkeypatch, file, told):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    if told == "environment" and file:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", file)
    message = refusal(ask, make_model("llama"), deepspeed=file if told == "arguments" else {"train_batch_size": 1})
    assert f"hf-stateless convert-config {shlex.quote(file) if file else 'CONFIG'} -o fsdp2.yaml" in message


# Environment of `accelerate launch`, what the arguments announce, and whether that is FSDP1.
SHARDING = [
    ({}, None, False),
    ({}, {"fsdp_version": 1}, True),
    ({}, {"fsdp_version": 2}, False),
    ({}, {"cpu_offload": True}, True),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, None, True),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, None, False),
    ({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, None, False),
    ({"FSDP_VERSION": "1"}, None, False),
    ({"ACCELERATE_USE_FSDP": "true"}, {"fsdp_version": 2}, False),
    ({"ACCELERATE_USE_FSDP": "true"}, None, False),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {"fsdp_version": 2}, False),
]


@pytest.mark.parametrize(("environment", "plugin", "refused"), SHARDING)
def test_fsdp1_is_refused_when_it_is_announced_and_fsdp2_is_not(make_model, monkeypatch, environment, plugin, refused):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not refused:
        assert ask(make_model("llama"), fsdp_plugin_args=plugin)[0] is StatelessOptimizer
        return
    message = refusal(ask, make_model("llama"), fsdp_plugin_args=plugin)
    assert message.startswith("FSDP1 flattens parameters")
    assert "hf-stateless convert-config CONFIG -o fsdp2.yaml" in message
    assert "fsdp_version: 2 in the accelerate config" in message
    assert "fsdp_config={'version': 2} in TrainingArguments" in message


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_version_of_the_training_arguments_decides(make_model, version):
    args = arguments("sinkgd", fsdp="full_shard", fsdp_config={"version": version})
    if version == 2:
        assert Trainer.get_optimizer_cls_and_kwargs(args, make_model("llama"))[0] is StatelessOptimizer
    else:
        assert "FSDP1" in refusal(Trainer.get_optimizer_cls_and_kwargs, args, make_model("llama"))


class FullyShardedDataParallel(nn.Module):
    """Stands in for FSDP1, which is known by the name of its class."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_model_wrapped_by_fsdp1_is_refused(make_model):
    wrapped = FullyShardedDataParallel(make_model("llama"))
    assert "FSDP1" in refusal(create_optimizer, wrapped, "sinkgd", lr=1e-3)
    inside = nn.Sequential(wrapped)
    assert "FSDP1" in refusal(SwanFactory(), inside, lr=1e-3)


ZERO_1 = {"zero_optimization": {"stage": 1}}
REFUSED = [
    ({"zero_optimization": {"stage": 4}}, "set zero_optimization.stage to 0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": "auto"}}, "stage auto is not known"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param to cpu"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights is not tested"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size is not tested"),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 4}}, "mics_shard_size is not tested"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer to cpu"),
    ({"zero_optimization": {"stage": 1, "offload_param": {"device": "nvme"}}}, "offload_param to nvme"),
    ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "leave it out of zero_optimization"),
    ({"fp16": {"enabled": True}}, "set zero_optimization.stage to 1, or type bf16=True"),
]


@pytest.mark.parametrize(("config", "told"), REFUSED)
def test_a_deepspeed_config_that_is_not_exact_is_refused_with_what_to_type(make_model, config, told):
    message = refusal(
        ask, make_model("llama"), deepspeed=config, deepspeed_plugin=SimpleNamespace(deepspeed_config=config)
    )
    assert told in message
    assert "fsdp_version: 2" in message


@pytest.mark.parametrize(
    "config",
    [
        ZERO_1,
        {},
        {"bf16": {"enabled": True}},
        {"zero_optimization": {"stage": 0}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
        {**ZERO_1, "bf16": {"enabled": True}},
        {**ZERO_1, "fp16": {"enabled": True}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1, "mics_shard_size": -1}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}, "sub_group_size": 1e9}},
    ],
)
def test_a_deepspeed_config_that_is_exact_gets_the_optimizer_of_parts(make_model, config):
    plugin = SimpleNamespace(deepspeed_config=config)
    assert ask(make_model("llama"), deepspeed=config, deepspeed_plugin=plugin)[0] is PartitionedOptimizer
    message = refusal(ask, make_model("llama"), name="sinkgd_layerwise", deepspeed=config, deepspeed_plugin=plugin)
    assert "leave out _layerwise" in message

"""`hf-stateless convert-config`: FSDP2 for a config of DeepSpeed or FSDP1, as accelerate's own code reads it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, prepare_multi_gpu_env
from config_files import AUTO, CPU, NONE, OFF, ON, ZERO2, accelerate_config, of_deepspeed, of_fsdp, written
from distributed_worker import train
from documents import ROOT
from torch.distributed.fsdp import CPUOffloadPolicy

from hf_stateless.run.convert.command import main
from hf_stateless.run.convert.deepspeed_keys import ADVICE, NO_MEANING
from hf_stateless.run.convert.files import convert_file


def environment_of(path, monkeypatch):
    """What `accelerate launch` tells each process of a config, put into this one."""
    words = ("--config_file", str(path), "--num_processes", "8", "script.py")
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    environment = prepare_multi_gpu_env(arguments)
    for key, value in environment.items():
        if key.startswith(("FSDP_", "ACCELERATE_", "PARALLELISM_")):
            monkeypatch.setenv(key, value)
    return environment


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """Convert a file; return accelerate's reading of the result, and of FSDP2 what a process makes of it."""

    def convert(values, name="config.yaml"):
        out = tmp_path / "out.yaml"
        assert main([str(written(tmp_path, values, name)), "-o", str(out), "--force"]) == 0
        config = load_config_from_file(str(out))
        environment_of(out, monkeypatch)
        return config, FullyShardedDataParallelPlugin() if config.distributed_type == DistributedType.FSDP else None

    return convert


def notes_of(tmp_path, values, name="config.json"):
    return "\n".join(convert_file(str(written(tmp_path, values, name))).notes)


def arguments_of(tmp_path, values, name="config.json"):
    return convert_file(str(written(tmp_path, values, name))).arguments


@pytest.mark.parametrize(("stage", "reshards"), [(1, False), (2, False), (3, True)])
@pytest.mark.parametrize("form", ["json", "inline", "words", "named"])
def test_a_stage_of_zero_is_a_way_of_fsdp2(stage, reshards, form, converted, tmp_path):
    inside = {"zero_optimization": {"stage": stage}, "train_batch_size": "auto"}
    if form == "json":
        config, plugin = converted(inside, "ds.json")
    elif form == "named":
        written(tmp_path, inside, "ds.json")
        config, plugin = converted(of_deepspeed(deepspeed_config_file="ds.json", zero3_init_flag=stage == 3))
    else:
        config, plugin = converted(of_deepspeed(zero_stage=str(stage) if form == "words" else stage))
    assert config.distributed_type == DistributedType.FSDP
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, reshards)
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == ("SHARDED_STATE_DICT" if stage == 3 else "FULL_STATE_DICT")
    assert config.num_processes == (-1 if form == "json" else 8)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"zero_optimization": {"stage": 0}}, "MULTI_GPU"),
        ({"zero_optimization": {}, "fp16": {"enabled": True}}, "MULTI_GPU"),
        ({"zero_optimization": False}, "MULTI_GPU"),
        ({"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}, "NO"),
        ({"zero_optimization": True}, "FSDP"),
    ],
)
def test_what_shards_nothing_is_plain_ddp_and_the_oldest_format_is_stage_1(values, kind, converted):
    assert converted(values, "ds.json")[0].distributed_type.value == kind


@pytest.mark.parametrize(
    ("blocks", "said", "precision"),
    [
        ({"bf16": ON}, None, "bf16"),
        ({"bf16": ON, "fp16": OFF}, "no", "bf16"),
        ({"fp16": {"enabled": "true", "loss_scale": 0}, "bf16": OFF}, None, "fp16"),
        ({"bfloat16": ON}, None, "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "torch.float16"}}, None, "fp16"),
        ({"bf16": AUTO, "fp16": AUTO}, "bf16", "bf16"),
        ({}, "fp16", "fp16"),
        ({"bf16": OFF, "fp16": OFF}, None, "no"),
        ({"bf16": AUTO, "fp16": OFF}, None, None),
        ({}, None, None),
    ],
)
def test_the_precision_is_that_of_the_file_or_left_to_the_training_arguments(blocks, said, precision, tmp_path):
    written(tmp_path, {**ZERO2, **blocks}, "ds.json")
    config = {**of_deepspeed(deepspeed_config_file=str(tmp_path / "ds.json")), "mixed_precision": said}
    result = convert_file(str(written(tmp_path, config, "config.yaml")))
    assert result.config.get("mixed_precision") == precision
    if blocks and precision in ("bf16", "fp16") and AUTO not in blocks.values():
        assert result.arguments[precision] is True


@pytest.mark.parametrize(
    ("zero", "offloads", "word"),
    [
        ({"stage": 3, "offload_param": CPU, "offload_optimizer": CPU}, True, None),
        ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/local"}}, True, "offload_param to nvme"),
        ({"stage": 3, "cpu_offload_params": True}, True, None),
        ({"stage": 3, "offload_optimizer": CPU}, False, "offload_optimizer to cpu"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, False, "offload_optimizer to nvme"),
        ({"stage": 2, "cpu_offload": True}, False, "offload_optimizer to cpu"),
        ({"stage": 2, "offload_param": CPU}, False, "stage 3 only"),
        ({"stage": 3, "offload_param": NONE, "offload_optimizer": NONE}, False, None),
        ({"stage": 3, "offload_param": None}, False, None),
    ],
)
def test_offload_of_weights_stays_and_the_rest_of_it_is_named(zero, offloads, word, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(CPUOffloadPolicy.__init__, "__defaults__", (False,))
    _, plugin = converted({"zero_optimization": zero}, "ds.json")
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == offloads
    notes = notes_of(tmp_path, {"zero_optimization": zero})
    assert (word in notes) if word else ("offload_optimizer to" not in notes and "offload_param to" not in notes)


CLIP = {"gradient_clipping": 0.5}
ADAMW = {"type": "AdamW", "params": {"lr": "3e-5", "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}}
AS_ADAMW = {"learning_rate": 3e-5, "adam_epsilon": 1e-6, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95}
LINEAR = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 99, "warmup_max_lr": 1e-3}}
AS_LINEAR = {"learning_rate": 1e-3, "warmup_steps": 10, "max_steps": 99, "lr_scheduler_type": "linear"}


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ({"gradient_accumulation_steps": 4, **CLIP}, {"gradient_accumulation_steps": 4, "max_grad_norm": 0.5}),
        ({"gradient_clipping": "auto", "gradient_accumulation_steps": "auto"}, {}),
        ({}, {}),
        ({"gradient_clipping": 0}, {"max_grad_norm": 0}),
        ({"train_micro_batch_size_per_gpu": 3, **CLIP}, {"per_device_train_batch_size": 3, "max_grad_norm": 0.5}),
        (
            {"gradient_clipping": "1.0", "dataloader_drop_last": True},
            {"max_grad_norm": 1, "dataloader_drop_last": True},
        ),
        ({**CLIP, "optimizer": ADAMW}, {"max_grad_norm": 0.5, **AS_ADAMW}),
        ({**CLIP, "scheduler": LINEAR}, {"max_grad_norm": 0.5, **AS_LINEAR}),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 2}}}, {"max_grad_norm": 2}),
    ],
)
def test_values_that_belong_to_the_training_arguments_are_printed_so(values, arguments, tmp_path):
    assert arguments_of(tmp_path, {**ZERO2, **values}) == arguments


def test_the_number_of_processes_comes_from_the_sizes_and_they_come_from_it(tmp_path, converted):
    sizes = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    config, _ = converted({**ZERO2, **sizes}, "ds.json")
    assert config.num_processes == 8
    for missing, argument, size in [(1, "per_device_train_batch_size", 4), (2, "gradient_accumulation_steps", 2)]:
        given = {key: value for index, (key, value) in enumerate(sizes.items()) if index != missing}
        written(tmp_path, {**ZERO2, **given}, "ds.json")
        named = of_deepspeed(deepspeed_config_file=str(tmp_path / "ds.json"))
        assert arguments_of(tmp_path, named, "config.yaml")[argument] == size


def example_of(key):
    """A config in which one key is set, at the place where DeepSpeed reads it."""
    *blocks, last = key.replace("zero.", "zero_optimization.").split(".")
    value = 12345
    for name in [last, *reversed(blocks)]:
        value = {name: value}
    values = {"train_batch_size": "auto", "zero_optimization": {"stage": 2}}
    for name, inside in value.items():
        values[name] = {**values[name], **inside} if isinstance(values.get(name), dict) else inside
    return values


CONVERTED = "zero.offload_param zero.offload_optimizer zero.gather zero.mics zero.cpu_offload bf16 fp16 torch_autocast"
LEFT = [
    key
    for keys in ADVICE.values()
    for key in keys.split()
    if not key.startswith(tuple(CONVERTED.split())) and key not in ("optimizer", "scheduler", "zero3_init_flag")
]


@pytest.mark.parametrize("unknown", ["bananas", "zero.stage4_wings", "optimiser.params.lr", "zero.stage3_new_knob"])
def test_a_key_that_nobody_knows_is_named(unknown, tmp_path):
    notes = notes_of(tmp_path, example_of(unknown))
    assert f"{unknown.replace('zero.', 'zero_optimization.')}: not known to this command" in notes


def test_every_known_key_is_named_with_what_to_type_and_what_is_off_is_not(tmp_path):
    for key in LEFT:
        notes = notes_of(tmp_path, example_of(key))
        assert key.replace("zero.", "zero_optimization.") in notes, key
        assert "not known" not in notes, key
    off = {"tensorboard": {**OFF, "output_path": "x"}, "sparse_attention": {}, "zero_optimization": {"stage": 2}}
    off["zero_optimization"] |= {"zero_quantized_weights": False, "zero_hpz_partition_size": 1}
    assert notes_of(tmp_path, {**off, "gradient_clipping": 1, "wall_clock_breakdown": False}) == ""


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("OneBitAdam", "1-bit messages"),
        ("ZeroOneAdam", "1-bit"),
        ("AdamW", "adamw_torch"),
        ("Lamb", "none of that name"),
    ],
)
def test_an_optimizer_of_deepspeed_becomes_a_name_to_type(kind, word, tmp_path):
    notes = notes_of(tmp_path, {**ZERO2, "optimizer": {"type": kind, "params": {"lr": 1}}})
    assert f"optimizer {kind}" in notes
    assert "type optim='sinkgd'" in notes
    assert word in notes


GATHER = {"stage3_gather_16bit_weights_on_model_save": "auto"}
TEMPLATE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        **GATHER,
        "offload_param": CPU,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
}


def test_auto_values_are_left_to_the_training_arguments(tmp_path):
    result = convert_file(str(written(tmp_path, TEMPLATE)))
    assert result.config["fsdp_config"]["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert result.arguments == {"lr_scheduler_type": "constant_with_warmup"}
    [line] = [note for note in result.notes if "TrainingArguments decides as before" in note]
    for name in ("fp16.enabled", "gradient_accumulation_steps", "gradient_clipping", "optimizer.params.lr", "betas"):
        assert name in line
    assert "zero_optimization.overlap_comm, reduce_bucket_size: " + NO_MEANING in "\n".join(result.notes)


STRATEGIES = {
    "FULL_SHARD": True,
    "SHARD_GRAD_OP": False,
    "HYBRID_SHARD": True,
    "HYBRID_SHARD_ZERO2": False,
    "full_shard": True,
    1: True,
    2: False,
    "4": True,
    5: False,
    None: True,
}


@pytest.mark.parametrize(("strategy", "reshards"), STRATEGIES.items())
@pytest.mark.parametrize("key", ["fsdp_sharding_strategy", "sharding_strategy", "fsdp_reshard_after_forward"])
def test_a_strategy_of_fsdp1_is_a_way_of_fsdp2(strategy, reshards, key, converted):
    block = {key: strategy} if strategy else {"fsdp_version": 1, "fsdp_use_orig_params": True}
    config, plugin = converted(of_fsdp(**block))
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, reshards)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert len(config.fsdp_config) == 4


def test_all_that_fsdp2_can_do_is_kept_and_the_rest_is_named(converted, tmp_path):
    kept = {
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer,LlamaMLP",
        "fsdp_activation_checkpointing": True,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_offload_params": False,
        "fsdp_ignored_modules": "lm_head",
    }
    gone = ["fsdp_use_orig_params", "fsdp_sync_module_states", "fsdp_backward_prefetch", "fsdp_limit"]
    values = of_fsdp(**kept, **dict.fromkeys(gone, "x"), fsdp_forward_prefetch=True, fsdp_sharding_strategy=1)
    config, plugin = converted(values)
    assert config.fsdp_config == {**kept, "fsdp_version": 2, "fsdp_reshard_after_forward": True}
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer", "LlamaMLP"]
    assert plugin.activation_checkpointing
    notes = notes_of(tmp_path, values, "config.yaml")
    assert all(key in notes for key in [*gone, "fsdp_forward_prefetch"])
    assert "fsdp_limit: accelerate reads no such key" in notes


def test_older_names_and_numbers_of_accelerate_are_read(converted, tmp_path):
    values = accelerate_config(
        "FSDP",
        fp16=True,
        dynamo_backend="NO",
        fsdp_config={"backward_prefetch_policy": 1, "state_dict_type": 2, "sharding_strategy": 2, "min_num_params": 20,
                     "transformer_layer_cls_to_wrap": ["A", "B"],
                     "auto_wrap_policy": "SIZE_BASED_WRAP"},
    )  # fmt: skip
    config, plugin = converted(values)
    assert (config.mixed_precision, plugin.min_num_params, plugin.reshard_after_forward) == ("fp16", 20, False)
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == "A,B"
    assert "FSDP2 has no LOCAL_STATE_DICT" in notes_of(tmp_path, values, "config.yaml")


@pytest.mark.parametrize("machines", [1, 2, 4])
def test_hybrid_shards_hold_one_model_on_each_machine(machines, converted, tmp_path):
    values = {
        **of_fsdp(fsdp_sharding_strategy="HYBRID_SHARD"),
        "num_machines": machines,
        "main_process_ip": "127.0.0.1",
    }
    config, _ = converted({**values, "main_process_port": 29511})
    sizes = [os.environ.get(f"PARALLELISM_CONFIG_DP_{name}_SIZE") for name in ("REPLICATE", "SHARD")]
    assert sizes == ([None, None] if machines == 1 else [str(machines), str(8 // machines)])
    mics = {"zero_optimization": {"stage": 3, "mics_shard_size": 8 // machines}, "train_batch_size": 8}
    mics |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    assert converted(mics, "ds.json")[0].parallelism_config == config.parallelism_config


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({**of_fsdp(), "deepspeed_config": {"zero_stage": 3}}, "deepspeed_config: left out"),
        ({**of_deepspeed(zero_stage=2), "fsdp_config": {"fsdp_version": 1}}, "fsdp_config: left out"),
        ({**of_fsdp(fsdp_sharding_strategy=4), "num_machines": 3}, "need the number of processes"),
        ({**of_fsdp(), "use_deepspeed": False, "my_key": 1}, "my_key, use_deepspeed: accelerate reads no such key"),
    ],
)
def test_what_a_file_says_in_vain_is_named(values, word, tmp_path):
    assert word in notes_of(tmp_path, values, "config.yaml")


def test_clipping_that_is_not_said_is_the_training_arguments_or_what_deepspeed_does(tmp_path):
    assert "type max_grad_norm=0" in notes_of(tmp_path, ZERO2)
    notes = notes_of(tmp_path, of_deepspeed(zero_stage=2), "config.yaml")
    assert "gradient_clipping: auto, TrainingArguments decides" in notes
    assert "max_grad_norm=0" not in notes


def test_accelerate_shards_as_zero_2_where_no_stage_is_said(converted):
    config, plugin = converted(of_deepspeed(gradient_accumulation_steps=2))
    assert (config.distributed_type, plugin.reshard_after_forward) == (DistributedType.FSDP, False)


def test_sequences_that_deepspeed_cuts_are_cut_by_accelerate(converted, tmp_path):
    sizes = {"dp_shard_size": 4, "sp_size": 2, "sp_backend": "deepspeed", "tp_size": 1}
    values = of_deepspeed(zero_stage=3)
    values["parallelism_config"] = {f"parallelism_config_{name}": size for name, size in sizes.items()}
    config, _ = converted(values)
    expected = {"dp_shard_size": 4, "tp_size": 1, "cp_size": 2}
    assert config.parallelism_config == {f"parallelism_config_{name}": size for name, size in expected.items()}
    assert "parallelism_config_cp_size: 2 cuts them" in notes_of(tmp_path, values, "config.yaml")


def test_no_shard_is_plain_ddp(converted, tmp_path):
    values = of_fsdp(fsdp_sharding_strategy="NO_SHARD", fsdp_activation_checkpointing=True, fsdp_offload_params=True)
    assert converted(values)[0].distributed_type == DistributedType.MULTI_GPU
    assert arguments_of(tmp_path, values, "config.yaml") == {"gradient_checkpointing": True}
    assert "fsdp_offload_params: DDP moves nothing" in notes_of(tmp_path, values, "config.yaml")


ZERO3 = {"stage": 3, "offload_param": CPU}
BLOCKS = {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_use_orig_params": False}
LAUNCHED = {
    "zero2": of_deepspeed(zero_stage=2),
    "fsdp1": of_fsdp(fsdp_sharding_strategy=1, **BLOCKS, fsdp_activation_checkpointing=True),
    "grad_op": of_fsdp(fsdp_sharding_strategy="SHARD_GRAD_OP", fsdp_cpu_ram_efficient_loading=False),
}


def test_a_launch_with_the_converted_config_trains_as_one_process_does(tmp_path, monkeypatch):
    """One launch, with ZeRO-3; the others change what accelerate tells its processes, as launches of them would."""
    sizes = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    path = written(tmp_path, {"zero_optimization": ZERO3, "gradient_clipping": 0.5, **sizes}, "ds.json")
    assert main([str(path), "-o", str(tmp_path / "fsdp2.yaml")]) == 0
    arguments = {"optim": "sinkgd", "max_steps": 4, **convert_file(str(path)).arguments}
    jobs = {"zero3": {"arguments": arguments}}
    for name, values in LAUNCHED.items():
        out = tmp_path / f"{name}.yaml"
        assert main([str(written(tmp_path, values, "config.yaml")), "-o", str(out)]) == 0
        with monkeypatch.context() as alone:
            told = {key: value for key, value in environment_of(out, alone).items() if key.startswith("FSDP_")}
        jobs[name] = {"arguments": arguments, "environment": told}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp2.yaml")]
    worker = [str(ROOT / "tests" / "distributed_worker.py"), str(tmp_path), str(tmp_path / "jobs.json")]
    words = [*launch, "--main_process_port", "0", *worker]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    one = train({"arguments": {**arguments, "per_device_train_batch_size": 2}}, tmp_path)
    results = torch.load(tmp_path / "0.pt", weights_only=True)
    assert set(results) == set(jobs)
    for name, launched in results.items():
        assert launched["world"] == 2
        assert len(launched["sharded"]) == len(launched["weights"]), name
        weights = {key.replace("_checkpoint_wrapped_module.", ""): p for key, p in launched["weights"].items()}
        torch.testing.assert_close(weights, one["weights"], rtol=1e-5, atol=1e-5)

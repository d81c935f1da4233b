"""The shipped accelerate configs, read by accelerate's own code, and the commands that their comments give."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, prepare_multi_gpu_env
from distributed_worker import train
from documents import ROOT
from packaging.requirements import Requirement
from torch.distributed.fsdp import CPUOffloadPolicy


FOLDER = ROOT / "recipes" / "accelerate_configs"
# What accelerate has to make of each file: type, processes, machines.
CONFIGS = {
    "cpu": (DistributedType.NO, 1, 1),
    "single_gpu": (DistributedType.NO, 1, 1),
    "ddp": (DistributedType.MULTI_GPU, 8, 1),
    "fsdp2": (DistributedType.FSDP, 8, 1),
    "fsdp2_multi_node": (DistributedType.FSDP, 16, 2),
}
SHARDED = [name for name, (kind, _, _) in CONFIGS.items() if kind == DistributedType.FSDP]


def path_of(name):
    return str(FOLDER / f"{name}.yaml")


def launch_arguments(*words):
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments


def commands_of(name):
    """The commands in the comments of a config, as words."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    comment = "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    joined = comment.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in joined if line.startswith("accelerate launch")]


@pytest.mark.parametrize(("version", "admitted"), [("1.10.1", False), ("1.11.0", True), (version("accelerate"), True)])
def test_the_floor_of_accelerate_is_the_oldest_that_was_tried(version, admitted):
    """LLaMA-Factory pins 1.11.0 and below; `tests/compat/transformers_versions.py accelerate==1.11.0` tries it."""
    [floor] = re.findall(r'"(accelerate>=[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert Requirement(floor).specifier.contains(version) == admitted


def test_every_config_of_the_folder_is_tested():
    assert sorted(CONFIGS) == sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_config_without_correcting_anything(name):
    kind, processes, machines = CONFIGS[name]
    config = load_config_from_file(path_of(name))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, processes, machines)
    assert config.use_cpu == (name == "cpu")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_in_the_comment_starts_what_the_config_says(name):
    kind, processes, machines = CONFIGS[name]
    [words] = commands_of(name)
    arguments = launch_arguments(*words[2:])
    assert arguments.config_file == f"recipes/accelerate_configs/{name}.yaml"
    assert (ROOT / arguments.training_script).exists()
    assert (arguments.num_processes, arguments.num_machines) == (processes, machines)
    assert bool(arguments.use_fsdp) == (kind == DistributedType.FSDP)
    assert bool(arguments.multi_gpu) == (kind == DistributedType.MULTI_GPU)


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_launch_is_fsdp2_with_a_policy_for_blocks(name, monkeypatch):
    flags = ("--machine_rank", "0", "--main_process_ip", "127.0.0.1") if name == "fsdp2_multi_node" else ()
    arguments = launch_arguments("--config_file", path_of(name), *flags, "script.py")
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert not isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"


def test_a_launch_on_the_cpu_trains_as_the_same_process_does(tmp_path):
    job = {"arguments": {"optim": "sinkgd", "max_steps": 3}}
    (tmp_path / "jobs.json").write_text(json.dumps({"sinkgd": job}))
    worker = ROOT / "tests" / "distributed_worker.py"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path_of("cpu")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(worker), str(tmp_path), str(tmp_path / "jobs.json")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    launched = torch.load(tmp_path / "0.pt", weights_only=True)["sinkgd"]
    assert launched["world"] == 1
    torch.testing.assert_close(launched["weights"], train(job, tmp_path)["weights"], rtol=1e-6, atol=1e-6)

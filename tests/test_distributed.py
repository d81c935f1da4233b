"""Whole Trainer runs on several gloo processes, started by `accelerate launch` with the shipped configs.

`accelerate launch --cpu --num_processes 2` runs one process, and accelerate ignores FSDP on the CPU, both silently:
every test here asserts the number of processes and which parameters were sharded.
"""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from distributed_worker import odd_llama, train
from documents import ROOT

from hf_stateless.trainer.optim_args import optimizer_names


CONFIGS = ROOT / "recipes" / "accelerate_configs"
WORKER = ROOT / "tests" / "distributed_worker.py"
LIMIT = 500  # seconds, for what hangs; a busy machine takes minutes
STATE_DICTS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
NAMES = {name: {"optim": name} for name in optimizer_names()}
ALL_RELEASED = {"optim": "sinkgd_layerwise", "optim_args": "release=all", "max_grad_norm": 0.0}
OPTIONS = {
    "stateless": {"optim": "sinkgd", "optim_args": "embeddings=stateless"},
    "stateless swan": {"optim": "swan", "optim_args": "embeddings=stateless"},
    "sinkhorn momentum": {"optim": "sinkgd", "optim_args": "embeddings=sinkhorn_momentum"},
    "everything released": ALL_RELEASED,
    "accumulated": {"optim": "sinkgd", "gradient_accumulation_steps": 2},
    "guarded": {"optim": "sinkgd", "optim_args": "min_signal=0.9"},
    "momentum": {"optim": "swan", "optim_args": "momentum=0.9,momentum_dtype=float32"},
    "layer-wise momentum": {"optim": "sinkgd_layerwise", "optim_args": "momentum=0.9,momentum_dtype=float32"},
}
EQUAL = {**NAMES, **OPTIONS}
# On four processes: ways that a matrix goes, and what they depend on. Other chains and options go the same ways.
ON_FOUR = {name: EQUAL[name] for name in ("swan", "sinkgd", "sinkgd_polar_layerwise", "stateless swan", "momentum")}
ON_FOUR |= {name: EQUAL[name] for name in ("accumulated", "guarded", "layer-wise momentum")}
DDP_ON_FOUR = {name: EQUAL[name] for name in ("swan", "sinkgd_layerwise", "everything released", "accumulated")}
DDP_ONLY = {
    **{f"bfloat16 {name}": {"dtype": "bfloat16", "arguments": {"optim": name}} for name in ("sinkgd", "swan")},
    "bfloat16 momentum": {"dtype": "bfloat16", "arguments": {"optim": "swan", "optim_args": "momentum=0.9"}},
    "not split": {"arguments": {"optim": "swan", "optim_args": "split_whitening=false"}},
}
FSDP2_ONLY = {
    "offloaded": {"environment": {"FSDP_OFFLOAD_PARAMS": "true"}, "arguments": {"optim": "sinkgd"}},
    "offloaded swan": {"environment": {"FSDP_OFFLOAD_PARAMS": "true"}, "arguments": {"optim": "swan"}},
    "mixed precision": {"arguments": {"optim": "sinkgd", "bf16": True}},
}
SAVED = {"partly stateless": NAMES["sinkgd"], "fully stateless": OPTIONS["stateless"], "swan": NAMES["swan"]}
SAVED["guarded"] = OPTIONS["guarded"]
# Rounded to nearest, since ranks draw noise of their own: another number of them has to come to the same weights.
SAVED["int8 momentum"] = {"optim": "sinkgd", "optim_args": "momentum=0.9,stochastic_rounding=false"}
STEPS_SAVED, SAVED_AT = 6, 3
MOMENTS = ("step", "checkpoint")  # in which a rank is killed
KILLED = {**SAVED["partly stateless"], "max_steps": STEPS_SAVED}
SHARDED = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
# What a run asks for whose checkpoint is resumed by one that asks for nothing: one of the two is not the default.
FOLLOWED = {"optim": "sinkgd", "optim_args": "embeddings=row_moment,heads=adamw"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(config, folder, *flags):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    return [*launch, "--mixed_precision", "no", *flags, str(WORKER), str(folder), str(folder / "jobs.json")]


def start(config, folder, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / f"log{len(list(folder.glob('log*')))}.txt").open("w") as log:
        return subprocess.Popen(
            command(config, folder, *flags), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def logs(folder):
    return "\n".join(path.read_text()[-6000:] for path in sorted(folder.glob("log*")))


def launch(config, folder, jobs, world):
    """Run jobs on some processes, and return what each rank got."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    flags = ("--num_processes", str(world), "--main_process_port", str(free_port()))
    assert start(config, folder, *flags).wait(LIMIT) == 0, logs(folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def checkpoint_jobs(kind, case, saved=None, resumed=None):
    """A run that saves half-way, and one that resumes from there."""
    options = {**(saved or SAVED[case]), "max_steps": STEPS_SAVED}
    environment = {"FSDP_STATE_DICT_TYPE": kind}
    folder = f"{kind} {case}".replace(" ", "_")
    saving = {"arguments": {**options, "save_strategy": "steps", "save_steps": SAVED_AT}}
    resuming = {
        "arguments": {**(resumed or options), "max_steps": STEPS_SAVED},
        "resume": f"{folder}/checkpoint-{SAVED_AT}",
    }
    return {
        f"{kind} {case} straight": {**saving, "environment": environment, "folder": folder},
        f"{kind} {case} resumed": {**resuming, "environment": environment, "folder": f"{folder}_resumed"},
    }


def fsdp2_jobs():
    jobs = {case: {"arguments": options} for case, options in EQUAL.items()}
    for kind in STATE_DICTS:
        for case in SAVED:
            jobs |= checkpoint_jobs(kind, case)
        jobs |= checkpoint_jobs(kind, "followed", FOLLOWED, NAMES["sinkgd"])
    return {**jobs, **FSDP2_ONLY}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def ddp(folder):
    jobs = {**{case: {"arguments": options} for case, options in EQUAL.items()}, **DDP_ONLY}
    return launch("ddp.yaml", folder / "ddp", jobs, 2)


@pytest.fixture(scope="module")
def fsdp2(folder):
    return launch("fsdp2.yaml", folder / "fsdp2", fsdp2_jobs(), 2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The weights that one process gets for some options, each trained once."""
    done = {}

    def weights(options):
        key = json.dumps(options)
        if key not in done:
            done[key] = train({"arguments": options}, tmp_path_factory.mktemp("alone"))["weights"]
        return done[key]

    return weights


def assert_same(actual, expected, tolerance=0.0):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_trained(weights):
    start = dict(odd_llama().named_parameters())
    assert all((weights[name].float() - p).abs().max() > 1e-3 for name, p in start.items())


def assert_equals_one_process(results, case, expected):
    for of_rank in results:
        assert_same(of_rank[case]["weights"], expected, 1e-5)
        assert of_rank[case]["world"] == len(results)
    assert_trained(expected)


@pytest.mark.parametrize("case", EQUAL)
def test_ddp_equals_one_process(case, ddp, alone):
    assert_equals_one_process(ddp, case, alone(EQUAL[case]))
    assert ddp[0][case]["sharded"] == []
    assert_same(ddp[0][case]["weights"], ddp[1][case]["weights"])


@pytest.mark.parametrize("case", EQUAL)
def test_fsdp2_equals_one_process(case, fsdp2, alone):
    assert_equals_one_process(fsdp2, case, alone(EQUAL[case]))
    assert len(fsdp2[0][case]["sharded"]) == len(list(odd_llama().parameters()))


@pytest.mark.parametrize("case", [case for case in DDP_ONLY if case.startswith("bfloat16")])
def test_replicas_in_bfloat16_are_equal_to_the_bit(case, ddp):
    assert_same(ddp[0][case]["weights"], ddp[1][case]["weights"])
    assert_trained(ddp[0][case]["weights"])


def test_replicas_split_the_whitening_by_default_and_get_the_same_bits(ddp):
    assert ddp[0]["swan"]["split"] is True
    assert ddp[0]["not split"]["split"] is False
    assert_same(ddp[0]["swan"]["weights"], ddp[0]["not split"]["weights"])


@pytest.mark.parametrize("case", [case for case in FSDP2_ONLY if case.startswith("offloaded")])
def test_fsdp2_with_offloaded_parameters_equals_one_process(case, fsdp2, alone):
    assert_equals_one_process(fsdp2, case, alone(FSDP2_ONLY[case]["arguments"]))


def test_fsdp2_in_mixed_precision_keeps_float32_weights_near_those_of_one_process(fsdp2, alone):
    expected = alone(NAMES["sinkgd"])
    for of_rank in fsdp2:
        weights = of_rank["mixed precision"]["weights"]
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        start = dict(odd_llama().named_parameters())
        moved = sum((expected[name] - p).square().sum() for name, p in start.items()).sqrt()
        apart = sum((expected[name] - weight).square().sum() for name, weight in weights.items()).sqrt()
        assert apart < 0.3 * moved  # bfloat16 has 8 bits, and AdamW turns small gradients into whole steps
    assert_same(fsdp2[0]["mixed precision"]["weights"], fsdp2[1]["mixed precision"]["weights"])


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("kind", STATE_DICTS)
def test_fsdp2_resumes_to_the_bit(kind, case, fsdp2):
    for of_rank in fsdp2:
        resumed = of_rank[f"{kind} {case} resumed"]
        assert_same(resumed["weights"], of_rank[f"{kind} {case} straight"]["weights"])
        assert (resumed["state_shapes"] == [(1,)]) == (case == "fully stateless")
        assert_same(resumed["norms"], of_rank[f"{kind} {case} straight"]["norms"])
        assert [norms.count_nonzero() for norms in resumed["norms"]] == [STEPS_SAVED] * (case == "guarded")
    assert_trained(resumed["weights"])


@pytest.mark.parametrize("kind", STATE_DICTS)
def test_fsdp2_goes_on_with_the_tables_of_a_checkpoint_where_nothing_is_asked_for(kind, fsdp2, folder):
    for of_rank in fsdp2:
        resumed, straight = (of_rank[f"{kind} followed {part}"] for part in ("resumed", "straight"))
        assert_same(resumed["weights"], straight["weights"])
        assert resumed["state_shapes"] == straight["state_shapes"]
    assert "its tables go on so" in logs(folder / "fsdp2")


@pytest.fixture(scope="module")
def four(folder, fsdp2):
    """Some runs on four processes, and the checkpoints of two processes resumed on four."""
    jobs = {case: {"arguments": options} for case, options in ON_FOUR.items()}
    for kind in STATE_DICTS:
        for case in SAVED:
            job = checkpoint_jobs(kind, case)[f"{kind} {case} resumed"]
            jobs[f"{kind} {case}"] = {**job, "resume": str(folder / "fsdp2" / job["resume"])}
    return launch("fsdp2.yaml", folder / "four", jobs, 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_FOUR)
def test_fsdp2_on_four_processes_equals_one(case, four, alone):
    assert_equals_one_process(four, case, alone(EQUAL[case]))


@pytest.mark.slow
@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("kind", STATE_DICTS)
def test_a_checkpoint_of_two_processes_resumes_on_four(kind, case, four, fsdp2):
    expected = fsdp2[0][f"{kind} {case} straight"]["weights"]
    for of_rank in four:
        assert_same(of_rank[f"{kind} {case}"]["weights"], expected, 1e-5)


@pytest.fixture(scope="module")
def ddp_of_four(folder):
    jobs = {case: {"arguments": options} for case, options in DDP_ON_FOUR.items()}
    return launch("ddp.yaml", folder / "ddp_of_four", jobs, 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", DDP_ON_FOUR)
def test_ddp_on_four_processes_equals_one(case, ddp_of_four, alone):
    assert_equals_one_process(ddp_of_four, case, alone(EQUAL[case]))


@pytest.mark.slow
def test_two_machines_equal_one_process(folder, alone):
    """Two launches on one machine, which meet on the loopback address as two machines would."""
    here = folder / "two_machines"
    here.mkdir()
    (here / "jobs.json").write_text(json.dumps({name: {"arguments": NAMES[name]} for name in ("sinkgd", "swan")}))
    port = str(free_port())
    machines = [
        start(
            "fsdp2_multi_node.yaml",
            here,
            *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
            *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
        )
        for rank in range(2)
    ]
    assert [machine.wait(LIMIT) for machine in machines] == [0, 0], logs(here)
    results = [torch.load(here / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in ("sinkgd", "swan"):
        assert_equals_one_process(results, name, alone(NAMES[name]))


def last_complete_checkpoint(folder):
    """The Trainer writes its own state last."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.split("-")[1]))


def killed_in(moment, here):
    """The last complete checkpoint of a run of which one rank was killed."""
    here.mkdir()
    job = {"arguments": {**KILLED, "save_strategy": "steps", "save_steps": 1}, "environment": SHARDED}
    job["die"] = {"rank": 1, "in": moment, "after": SAVED_AT}
    (here / "jobs.json").write_text(json.dumps({"killed": job}))
    flags = ("--num_processes", "2", "--main_process_port", str(free_port()))
    assert start("fsdp2.yaml", here, *flags).wait(LIMIT) != 0, logs(here)
    assert not list(here.glob("*.pt"))
    return last_complete_checkpoint(here / "run")


@pytest.fixture(scope="module")
def after_a_kill(folder):
    """By moment the last complete checkpoint, and what each rank gets that goes on from there: one launch for all."""
    checkpoints = {moment: killed_in(moment, folder / f"killed_in_{moment}") for moment in MOMENTS}
    jobs = {
        moment: {"arguments": KILLED, "environment": SHARDED, "resume": str(checkpoint)}
        for moment, checkpoint in checkpoints.items()
    }
    return checkpoints, launch("fsdp2.yaml", folder / "after_a_kill", jobs, 2)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_killed_rank_the_others_end_and_the_last_complete_checkpoint_resumes(moment, after_a_kill, fsdp2):
    checkpoints, resumed = after_a_kill
    assert checkpoints[moment].name == f"checkpoint-{SAVED_AT}"
    for of_rank, straight in zip(resumed, fsdp2, strict=True):
        expected = straight["SHARDED_STATE_DICT partly stateless straight"]["weights"]
        assert_same(of_rank[moment]["weights"], expected)

"""Pushes over real HTTP to a Hub on the loopback interface: whole models, repeated pushes, and networks that fail."""

import datetime
import email.utils
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from documents import ROOT
from hub_server import TOKEN

from hf_stateless.reports.card.hub_client import LONGEST_WAIT, _bound_waits, seconds_asked
from hf_stateless.reports.card.pushing import is_transient


pytest_plugins = ["push_places"]

PUSHED = {"README.md", "card_data.json", "config.json", "generation_config.json", "memory_report.json"}
PUSHED |= {"loss.png", "memory.png", "model.safetensors", "trainer_state.json"}


@pytest.fixture(autouse=True)
def no_fault_is_left(hub):
    yield
    left = [fault for fault in hub.faults if fault.times]
    hub.faults.clear()
    assert left == [], "a fault was never met"


def test_a_pushed_model_equals_the_one_on_disk(hub, worker):
    assert worker.train_and_push("runs/plain", push_to_hub=True) is None
    assert set(hub.repository("tester/plain").files) == PUSHED
    assert hub.requests("PUT", "/_lfs/") >= 2, "weights and picture go through large-file upload"
    assert worker.equal_to_disk("tester/plain", "runs/plain")
    metadata = worker.card("tester/plain")
    assert metadata["datasets"] == ["someone/counting"]
    assert {"hf_stateless", "sinkgd"} <= set(metadata["tags"])


def test_an_8_bit_model_is_pushed_as_it_is_stored_and_its_card_says_what_to_install(hub, worker, folder):
    options = {"optim": "sinkgd_layerwise", "bf16": True, "optim_args": "embeddings=stateless"}
    assert worker.train_and_push("runs/int8", kind="int8", push_to_hub=True, **options) is None
    repository = hub.repository("tester/int8")
    assert set(repository.files) == PUSHED
    assert repository.files["model.safetensors"] == (folder / "runs/int8/model.safetensors").read_bytes()
    assert worker.equal_to_disk("tester/int8", "runs/int8", in_8_bits=True)
    quick_start = repository.files["README.md"].decode().split("```python\n")[1]
    assert "pip install compressed-tensors" in quick_start.splitlines()[0]
    assert "import hf_stateless" not in quick_start


def test_pushing_again_makes_no_new_commit(hub, worker):
    assert worker.train_and_push("runs/twice", push_to_hub=True, times=2) is None
    assert [commit.title for commit in hub.repository("tester/twice").commits] == ["initial commit", "End of training"]


def test_a_failing_network_is_waited_for(hub, worker):
    hub.fail("POST", "/validate-yaml", status=500)  # not repeated by huggingface_hub
    hub.fail("POST", "/objects/batch", status=429, headers={"Retry-After": "0"})  # repeated by huggingface_hub
    hub.fail("PUT", "/_lfs/", cut_after=1000)
    hub.fail("POST", "/commit/main", status=503)
    uploads = hub.requests("PUT", "/_lfs/")
    assert worker.train_and_push("runs/rough", push_to_hub=True, waits=[0.1, 0.1, 0.1], learning_rate=0.01) is None
    assert hub.requests("PUT", "/_lfs/") - uploads == 4, "weights, two pictures, and one of them again"
    assert set(hub.repository("tester/rough").files) == PUSHED
    assert worker.equal_to_disk("tester/rough", "runs/rough")


def typed(message, folder, environment):
    """Type the command that a failed push tells, where it was told."""
    command = message.rsplit("push it later with: ", 1)[1]
    program = folder / "bin" / "hf-stateless"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/hf_stateless/run/command.py" "$@"\n')
    program.chmod(0o755)
    environment = {**environment, "PATH": os.pathsep.join([str(program.parent), os.environ["PATH"]])}
    subprocess.run([shutil.which("bash"), "-c", command], cwd=folder, env=environment, check=True, timeout=120)


def test_a_push_that_fails_leaves_the_model_and_a_command_that_works(hub, worker, folder):
    hub.fail("POST", "/validate-yaml", status=503, times=3)
    message = worker.train_and_push("runs/later", push_to_hub=True, waits=[0.1, 0.1])
    assert "not pushed to tester/later after 3 attempts" in message
    assert hub.repository("tester/later").files == {}
    typed(message, folder, hub.environment())
    assert set(hub.repository("tester/later").files) == PUSHED
    assert worker.equal_to_disk("tester/later", "runs/later")


def test_a_refusal_is_told_at_once(hub, worker):
    hub.fail("POST", "/commit/main", status=403)
    message = worker.train_and_push("runs/refused", push_to_hub=True, waits=[60.0])
    assert "after 1 attempts: " in message
    assert "403" in message


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_optimizer_state_is_pushed_only_if_checkpoints_are_asked_for(strategy, hub, worker):
    options = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": strategy, "hub_always_push": True}
    assert worker.train_and_push(f"runs/{strategy}", push_to_hub=True, **options) is None
    repository = hub.repository(f"tester/{strategy}")
    ever = {path for commit in repository.commits for path in commit.files}
    assert len(repository.commits) > 2, "it pushed while it trained"
    assert {path for path in ever if "optimizer" in path} == (
        {"last-checkpoint/optimizer.pt"} if strategy == "checkpoint" else set()
    )


def test_the_trainers_own_push_has_the_section_once(hub, worker):
    assert worker.train_and_push("runs/own", push_to_hub=True, way="trainer", times=2) is None
    text = hub.repository("tester/own").files["README.md"].decode()
    assert text.count("## Memory report") == text.count("<!-- hf_stateless:memory-report -->") == 1
    assert "memory_report.json" in hub.repository("tester/own").files


def test_an_adapter_is_pushed_with_its_base_model(hub, worker):
    worker.save_base("base")
    worker.push_base("base", "tester/base")
    assert worker.train_and_push("runs/adapter", kind="sft", base="tester/base", push_to_hub=True) is None
    files = set(hub.repository("tester/adapter").files)
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= files
    assert not any("optimizer" in path or path == "model.safetensors" for path in files)
    assert worker.equal_to_disk("tester/adapter", "runs/adapter", adapter=True)
    metadata = worker.card("tester/adapter")
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("tester/base", "adapter")
    assert (metadata["license"], metadata["library_name"]) == ("mit", "peft")


def test_nothing_private_is_pushed(hub, worker, folder):
    worker.save_base("private/base")
    base = str(folder / "private" / "base")
    assert worker.train_and_push("runs/quiet", kind="sft", base=base, push_to_hub=True, hub_token=TOKEN) is None
    private = [TOKEN, str(folder), str(folder.parent), str(Path.home()) + "/"]
    files = hub.repository("tester/quiet").files
    told = [(name, secret) for name, data in files.items() for secret in private if secret.encode() in data]
    assert told == []
    assert b'"base_model_name_or_path": "base"' in files["adapter_config.json"]
    local = (folder / "runs" / "quiet" / "adapter_config.json").read_text(encoding="utf-8")
    assert base in local, "the folder on disk still loads"


@pytest.mark.parametrize("way", ["ours", "trainer"])
def test_a_token_among_the_arguments_opens_the_hub_and_is_in_no_file(way, hub, worker, folder):
    options = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "checkpoint", "hub_always_push": True}
    name = f"token_{way}"
    push = worker.train_and_push_without_variable
    assert push(f"runs/{name}", push_to_hub=True, way=way, hub_token=TOKEN, **options) is None
    commits = hub.repository(f"tester/{name}").commits
    pushed = {path: data for commit in commits for path, data in commit.files.items()}
    assert {"last-checkpoint/optimizer.pt", "model.safetensors"} <= set(pushed), "it was pushed during training"
    assert not any(path.endswith("training_args.bin") for path in pushed)
    saved = [path for path in (folder / "runs" / name).rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in saved)
    assert not any(TOKEN.encode() in data for data in (*pushed.values(), *(path.read_bytes() for path in saved)))


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError(), True),
        (ConnectionError("Server error: Request error: HTTP status server error (503 Service Unavailable), x"), True),
        (ConnectionError("Network error: Request error: HTTP status client error (401 Unauthorized), x"), False),
        (TimeoutError(), True),
        (ValueError("Invalid metadata in README.md."), False),
        (FileNotFoundError(), False),
        (KeyError("x"), False),
    ],
)
def test_what_passes_by_itself(error, transient):
    assert is_transient(error) is transient


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("30", 30.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("0", 0.0),
        ("864000", LONGEST_WAIT),
        ("9" * 5000, LONGEST_WAIT),
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST_WAIT),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        *((text, 0.0) for text in ("", "-5", "nan", "inf", "-inf", "1e9", "\u00b2", "0x10", "soon", "1,5")),
        ("Xyz, 99 Foo", 0.0),
    ],
)
def test_what_a_busy_hub_asks_for_is_bounded(header, seconds):
    assert seconds_asked(header) == seconds


def test_a_date_to_come_back_at_is_understood():
    moment = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=60)
    assert seconds_asked(email.utils.format_datetime(moment, usegmt=True)) == pytest.approx(60, abs=3)


@pytest.mark.parametrize(
    ("header", "bounded"),
    [
        ({"Retry-After": "864000"}, {"Retry-After": "300"}),
        ({"Retry-After": "nan"}, {"Retry-After": "0"}),
        ({"ratelimit": '"api";r=0;t=864000'}, {"ratelimit": '"api";r=0;t=300'}),
        ({"ratelimit": '"api";r=0;t=' + "9" * 5000}, {"ratelimit": '"api";r=0;t=300'}),
        ({"ratelimit": '"api";r=0;t=55'}, {"ratelimit": '"api";r=0;t=55'}),
        ({"other": "1"}, {"other": "1"}),
    ],
)
def test_huggingface_hub_sees_bounded_waits(header, bounded):
    response = SimpleNamespace(headers=dict(header))
    _bound_waits(response)
    assert response.headers == bounded


@pytest.mark.parametrize(
    ("path", "header"),
    [
        ("/objects/batch", {"Retry-After": "864000"}),
        ("/commit/main", {"ratelimit": '"api";r=0;t=864000'}),
        ("/repos/create", {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}),
    ],
)
def test_no_push_sleeps_for_days(path, header, hub, worker):
    hub.fail("POST", path, status=429, headers=header, times=2)
    name = f"days-{path.rsplit('/', 1)[1]}"
    message, slept = worker.train_and_push_impatiently(
        f"runs/{name}", push_to_hub=True, later=True, waits=[0.1, 0.1], longest_wait=3.0
    )
    assert message is None
    assert len(slept) >= 2
    assert max(slept) <= 4.0
    assert set(hub.repository(f"tester/{name}").files) == PUSHED


@pytest.mark.parametrize("status", [429, 500, 504])
def test_making_the_repository_is_tried_again_before_training(status, hub, worker):
    hub.fail("POST", "/repos/create", status=status, times=2)
    assert worker.train_and_push(f"runs/made{status}", push_to_hub=True, later=True, waits=[0.1, 0.1]) is None
    assert set(hub.repository(f"tester/made{status}").files) == PUSHED


def test_a_hub_that_is_away_at_first_gets_the_model_at_the_end(hub, worker):
    hub.fail("POST", "/repos/create", status=503, times=2)
    options = {"save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
    assert worker.train_and_push("runs/away", push_to_hub=True, later=True, waits=[0.1], **options) is None
    assert [commit.title for commit in hub.repository("tester/away").commits] == ["initial commit", "End of training"]


def test_a_wrong_token_ends_it_before_training(hub, worker, folder):
    message = worker.train_and_push("runs/wrong", push_to_hub=True, later=True, hub_token="hf_wrong", waits=[60.0])
    assert message.startswith("no repository wrong on the Hub, nothing was trained: ")
    assert "401" in message
    assert "hf_wrong" not in message
    assert not (folder / "runs" / "wrong" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/validate-yaml", {"silent_for": 60.0}),
        ("/preupload/", {"silent_for": 60.0}),
        ("/objects/batch", {"half_answer": True}),
        ("/validate-yaml", {"half_answer": True}),
        ("/preupload/", {"cut_after": 10}),
    ],
)
def test_silence_and_half_answers_end_in_the_command_for_later(path, fault, hub, worker):
    hub.fail("POST", path, times=1000, **fault)
    name = f"{next(iter(fault))}{path.strip('/').replace('/', '-')}"
    message, _ = worker.train_and_push_impatiently(f"runs/{name}", push_to_hub=True, waits=[0.1], silence=0.2)
    hub.faults.clear()
    assert message.startswith(f"not pushed to tester/{name} after 2 attempts: ")
    assert f"push it later with: hf-stateless push runs/{name} tester/{name}" in message
    assert "\n" not in message


def test_a_token_that_must_be_an_argument_is_one_now_and_later(hub, worker, folder):
    options = {"push_to_hub": True, "hub_token": TOKEN, "implicit_token": False, "later": True}
    for kind, way in (("trainer", "ours"), ("trainer", "trainer")):
        message, _ = worker.train_and_push_impatiently(f"runs/explicit{way}", kind, way=way, **options)
        assert message is None
    hub.fail("POST", "/commit/main", status=403)
    message, _ = worker.train_and_push_impatiently("runs/forbidden", **options)
    assert TOKEN not in message
    typed(message, folder, {**hub.environment(), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})
    assert set(hub.repository("tester/forbidden").files) == PUSHED

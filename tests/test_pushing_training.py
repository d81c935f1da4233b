"""Pushes at the saves of a training, to a Hub on the loopback interface that fails in each place."""

import hashlib
import shlex
from pathlib import Path

import pytest
from hub_server import TOKEN
from push_worker import Worker


pytest_plugins = ["push_places"]

MODEL = {"config.json", "generation_config.json", "model.safetensors", "trainer_state.json"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
SAVING = {"save_strategy": "steps", "save_steps": 1, "hub_always_push": True, "push_to_hub": True}


@pytest.fixture(autouse=True)
def no_fault_is_left(hub):
    yield
    hub.faults.clear()


def private_bytes(folder):
    """What none of the received bytes may hold."""
    return [text.encode() for text in (TOKEN, str(folder), str(folder.parent), f"{Path.home()}/", "s3cret-value")]


@pytest.mark.parametrize(
    ("strategy", "way"),
    [("end", "trainer"), ("every_save", "ours"), ("checkpoint", "trainer"), ("all_checkpoints", "ours")],
)
def test_each_strategy_sends_what_it_says_and_nothing_of_this_machine(strategy, way, hub, worker, folder):
    name = f"{strategy}-{way}"
    place = str(folder / "deep" / name)  # absolute: that is how paths come into files
    since = len(hub.bodies)
    notes = f"trained in {folder}/deep with {TOKEN}, from file://{folder}/deep and ~/.cache; s3cret-value"
    planted = {
        f"{place}/notes.md": notes.replace("s3cret-value", "done"),
        f"{place}/.env": f"KEY=s3cret-value {TOKEN}",
    }
    planted[f"{place}/eval_results.json"] = f'{{"loss": 1.5, "data": "{folder}/deep/rows.json", "{TOKEN}": 1}}'
    planted[f"{place}/runs/Nov_host/events.out.tfevents.1.host.2.0"] = notes
    planted[f"{place}/tokens/tokenizer.json"] = f'{{"vocab": ["{folder}"]}}'
    worker.plant(
        {**planted, str(folder / "outside.txt"): "s3cret-value"}, [(f"{place}/link.txt", "../../outside.txt")]
    )
    message, heard = worker.train_and_hear(place, way=way, hub_token=TOKEN, hub_strategy=strategy, **SAVING)
    assert message is None
    found = [(text, body[:60]) for body in hub.received(since) for text in private_bytes(folder) if text in body]
    assert found == []
    commits = hub.repository(f"tester/{name}").commits
    ever = {path for commit in commits for path in commit.files}
    checkpoints = {
        **{"end": (), "every_save": (), "checkpoint": ("last-checkpoint",)},
        "all_checkpoints": ("checkpoint-1", "checkpoint-2"),
    }[strategy]
    inside = {f"{place}/{file}" for place in checkpoints for file in {*MODEL, *STATE, "memory_report.json"}}
    assert {path for path in ever if "/" in path} == inside
    others = {
        "README.md",
        "card_data.json",
        "memory_report.json",
        "memory.png",
        "loss.png",
        "notes.md",
        "eval_results.json",
    }
    assert ever - inside == others | (MODEL - {"trainer_state.json"} if strategy == "end" else MODEL)
    assert len(commits) == (2 if strategy == "end" else 4)
    listed = next(text for text in heard if "Left out:" in text)
    for told in ("model.safetensors", ".env", "link.txt", "tokens/tokenizer.json", "training_args.bin", "tfevents"):
        assert told in listed
    assert listed.index("Left out:") < listed.index("training_args.bin")
    assert ("last-checkpoint/optimizer.pt" in listed) == (strategy == "checkpoint")
    files = commits[-1].files
    assert files["notes.md"].decode() == "trained in deep with ..., from deep and .cache; done"


def test_a_checkpoint_from_the_hub_goes_on_and_its_state_can_stay_here(hub, worker, folder):
    options = {**SAVING, "hub_strategy": "checkpoint"}
    assert worker.train_and_hear("runs/whole", **options)[0] is None
    files = hub.repository("tester/whole").files
    for path, data in files.items():
        (folder / "fetched" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "fetched" / path).write_bytes(data)
    resumed = worker.resume("runs/resumed", "fetched/last-checkpoint", max_steps=3)
    assert resumed == 3
    asked = {"without": ["optimizer.pt", "*.pth"], "dashboard": True}
    message, heard = worker.train_and_hear("runs/light", asked=asked, **options)
    assert message is None
    inside = {path for path in hub.repository("tester/light").files if path.startswith("last-checkpoint/")}
    assert {Path(path).name for path in inside} == {*MODEL, "scheduler.pt", "memory_report.json"}
    light = hub.repository("tester/light").files
    assert b"[`dashboard.html`](dashboard.html)" in light["README.md"]
    assert b"memory/optimizer_state_gib" in light["dashboard.html"]
    assert any("last-checkpoint/optimizer.pt" in text and "left out as asked" in text for text in heard)


FAULTS = {
    "busy": ("POST", "/preupload/", {"status": 503}),
    "unknown": ("POST", "/preupload/", {"status": 401}),
    "storage": ("POST", "/objects/batch", {"status": 500}),
    "too-large": ("PUT", "/_lfs/", {"status": 413}),
    "cut": ("PUT", "/_lfs/", {"cut_after": 1000}),
    "silent": ("PUT", "/_lfs/", {"silent_for": 60.0}),
    "unverified": ("POST", "/verify", {"status": 500}),
    "refused": ("POST", "/commit/main", {"status": 403}),
    "half": ("POST", "/commit/main", {"half_answer": True}),
}


@pytest.mark.parametrize("place", FAULTS)
def test_a_push_that_fails_loses_nothing_and_a_command_finishes_it(place, hub, worker, folder):
    method, path, fault = FAULTS[place]
    hub.forget_large_files()  # another case has trained the same model: what is stored is not sent
    hub.fail(method, path, times=10000, **fault)
    since = len(hub.bodies)
    output = folder / "failed" / place
    message, heard = worker.train_and_hear(
        str(output), times=0, hub_token=TOKEN, learning_rate=0.02, silence=0.2, hub_strategy="checkpoint", **SAVING
    )
    assert message is None, "the training ended as any other"
    told = [text for text in heard if "push it later with: " in text]
    assert any("Training goes on" in text for text in told)
    (last,) = [text for text in told if text.startswith("The last push of this training failed: ")]
    assert f"failed: not pushed to tester/{place} " in last
    assert all("\n" not in text and TOKEN not in text for text in told)
    assert hub.repository(f"tester/{place}").files == {}
    checkpoint = output / "checkpoint-2"
    assert {path.name for path in checkpoint.iterdir()} >= MODEL | STATE | {"training_args.bin"}
    assert not list(output.glob(".hf_stateless_push*")), "links of the push are gone"
    hub.faults.clear()
    words = shlex.split(last.rsplit("push it later with: ", 1)[1])
    assert words[0] == "hf-stateless"
    status, text, error = worker.command(*words[1:])
    assert status == 0, error
    assert "model.safetensors" in text
    files = hub.repository(f"tester/{place}").files
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert files["last-checkpoint/optimizer.pt"] == (checkpoint / "optimizer.pt").read_bytes()
    assert [body[:80] for body in hub.received(since) for text in private_bytes(folder) if text in body] == []


def test_with_xet_the_same_is_pushed(hub, tmp_path):
    worker = Worker(hub, tmp_path, xet=True)
    try:
        uploads = hub.requests("PUT", "/_lfs/")
        hub.fail("GET", "/xet-write-token/", status=401, times=1)
        message, heard = worker.train_and_hear("runs/xet", hub_strategy="checkpoint", hub_token=TOKEN, **SAVING)
        assert message is None
        assert hub.requests("PUT", "/_lfs/") == uploads
        assert sum("Training goes on" in text and "401" in text for text in heard) == 1, "the first save failed"
        commits = hub.repository("tester/xet").commits
        assert [commit.title for commit in commits[1:]] == ["Training in progress, step 2", "End of training"]
        last = commits[-1]
        for path in ("model.safetensors", "last-checkpoint/optimizer.pt", "memory.png"):
            local = tmp_path / "runs/xet" / path.replace("last-checkpoint", "checkpoint-2")
            assert last.oids[path] == hashlib.sha256(local.read_bytes()).hexdigest()
        assert not any(path.endswith("training_args.bin") for path in last.files)
    finally:
        worker.close()
    stored = b"".join(path.read_bytes() for path in (hub.folder / "xet").rglob("*") if path.is_file())
    assert len(stored) > 1000
    assert TOKEN.encode() not in stored
    assert str(tmp_path).encode() not in stored


def test_a_hub_that_comes_back_gets_the_next_save(hub, worker):
    hub.fail("POST", "/commit/main", status=503, times=3)
    message, heard = worker.train_and_hear("runs/back", times=0, hub_strategy="every_save", **SAVING)
    assert message is None
    assert not any("The last push of this training failed" in text for text in heard)
    assert [commit.title for commit in hub.repository("tester/back").commits[1:]] == ["Training in progress, step 2"]


def test_checkpoints_that_are_deleted_meanwhile_are_pushed_whole(hub, worker, folder):
    options = {**SAVING, "hub_strategy": "every_save", "save_total_limit": 1, "max_steps": 4, "learning_rate": 0.5}
    hub.fail("PUT", "/_lfs/", silent_for=0.3, times=1)
    message, _ = worker.train_and_hear("runs/rotated", times=0, silence=5.0, width=300, **options)
    assert message is None
    weights = [commit.files["model.safetensors"] for commit in hub.repository("tester/rotated").commits[1:]]
    assert len(set(weights)) == 4
    assert [path.name for path in (folder / "runs/rotated").glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "me/model"], "got nowhere, which is no folder"),
        (["empty", "me/model"], "holds no weights"),
        (["empty", "a/b/c"], "expected NAME or OWNER/NAME"),
        (["empty", "me/model", "--checkpoints", "last"], "holds no whole checkpoint"),
        (["empty", "me/model", "--checkpoint", "first"], "invalid choice"),
        (["empty"], "required: REPO"),
        (["tokens.txt", "me/model"], "is no folder"),
    ],
)
def test_the_command_answers_what_it_cannot_push_in_one_line(arguments, said, worker, folder):
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "tokens.txt").touch()
    status, _, error = worker.command("push", *arguments)
    assert status == 2
    assert said in error
    assert len(error.splitlines()) == 1


def test_the_command_lists_and_sends_nothing(hub, worker, folder):
    worker.save_base("saved")
    before = len(hub.log)
    status, text, _ = worker.command("push", "saved", "tester/listed", "--list", "--without", "tokenizer*")
    assert status == 0
    assert len(hub.log) == before
    assert "model.safetensors" in text.split("Left out:")[0]
    assert "tokenizer.json" in text.split("Left out:")[1]

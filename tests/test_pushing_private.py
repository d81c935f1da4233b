"""What files tell of the machine that wrote them, and how it is found before a push."""

import json
import math
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_stateless.reports.card.contents import collect, listing, whole_checkpoints
from hf_stateless.reports.card.private import Machine, PrivateError


SECRET = "a-password-of-nobody"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of a run inside a working folder, with a token in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def machine(place):
    return Machine(folders=[place])


TEXTS = [
    ("see {here}/data/rows.json.", "see data/rows.json."),
    ('{"a": "{here}/data"}', None),
    ("[rows](file://{here}/data/x), `{here}/y`", "[rows](data/x), `y`"),
    (f"key {SECRET}!", "key ...!"),
    ("hf_AbCdEfGhIjKlMnOp and sk-abcdefghijklmnop1", "... and ..."),
    ("a/b, 3/4, </s>, https://huggingface.co/a/b, /usr/bin/env, C:/x/y", None),
    ("{% if bos_token == '<s>' %}{{ token }}{% endif %}", None),
    ("~/nowhere/rows", "rows"),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS)
@pytest.mark.parametrize("name", ["notes.md", "log.jsonl", "a.yaml", "noending"])
def test_texts_lose_what_names_this_machine_and_nothing_else(text, expected, name, place, machine):
    file = place / name
    here = str(place.parent)
    file.write_text(text.replace("{here}", here))
    cleaned = machine.look(name, file)
    if '"{here}' in text:
        assert cleaned == b'{"a": "data"}'
    else:
        assert cleaned == (None if expected is None else expected.encode())


def test_json_keeps_its_values_and_types(place, machine):
    here = str(place.parent)
    values = {
        "best_model_checkpoint": f"{here}/run/checkpoint-3",
        "_name_or_path": f"{here}/models/base",
        "nested": [{f"{here}/x/y": 1.5e-7, "text": f"in {here}/x or {SECRET}"}],
        "chat_template": "{{ '/n' + bos_token }} a / b",
        "rate": float("nan"),
        "none": None,
        "word": "/usr/lib/x",
    }
    (place / "state.json").write_text(json.dumps(values))
    cleaned = json.loads(machine.look("state.json", place / "state.json"))
    assert math.isnan(cleaned.pop("rate"))
    assert cleaned == {
        "best_model_checkpoint": "run/checkpoint-3",
        "_name_or_path": "base",
        "nested": [{"x/y": 1.5e-7, "text": "in x or ..."}],
        "chat_template": values["chat_template"],
        "none": None,
        "word": "/usr/lib/x",
    }


def _torch(path, text):
    torch.save({"state": {0: torch.ones(300)}, "param_groups": [{"name": text}]}, path)


def _legacy(path, text):
    torch.save({"name": text}, path, _use_new_zipfile_serialization=False)


def _zipped(path, text):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside.txt", text * 3)


WRITERS = {
    "optimizer.pt": _torch,
    "old.bin": _legacy,
    "rows.npz": _zipped,
    "model.safetensors": lambda path, text: save_file({"a": torch.ones(3)}, path, metadata={"from": text}),
    "tokenizer.json": lambda path, text: path.write_text(json.dumps({"model": {"vocab": {text: 1}}})),
    "modeling.py": lambda path, text: path.write_text(f"FOLDER = {text!r}\n"),
    "args.pkl": lambda path, text: path.write_bytes(pickle.dumps([text, b"\xff"])),
    "wide.txt": lambda path, text: path.write_bytes(text.encode("utf-16")),
    "half.dat": lambda path, text: path.write_bytes(b"\xff\xfe\0" + text.encode()),
    "slashes.dat": lambda path, text: path.write_bytes(b"\xff" + text.replace("/", "\\/").encode()),
    "quoted.dat": lambda path, text: path.write_bytes(b"\xff" + text.replace("/", "%2F").encode()),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_cannot_be_cut_out_stays_here(name, place, machine):
    file = place / name
    for private in (str(place.parent), f"{place}/rows", SECRET):
        WRITERS[name](file, private)
        with pytest.raises(PrivateError, match="of this machine"):
            machine.look(name, file)
    WRITERS[name](file, "nothing/of/this")
    assert machine.look(name, file) is None


@pytest.mark.parametrize("name", [f"{SECRET}.txt", "hf_AbCdEfGhIjKlMnOp.json", "rows.tar.gz", "rows.parquet"])
def test_names_and_archives_stay_here(name, place, machine):
    (place / name).write_text("plain")
    with pytest.raises(PrivateError):
        machine.look(name, place / name)


def test_a_folder_that_everybody_has_is_not_private_but_what_lies_in_it_is(place, monkeypatch):
    monkeypatch.setenv("HOME", "/root")
    machine = Machine()
    assert machine.without_private("in /root and /workspace") == "in /root and /workspace"
    assert machine.without_private(f"in {Path('/root', 'secret', 'rows.json')}") == "in rows.json"
    (place / "tokenizer.json").write_text('{"vocab": {"/root": 1}}')
    assert machine.look("tokenizer.json", place / "tokenizer.json") is None


@pytest.mark.parametrize(
    ("variable", "is_secret"),
    [
        *(
            (name, True)
            for name in ("HF_TOKEN", "GH_TOKEN_2", "OPENAI_API_KEY", "APIKEY", "CLIENT_SECRET", "PASSWORD")
        ),
        *((name, False) for name in ("TOKENIZER_NAME", "MAX_TOKENS", "API_KEYS_FILE", "USER_NAME")),
    ],
)
def test_which_variables_hold_a_secret(variable, is_secret, monkeypatch):
    monkeypatch.setenv(variable, "gpt2-medium-1")
    assert ("gpt2-medium-1" not in Machine().without_private("on gpt2-medium-1")) is is_secret


def _run(place):
    for name in ("config.json", "_notes.txt", ".env", "__pycache__/a.pyc", "code/__init__.py", "wandb/x.log"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("{}")
    for step in (1, 2, 10):
        folder = place / f"checkpoint-{step}"
        folder.mkdir()
        for name in (
            "model.safetensors",
            "optimizer.pt",
            "rng_state_0.pth",
            "scheduler.pt",
            "README.md",
            "config.json",
        ):
            (folder / name).write_bytes(b"\0" * step)
        (folder / "optimizer_0").mkdir()
        (folder / "optimizer_0" / "__0_0.distcp").write_bytes(b"\0")
        if step < 10:
            (folder / "trainer_state.json").write_text("{}")


def test_what_goes_and_what_stays(place, machine):
    _run(place)
    (place / "README.md").write_text("ours")
    (place / "out").symlink_to("/etc/hostname")
    (place / "in").symlink_to(place / "config.json")
    (place / "gone").symlink_to(place / "nothing")
    assert whole_checkpoints(place) == [place / "checkpoint-1", place / "checkpoint-2"]
    root = collect(place, machine)
    assert set(root.pushed) == {"README.md", "code/__init__.py", "config.json", "in"}
    assert {name for name, (_, why) in root.left_out.items() if why == "a checkpoint, with optimizer state"} == {
        f"checkpoint-{step}/" for step in (1, 2, 10)
    }
    assert not root.has_weights
    last = place / "checkpoint-2"
    whole = collect(place, machine, checkpoint=last, checkpoints=[("last-checkpoint", last)], without=["*.pth"])
    assert whole.pushed["README.md"].size == 4, "the card of the folder, not that of the checkpoint"
    assert "optimizer.pt" not in whole.pushed
    inside = {name.split("/", 1)[1] for name in whole.pushed if name.startswith("last-checkpoint/")}
    assert inside == {
        *("model.safetensors", "optimizer.pt", "scheduler.pt", "README.md", "config.json", "trainer_state.json"),
        "optimizer_0/__0_0.distcp",
    }
    text = listing(whole, "me/model")
    assert "last-checkpoint/rng_state_0.pth" in text
    assert "left out as asked" in text
    assert text.count("state of the training") >= 3


def test_a_frozen_push_is_what_the_files_were(place, machine, tmp_path):
    large = b"\1" * (1 << 21)
    (place / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}" + large)
    (place / "config.json").write_text("{}")
    contents = collect(place, machine)
    contents.freeze(tmp_path / "stage")
    (place / "model.safetensors").unlink()
    (place / "config.json").write_text("[]")
    assert contents.pushed["config.json"].source == b"{}"
    assert contents.pushed["model.safetensors"].source.read_bytes().endswith(large)


def test_long_lists_are_cut(place, machine):
    for number in range(100):
        (place / f"{number:03}.txt").write_text("x")
    lines = listing(collect(place, machine), "me/model").splitlines()
    assert len(lines) < 40
    assert "  and 70 more" in lines

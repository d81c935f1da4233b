"""`hf stateless ...`: installed and started by the code of `hf` itself; files of this folder stand for GitHub."""

import os
import sys
from types import SimpleNamespace

import pytest
from documents import ROOT, read
from huggingface_hub import constants

from hf_stateless.run.command import SUBCOMMANDS


extensions = pytest.importorskip("huggingface_hub.cli.extensions")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the script needs a POSIX shell")

SCRIPT = "recipes/hf_extension/hf-stateless"


def _github(method, url, **_):
    """What GitHub answers for a repository whose root has the script and nothing else."""
    if url.endswith("/HEAD/hf-stateless"):
        return SimpleNamespace(content=(ROOT / SCRIPT).read_bytes(), text="")
    if "info/refs" in url:
        return SimpleNamespace(content=b"", text=f"0000{'a' * 40} HEAD\0 multi_ack")
    if method == "HEAD":
        return SimpleNamespace(content=b"", text="")
    raise ValueError(f"404 {url}")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The extension, installed below a folder of the test, and an `hf-stateless` on PATH."""
    monkeypatch.setattr(extensions, "EXTENSIONS_ROOT", tmp_path / "extensions")
    monkeypatch.setattr(extensions, "_github_request", _github)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_UPDATE_CHECK", True, raising=False)
    extensions._install_extension(owner="somebody", repo_name="hf-stateless", short_name="stateless")
    program = tmp_path / "bin" / "hf-stateless"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/hf_stateless/run/command.py" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return program


def _hf(*arguments):
    return extensions.dispatch_unknown_top_level_extension(list(arguments), {"auth", "extensions | ext"})


def test_hf_runs_the_subcommands_of_this_package(installed, capfd):
    assert _hf("stateless", "--help") == 0
    said = capfd.readouterr().out
    assert all(f"\n    {name} " in said for name in SUBCOMMANDS)


@pytest.mark.parametrize("arguments", [["nothing"], ["two words", "-x"], ["--mem", ""]])
def test_arguments_and_exit_statuses_pass_through(installed, capfd, arguments):
    assert _hf("stateless", *arguments) == 2
    assert f"got {arguments[0]!r}" in capfd.readouterr().err


def test_without_the_package_one_line_says_what_to_type(installed, capfd):
    installed.unlink()
    assert _hf("stateless", "memory", "gpt2") == 127
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "pip install" in lines[0]


def test_the_whole_repository_is_an_extension_too():
    assert 'hf-stateless = "hf_stateless_command:main"' in read("pyproject.toml")

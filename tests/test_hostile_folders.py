"""Nothing in the files of a folder runs: this package calls no unpickler, and what it calls refuses pickled code."""

import ast
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODELS
from documents import ROOT
from safetensors import SafetensorError
from test_model_card import plain_trainer
from transformers import AutoModelForCausalLM

import hf_stateless
from hf_stateless import export_model


class Runs:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_this_package_calls_no_unpickler():
    unpicklers = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for file in Path(ROOT, "hf_stateless").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not unpicklers & names, file
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "yaml.load", "np.load"):
                # With this torch's own reader makes tensors and plain containers, and nothing else.
                safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("weights_only")
                assert (ast.unparse(node.func), safe) == ("torch.load", "True"), f"{file}:{node.lineno}"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_code_in_an_8_bit_folder_does_not_run(name, tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "trace"
    hf_stateless.quantize(TINY_MODELS["llama"](), hf_stateless.Int8TrainingConfig(16)).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save({"model.embed_tokens.weight": Runs(trace)}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Runs(trace)))
    for read in (AutoModelForCausalLM.from_pretrained, lambda path: export_model(path, tmp_path / "out", "bf16")):
        with pytest.raises((OSError, ValueError, SafetensorError, pickle.UnpicklingError)):
            read(folder)
        assert not trace.exists()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickled_code_in_a_checkpoint_does_not_run(name, tmp_path, saved_run):
    folder, trace = tmp_path / "run", tmp_path / "trace"
    shutil.copytree(saved_run, folder)
    torch.save({"state": Runs(trace), "param_groups": []}, folder / "checkpoint-1" / name)
    with pytest.raises(pickle.UnpicklingError):
        plain_trainer(folder, max_steps=2).train(resume_from_checkpoint=True)
    assert not trace.exists()


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "saved"
    plain_trainer(folder, max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder

"""Folders of 8-bit models in a process that cannot read them: an error, and no random weights."""

import subprocess
import sys

from conftest import TINY_MODELS
from int8_folders import save_in_own_layout

from hf_stateless import Int8TrainingConfig, quantize


# As if compressed-tensors was not installed.
BLOCKED = """
import sys
from importlib import metadata, util
find = util.find_spec
util.find_spec = lambda name, *more: None if name.startswith("compressed_tensors") else find(name, *more)
sys.modules["compressed_tensors"] = None
"""
FOREIGN = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig
from transformers import LlamaForCausalLM, pipeline

readers = {
    "auto": lambda: AutoModelForCausalLM.from_pretrained(folder),
    "base": lambda: AutoModel.from_pretrained(folder, dtype=torch.float32),
    "other head": lambda: AutoModelForSequenceClassification.from_pretrained(folder),
    "class": lambda: LlamaForCausalLM.from_pretrained(folder),
    "own config": lambda: LlamaForCausalLM.from_pretrained(folder, config=LlamaConfig.from_pretrained(folder)),
    "pipeline": lambda: pipeline("text-generation", model=folder),
    "by names": lambda: AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder)).load_state_dict(
        load_file(folder + "/model.safetensors"), strict=False
    ),
}
for folder in sys.argv[1:]:
    for name, read in readers.items():
        try:
            read()
        except Exception as error:
            print(name, "refused by", type(error).__name__)
        else:
            print(name, "LOADED")
assert "hf_stateless" not in sys.modules
AutoModelForCausalLM.from_pretrained(folder)
"""


def test_a_process_without_this_package_gets_an_error_and_its_name_from_folders_in_our_own_layout(tmp_path):
    """Each way to read a folder; with one scale for a row too, where codes have as many entries in the same order."""
    folders = [str(tmp_path / str(size)) for size in (16, None)]
    for folder, size in zip(folders, (16, None), strict=True):
        save_in_own_layout(quantize(TINY_MODELS["llama"](), Int8TrainingConfig(size)), folder)
    done = subprocess.run([sys.executable, "-c", FOREIGN, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("refused by") == 2 * 7, done.stdout + done.stderr
    assert "LOADED" not in done.stdout
    assert "hf_stateless_int8" in done.stderr


def test_without_compressed_tensors_every_way_to_read_ends_in_the_error_of_transformers(tmp_path):
    folders = [str(tmp_path / str(size)) for size in (16, None)]
    for folder, size in zip(folders, (16, None), strict=True):
        quantize(TINY_MODELS["llama"](), Int8TrainingConfig(size)).save_pretrained(folder)
    code = BLOCKED + FOREIGN.replace(", strict=False", "")
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("refused by ImportError") == 2 * 6, done.stdout + done.stderr
    assert done.stdout.count("by names refused by RuntimeError") == 2
    assert "LOADED" not in done.stdout
    assert "pip install compressed-tensors" in done.stderr

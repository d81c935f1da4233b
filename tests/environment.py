"""Imported before all else: what tests and the processes they start find in the environment, whoever types pytest.

torch, huggingface_hub, tokenizers and Triton read these variables while they are imported.
"""

import atexit
import os
import shutil
import tempfile


# Workers of pytest share the cores: one thread each is faster than several that wait for each other.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Nothing is downloaded, and nothing that a person has downloaded counts.
os.environ["HF_HUB_OFFLINE"] = "1"
if "HF_HOME" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_stateless-tests-")
    # Workers inherit the variable; the process that made the folder ends last.
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import torch


torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

"""The kernels in the layout of the Hub: assembled by a recipe, loaded from a folder, and used where asked."""

import ast
import importlib.util
import json
import logging
import subprocess
import sys

import pytest
import torch
import triton_interpreter  # noqa: F401
from documents import ROOT

import hf_stateless
from hf_stateless.norms.chain import Chain
from hf_stateless.update.kernels import on_hub
from hf_stateless.update.kernels.choice import choose
from hf_stateless.update.layout import LAYOUTS


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder, written by the script as somebody types it."""
    folder = tmp_path_factory.mktemp("hub") / "sinkgd-kernel"
    subprocess.run(
        [sys.executable, str(ROOT / "recipes/hub_kernel/build.py"), str(folder)], check=True, capture_output=True
    )
    return folder


def load(built, name):
    """Do what `kernels` does with a variant, without the package."""
    file = built / "build/torch-universal/__init__.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def matrices(count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(256, 320, generator=generator).to(dtype) for _ in range(2 * count)]
    return drawn[:count], drawn[count:]


def test_the_folder_has_what_kernels_reads_and_no_import_of_this_package(built):
    variant = built / "build" / "torch-universal"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert {"id", "name", "version", "license", "python-depends", "backend"} <= metadata.keys()
    files = list(variant.rglob("*.py"))
    assert (variant / "update/kernels/triton_sinkgd.py").is_file()
    assert (variant / "update/kernels/cpu_sinkgd.c").is_file()
    assert not (variant / "trainer").exists()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not (node.module or "").startswith("hf_stateless"), file
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("hf_stateless") for alias in node.names), file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_iterations", [1, 5])
def test_the_copy_updates_as_the_package_does(dtype, num_iterations, built, monkeypatch):
    monkeypatch.delenv("HF_STATELESS_KERNELS", raising=False)
    module = sys.modules.get("_copy_of_kernels") or load(built, "_copy_of_kernels")
    weights, grads = matrices(dtype=dtype)
    mine = [weight.clone() for weight in weights]
    done = module.update_(mine, grads, step_size=0.1, decay=0.9, num_iterations=num_iterations)
    here = choose(weights, grads, Chain(num_iterations=num_iterations), LAYOUTS["out_in"])
    assert (done is None) == (here is None)
    if here is None:
        pytest.skip("no kernel takes these matrices here")
    options = {"step_size": 0.1, "decay": 0.9, "layout": LAYOUTS["out_in"], "num_iterations": num_iterations}
    assert here(weights, grads, None, **options) == done == [True] * 3
    assert all(torch.equal(one, other) for one, other in zip(mine, weights, strict=True))


def test_kernels_loads_the_folder_and_a_training_uses_it(built, monkeypatch, caplog):
    pytest.importorskip("kernels")
    on_hub._loaded.cache_clear()
    caplog.set_level(logging.INFO, logger="hf_stateless")
    results = {}
    for choice in ("", f"hub:{built}"):
        monkeypatch.setenv("HF_STATELESS_KERNELS", choice)
        weights, grads = matrices()
        parameters = [torch.nn.Parameter(weight) for weight in weights]
        groups = [{"params": parameters, "algorithm": "multinorm", "layout": "out_in", "role": "matrix"}]
        optimizer = hf_stateless.StatelessOptimizer(groups, lr=0.1)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        results[choice] = [parameter.detach() for parameter in parameters]
    first, second = results.values()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert sum("Kernels from" in text for text in caplog.messages) == 1
    weights, grads = matrices()
    chosen = choose(weights, grads, Chain(), LAYOUTS["out_in"])
    assert chosen is None or not chosen.__module__.startswith("hf_stateless")


@pytest.mark.parametrize("place", ["nowhere/at/all", "{tmp}", "somebody/sinkgd@one", ""])
def test_what_cannot_be_loaded_leaves_the_work_to_ours_with_one_line(place, tmp_path, monkeypatch, caplog):
    on_hub._loaded.cache_clear()
    weights, grads = matrices()
    monkeypatch.delenv("HF_STATELESS_KERNELS", raising=False)
    ours = choose(weights, grads, Chain(), LAYOUTS["out_in"])
    monkeypatch.setenv("HF_STATELESS_KERNELS", f"hub:{place.replace('{tmp}', str(tmp_path))}")
    for _ in range(3):
        assert choose(weights, grads, Chain(), LAYOUTS["out_in"]) is ours
    lines = [text for text in caplog.messages if "those of this package are used" in text]
    assert len(lines) == 1
    assert "\n" not in lines[0]


def test_the_script_writes_into_no_folder_that_is_there(built):
    again = [sys.executable, str(ROOT / "recipes/hub_kernel/build.py"), str(built)]
    result = subprocess.run(again, capture_output=True, text=True)
    assert result.returncode == 2
    assert "which is there already" in result.stderr

"""Models in float64 train under every option, in `step()` and in backward, as models in float32 do."""

import pytest
import torch
from conftest import TINY_MODELS, tiny_inputs

from hf_stateless import create_optimizer


OPTIONS = {
    "plain": {},
    "min_signal": {"min_signal": 0.1},
    "momentum int8": {"momentum": 0.9},
    "momentum bfloat16": {"momentum": 0.9, "momentum_dtype": "bfloat16"},
    "momentum float32": {"momentum": 0.9, "momentum_dtype": "float32"},
    "stateless": {"embeddings": "stateless"},
    "sinkhorn_momentum": {"embeddings": "sinkhorn_momentum"},
    "factored": {"embeddings": "factored", "heads": "row_moment"},
}


def losses(name, dtype, steps=20, **options):
    torch.manual_seed(0)
    model = TINY_MODELS["llama"]().to(dtype)
    optimizer = create_optimizer(model, name, lr=1e-3, **options)
    inputs, found = tiny_inputs("llama"), []
    for _ in range(steps):
        optimizer.train()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["swan", "sinkgd", "sinkgd_layerwise", "swan_layerwise"])
def test_float64_trains_as_float32_does(name, option):
    options = OPTIONS[option]
    if name.endswith("_layerwise") and "min_signal" in options:
        pytest.skip("refused by its name")
    if name.endswith("_layerwise"):
        options = {"release": "all", **options}
    wide, narrow = losses(name, torch.float64, **options), losses(name, torch.float32, **options)
    assert wide[-1] < wide[0] - 0.05
    assert wide == pytest.approx(narrow, rel=2e-2)

"""Parameters, groups and steps for tests of `StatelessOptimizer`."""

import pytest
import torch
from conftest import dense

from hf_stateless import PRESETS
from hf_stateless.optimizer.rules import RULES


each_preset = pytest.mark.parametrize("name", PRESETS)
# Pairs of LoRA factors have tests of their own, in test_lora.py.
each_algorithm = pytest.mark.parametrize("algorithm", [a for a in RULES if a != "lora_product"])
each_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def parameter(*shape, dtype=torch.float32, seed=0):
    return torch.nn.Parameter(dense(*shape, dtype=dtype, seed=seed))


def group(*params, algorithm="multinorm", **options):
    if algorithm == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    return {"params": list(params), "algorithm": algorithm, **options}


def preset_group(name, *params, **options):
    return group(*params, **{**PRESETS[name].group(), **options})


def take_steps(optimizer, steps):
    """Step with gradients that depend on the number of the step and of the parameter only."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for step in steps:
        for i, p in enumerate(params):
            p.grad = dense(*p.shape, dtype=p.dtype, seed=1000 * step + i + 1)
        optimizer.step()
    return [p.detach().clone() for p in params]


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)

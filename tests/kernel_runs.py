"""Updates by the Triton kernels and by their torch twins: on a CUDA device if there is one, else interpreted."""

import pytest
import torch
import triton_interpreter  # noqa: F401
from conftest import dense
from updates import multinorm_update_

from hf_stateless.weights.noise import rounding_key


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("HF_STATELESS_KERNELS", "triton")


def random(*shape, dtype=torch.float32, **options):
    return dense(*shape, dtype=dtype, **options).to(DEVICE)


def key_of(index=0, step=1):
    return rounding_key(0, index, torch.full((1,), float(step), device=DEVICE))


def update_(weights, grads, keys=None, *, layout="out_in", num_iterations=5, lr=1.0, weight_decay=0.0):
    options = {"lr": lr, "lr_scale": 1.0, "weight_decay": weight_decay, "layout": layout}
    finite = multinorm_update_(
        weights, grads, keys, norms=("row_l2", "col_l2"), num_iterations=num_iterations, **options
    )
    assert all(isinstance(flag, torch.Tensor) for flag in finite), "the twin did the work"
    return [bool(flag) for flag in finite]


def twin_(monkeypatch, weights, grads, keys=None, **options):
    """The torch twin on the same device, one weight at a time."""
    with monkeypatch.context() as patch:
        patch.setenv("HF_STATELESS_KERNELS", "torch")
        options = {"lr": 1.0, "weight_decay": 0.0, "layout": "out_in", "num_iterations": 5, **options}
        flags = []
        for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
            key = None if keys is None else [keys[i]]
            flags += multinorm_update_([weight], [grad], key, lr_scale=1.0, norms=("row_l2", "col_l2"), **options)
    return flags

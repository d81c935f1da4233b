"""Pairs of LoRA factors with gradients, what a step takes from their product, and models with adapters."""

import peft
import torch
from conftest import dense
from torch import nn

from hf_stateless import StatelessOptimizer, create_optimizer


M, N, R = 24, 40, 4
SINKHORN = {"norms": ("row_l2", "col_l2"), "num_iterations": 5}
GROUP = {"norms": ("spectral",), "num_iterations": 1, "lr_scale": 1.0, "scaling": 2.0, "layout": "out_in"}


def polar(x):
    """U V^T of the singular value decomposition."""
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def symmetric_power(gram, exponent):
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def example(m=M, n=N, r=R, *, b=1.0, scaling=2.0, seed=0, dtype=torch.float64):
    """Factors A and B (entries about `b`), and their gradients for a random gradient of the weight."""
    A, B, G = dense(r, n, seed=seed), dense(m, r, seed=seed + 1) * b, dense(m, n, seed=seed + 2)
    A, B, G = (x.to(dtype) for x in (A, B, G))
    return A, B, scaling * B.T @ G, scaling * G @ A.T


def changes(A, B, step_a, step_b, scaling):
    """What each step takes from s B A, to first order."""
    return scaling * B @ step_a, scaling * step_b @ A


# ---- In place


def pair_of(A, B, grad_a, grad_b, dtype=torch.float32):
    a, b = nn.Parameter(A.to(dtype, copy=True)), nn.Parameter(B.to(dtype, copy=True))
    a.grad, b.grad = grad_a.to(dtype, copy=True), grad_b.to(dtype, copy=True)
    return a, b


def optimizer_of(*factors, lr=0.1, **options):
    group = {"params": list(factors), "algorithm": "lora_product", **GROUP, **options}
    return StatelessOptimizer([group], lr=lr)


# ---- Which pairs are found


def adapted(make_model, name="llama", **options):
    torch.manual_seed(0)
    return peft.get_peft_model(make_model(name), peft.LoraConfig(r=4, lora_alpha=8, **options))


def grouped(model, name="swan", **options):
    """(algorithm, scaling, names) of the groups of adapters; product by default."""
    optimizer = create_optimizer(model, name, lr=1e-2, **{"lora": "product", **options})
    groups = [g for g in optimizer.param_groups if g["algorithm"] in ("lora_product", "multinorm")]
    return [(g["algorithm"], g.get("scaling"), g["param_names"]) for g in groups]

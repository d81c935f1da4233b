"""The optimizers that `step_time.py` times, and the bytes that a step of each has to move at least."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from hf_stateless import PRESETS, StatelessOptimizer


Params = list[torch.nn.Parameter]
RANK = 256


@dataclass(frozen=True)
class Row:
    """One optimizer over matrices."""

    make: Callable[[Params], torch.optim.Optimizer]
    state_bytes: float = 0.0
    """Bytes of state that a step reads and writes per weight; in units of the weight's own where `state_like`."""
    state_like: bool = False
    rank: int = 0
    """Where set, states are those of the longer side times the rank."""
    needs: str = ""
    """The package of others that has it."""
    environment: dict[str, str] = field(default_factory=dict)
    """Set while it steps."""
    devices: tuple[str, ...] = ("cpu", "cuda")

    def missing(self, device: str) -> str:
        """Say why the row cannot be run, or return an empty string."""
        if device not in self.devices:
            return f"not on {device}"
        if not self.needs:
            return ""
        if importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        param = torch.nn.Parameter(torch.ones(2 * RANK, 2 * RANK, device=device))
        param.grad = torch.ones_like(param)
        try:
            self.make([param]).step()
        except Exception as error:  # whatever another package raises, the other rows can be run
            return f"{self.needs} fails on {device}: {type(error).__name__}"
        return ""

    def least_bytes(self, shapes: list[tuple[int, int]], size: int) -> int:
        """Count what one step must move: gradient and weight read, weight written, state read and written.

        Args:
            shapes: of the weights.
            size: bytes of one of their numbers.
        """
        weights = sum(m * n for m, n in shapes)
        states = sum(max(shape) * min(self.rank, *shape) for shape in shapes) if self.rank else weights
        return round(3 * size * weights + 2 * self.state_bytes * (size if self.state_like else 1) * states)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Set the environment of the row for the time of a step."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def ours(name: str, **options: object) -> Callable[[Params], torch.optim.Optimizer]:
    """Return a constructor of our optimizer with one group of matrices."""
    group = {"algorithm": "multinorm", **PRESETS[name].group(), **options}
    return lambda params: StatelessOptimizer([{"params": params, **group}])


def bitsandbytes_adamw(params: Params) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments."""
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(params, lr=1e-3)
    return optimizer


def racs(params: Params) -> torch.optim.Optimizer:
    """RACS: one scaling by rows and columns with averaged vectors."""
    from pytorch_optimizer.optimizer import RACS

    optimizer: torch.optim.Optimizer = RACS(params, lr=1e-3)
    return optimizer


def sinksgd(params: Params) -> torch.optim.Optimizer:
    """Five iterations without momentum, stochastic rounding of bf16 weights, as in `sinkgd`."""
    from adv_optm import SinkSGD_adv

    optimizer: torch.optim.Optimizer = SinkSGD_adv(params, lr=1e-3)
    return optimizer


def apollo(params: Params) -> torch.optim.Optimizer:
    """APOLLO by random projections."""
    from apollo_torch import APOLLOAdamW

    group = {"rank": RANK, "proj": "random", "scale_type": "channel", "scale": 1.0, "update_proj_gap": 200}
    optimizer: torch.optim.Optimizer = APOLLOAdamW([{"params": params, "proj_type": "std", **group}], lr=1e-3)
    return optimizer


BASELINE = "AdamW (fused)"
ROWS: dict[str, Row] = {
    BASELINE: Row(lambda params: torch.optim.AdamW(params, fused=True), 2, state_like=True),
    "AdamW (foreach)": Row(lambda params: torch.optim.AdamW(params, foreach=True), 2, state_like=True),
    "AdamW8bit (bitsandbytes)": Row(bitsandbytes_adamw, 2 * (1 + 4 / 256), needs="bitsandbytes"),
    "SGD (fused)": Row(lambda params: torch.optim.SGD(params, lr=1e-3, fused=True)),
    "Muon (torch)": Row(lambda params: torch.optim.Muon(params, lr=1e-3), 1, state_like=True),
    "RACS (pytorch_optimizer)": Row(racs, needs="pytorch_optimizer"),
    "APOLLO (apollo_torch)": Row(apollo, 2, state_like=True, rank=RANK, needs="apollo_torch"),
    "SinkSGD_adv (adv_optm)": Row(sinksgd, needs="adv_optm"),
    "sinkgd": Row(ours("sinkgd")),
    "sinkgd, L=1": Row(ours("sinkgd", num_iterations=1)),
    "sinkgd, torch": Row(ours("sinkgd"), environment={"HF_STATELESS_KERNELS": "torch"}),
    "swan": Row(ours("swan")),
    "sinkgd_polar": Row(ours("sinkgd_polar")),
    "swan, newton_schulz": Row(ours("swan", whitening="newton_schulz")),
    "swan, newton_schulz, float16": Row(
        ours("swan", whitening="newton_schulz", ns_dtype="float16"), devices=("cuda",)
    ),
}
SLOW = ("Muon (torch)", "swan", "sinkgd_polar", "swan, newton_schulz", "swan, newton_schulz, float16")
"""Rows of many matrix products, for which a CPU takes seconds."""

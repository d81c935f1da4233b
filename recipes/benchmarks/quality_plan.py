"""What `quality.py` trains: the studies and the optimizers, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_stateless.optimizer.rates import SCALES
from hf_stateless.trainer.partition import partition_parameters


@dataclass(frozen=True)
class Study:
    """One comparison: every optimizer trains this model on this text with these batches for so many steps."""

    text: str = "python"
    """`python` is the text that every Python installation holds, `packages` the same with all packages that are
    installed, and `english` what `--train_files` names."""
    hidden: int = 128
    layers: int = 4
    vocab: int = 2048
    sequences: int = 16
    """Sequences in a batch."""
    block: int = 128
    """Tokens in a sequence."""
    steps: int = 200
    tied: bool = False
    """Whether the head is the table of embeddings."""

    @property
    def intermediate(self) -> int:
        """The width of the MLP, 8/3 of the hidden size as in LLaMA."""
        return -(-self.hidden * 8 // 24) * 8

    def values(self) -> dict[str, Any]:
        """Return what names a run."""
        return asdict(self)


STUDIES = {
    "small": Study(),
    "small batch": Study(sequences=4),
    "large batch": Study(sequences=64, steps=100),
    "large batch, 60 % of the tokens": Study(sequences=64, steps=60),
    "long": Study(steps=600),
    "long, large batch": Study(sequences=64, steps=300),
    "width 128": Study(layers=2, sequences=8, steps=100),
    "width 256": Study(layers=2, sequences=8, steps=100, hidden=256),
    "width 512": Study(layers=2, sequences=8, steps=100, hidden=512),
    "width 1024": Study(layers=2, sequences=8, steps=100, hidden=1024),
    "largest, python": Study(hidden=256, sequences=32, steps=150),
    "largest, english": Study(text="english", hidden=256, sequences=32, steps=150),
    "small, english": Study(text="english"),
    "small, tied": Study(tied=True),
    "longest": Study(steps=2400),
    "longest, english": Study(text="english", steps=2400),
    "longest, large batch": Study(sequences=64, steps=600),
    # For a GPU, and the tiny one that rehearses them.
    "60M": Study(text="packages", hidden=512, layers=8, vocab=32000, sequences=128, block=256, steps=240),
    "130M": Study(text="packages", hidden=768, layers=12, vocab=32000, sequences=128, block=256, steps=240),
    "rehearsal": Study(text="english", hidden=32, layers=1, vocab=300, sequences=2, block=32, steps=2),
}


# The schedule is a setting like any other: that of every row which says nothing else, neither warm-up nor decay, and
# the first with decay to zero.
SCHEDULE = (
    ("lr_scheduler_type", "cosine_with_min_lr"),
    ("lr_scheduler_kwargs", {"min_lr_rate": 0.1}),
    ("warmup_steps", 0.1),
)
CONSTANT = (("lr_scheduler_type", "constant"), ("lr_scheduler_kwargs", None), ("warmup_steps", 0))
TO_ZERO = (("lr_scheduler_type", "cosine"), ("lr_scheduler_kwargs", None))

# AdamW's best single rate in every study of this size but one, where half of it is better: the rates of embeddings,
# heads and norms are multiples of it.
REST_RATE = 2e-3
# Multiples of a learning rate, for embeddings, heads and what else is no matrix.
Kinds = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """One optimizer: what the Trainer is told, and where the walk over learning rates starts.

    The learning rate of ours is the entry RMS of an update of a matrix (`lr_scale=1`).
    """

    start: float
    optim: str | None = None
    """A name for `TrainingArguments(optim=...)`; None for `factory`."""
    optim_args: str = ""
    training: tuple[tuple[str, Any], ...] = ()
    """Further arguments of the Trainer."""
    factory: Callable[..., Any] | None = None
    apart: bool = True
    """Whether what is no matrix has a rate of its own: REST_RATE times `rest`."""
    rest: float = 1.0
    kinds: Kinds = (1.0, 1.0, 1.0)
    """Multiples of that rate for embeddings, heads and what is left; only where it is apart."""

    def __post_init__(self) -> None:
        if not self.apart and set(self.kinds) != {1.0}:
            raise ValueError(f"kinds={self.kinds} of a row with one rate for all: take factory=AdamWFactory.")

    def arguments(self) -> str:
        """Return the `optim_args` of a run: those of the row, and the rates of what is no matrix where it has any."""
        scales = [f"{scale}={kind:g}" for scale, kind in zip(SCALES, self.kinds, strict=True) if kind != 1]
        rates = [f"adamw_lr={self.rest * REST_RATE}", *scales] if self.apart and self.optim else []
        return ",".join(filter(None, [self.optim_args, *rates]))


def ours(chain: str, start: float = 5e-4, rest: float = 1.0, kinds: Kinds = (1.0, 1.0, 1.0), **training: Any) -> Row:
    """Return a row of `multinorm`, or of a preset by its name; `:` parts the name from the options."""
    name, _, options = chain.partition(":")
    # What most rows were measured with, whatever is the default.
    tables = "" if "embeddings=" in options else "embeddings=adamw"
    optim_args = ",".join(filter(None, ["lr_scale=1", tables, options]))
    return Row(start, name, optim_args, tuple(training.items()), rest=rest, kinds=kinds)


class Beside(torch.optim.Optimizer):
    """A torch optimizer for the matrices beside AdamW for the rest: two optimizers that the Trainer sees as one."""

    def __init__(self, matrices: torch.optim.Optimizer, rest: torch.optim.Optimizer) -> None:
        self.parts = (matrices, rest)
        super().__init__([{"params": [p]} for part in self.parts for g in part.param_groups for p in g["params"]], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:
        groups = iter(self.param_groups)  # where the scheduler writes; accelerate has put new ones there
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.step()

    def tensors(self) -> list[torch.Tensor]:
        """Return the state of both."""
        return [t for part in self.parts for state in part.state.values() for t in state.values()]


class MatrixFactory:
    """A factory as `Trainer(optimizer_cls_and_kwargs=...)` takes it: `make` for what our partition calls matrices."""

    @staticmethod
    def make(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        raise NotImplementedError

    def __call__(self, model: nn.Module, lr: float, rest_rate: float, kinds: Kinds = (1.0, 1.0, 1.0)) -> Beside:
        by_role: dict[str, list[nn.Parameter]] = {}
        for entry in partition_parameters(model, None):
            by_role.setdefault(entry.role, []).append(entry.parameter)
        matrices = self.make(by_role.pop("matrix"), lr)
        scales = dict(zip(("embedding", "head", "rest"), kinds, strict=True))
        groups = [{"params": params, "lr": rest_rate * scales[role]} for role, params in by_role.items()]
        return Beside(matrices, torch.optim.AdamW(groups, lr=rest_rate, weight_decay=0.0, fused=True))


class MuonFactory(MatrixFactory):
    """Muon with the scale that makes its updates as large as AdamW's."""

    @staticmethod
    def make(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.Muon(params, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


class AdamWFactory(MatrixFactory):
    """AdamW for both, with a learning rate for each."""

    @staticmethod
    def make(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True)


def at_constant_rate(row: str) -> str:
    """Return the name of a row with the schedule `CONSTANT`."""
    return f"{row}, constant rate"


def to_zero(row: str) -> str:
    """Return the name of a row with the schedule `TO_ZERO`."""
    return f"{row}, to zero"


def of_kinds(row: str, kinds: Kinds) -> str:
    """Return the name of a row with multiples for embeddings, heads and the rest."""
    return f"{row}, rest {'/'.join(f'{kind:g}' for kind in kinds)}x"


# Multiples of AdamW's best rate for what is no matrix.
RESTS = (2, 4, 8, 16, 32)
# The same for embeddings, heads and the rest, each their own.
KINDS: tuple[Kinds, ...] = (
    (32, 4, 16),
    *((16, 2, 8), (64, 8, 32)),  # all of them at half and at double
    *((16, 4, 16), (48, 4, 16), (64, 4, 16)),  # one of them
    *((32, 2, 16), (32, 8, 16), (32, 4, 8), (32, 4, 32), (32, 4, 4)),
    *((4, 1, 4), (4, 1, 16), (2, 1, 8), (8, 1, 16)),  # tied, where the second stands for nothing
)
ROWS: dict[str, Row] = {
    # What AdamW can do: alone, with other settings, and with a rate of its own for the matrices.
    "adamw": Row(2e-3, "adamw_torch_fused", apart=False),
    "adamw, beta2 0.95": Row(4e-3, "adamw_torch_fused", training=(("adam_beta2", 0.95),), apart=False),
    "adamw, weight decay 0.1": Row(4e-3, "adamw_torch_fused", training=(("weight_decay", 0.1),), apart=False),
    "adamw, 2 % warm-up": Row(4e-3, "adamw_torch_fused", training=(("warmup_steps", 0.02),), apart=False),
    "adamw, rates apart": Row(5e-4, factory=AdamWFactory),
    **{f"adamw, rates apart, rest {k}x": Row(5e-4, factory=AdamWFactory, rest=k) for k in RESTS},
    **{of_kinds("adamw, rates apart", k): Row(5e-4, factory=AdamWFactory, kinds=k) for k in KINDS},
    "adafactor": Row(8e-3, "adafactor", apart=False),
    "lion": Row(5e-4, "lion_32bit", apart=False),
    "galore": Row(8e-3, "galore_adamw", "rank=32,update_proj_gap=50,scale=1.0", apart=False),
    "apollo": Row(8e-3, "apollo_adamw", "rank=32,update_proj_gap=50,scale=1.0", apart=False),
    "muon": Row(4e-3, factory=MuonFactory),
    **{f"muon, rest {k}x": Row(4e-3, factory=MuonFactory, rest=k) for k in RESTS},
    **{of_kinds("muon", k): Row(4e-3, factory=MuonFactory, kinds=k) for k in KINDS},
    "swan": ours("swan", 4e-3),
    **{f"swan, rest {k}x": ours("swan", 4e-3, rest=k) for k in RESTS},
    **{of_kinds("swan", k): ours("swan", 4e-3, kinds=k) for k in KINDS},
    "sinkgd": ours("sinkgd"),
    **{f"sinkgd, rest {k}x": ours("sinkgd", rest=k) for k in RESTS},
    **{of_kinds("sinkgd", k): ours("sinkgd", kinds=k) for k in KINDS},
    # What makes the difference: iterations, chains, order, centring.
    "sinkgd, L=1": ours("sinkgd:num_iterations=1"),
    "sinkgd, L=3": ours("sinkgd:num_iterations=3"),
    "columns then rows": ours("multinorm:norms=col_l2+row_l2,num_iterations=5"),
    "rows": ours("multinorm:norms=row_l2"),
    "columns": ours("multinorm:norms=col_l2"),
    "spectral (Muon without momentum)": ours("multinorm:norms=spectral", 4e-3),
    "sign": ours("multinorm:norms=sign"),
    "swan, not centred": ours("swan:center=false", 4e-3),
    "swan, polar_express": ours("swan:whitening=polar_express", 4e-3),
    "swan, newton_schulz": ours("swan:whitening=newton_schulz", 4e-3),
    "swan, beta 0.5": ours("swan:whitening=newton_schulz,ns_beta=0.5", 4e-3),
    "spectral, momentum 0.95, float32": ours("multinorm:norms=spectral,momentum=0.95,momentum_dtype=float32", 4e-3),
    "spectral, polar_express, momentum 0.95, float32": ours(
        "multinorm:norms=spectral,whitening=polar_express,momentum=0.95,momentum_dtype=float32", 4e-3
    ),
    "swan, then columns": ours("multinorm:norms=row_l2+spectral+col_l2", 4e-3),
    # What embeddings are updated by, warm-up and decay.
    "swan, sinkhorn_momentum embeddings": ours("swan:embeddings=sinkhorn_momentum", 4e-3),
    "swan, stateless embeddings": ours("swan:embeddings=stateless", 4e-3),
    "sinkgd, stateless embeddings": ours("sinkgd:embeddings=stateless"),
    "swan, momentum 0.9, 8-bit": ours("swan:momentum=0.9,momentum_dtype=int8", 4e-3),
    "swan, momentum 0.9, 8-bit, rest 8x": ours("swan:momentum=0.9,momentum_dtype=int8", 4e-3, rest=8),
    "sinkgd, momentum 0.9, 8-bit": ours("sinkgd:momentum=0.9,momentum_dtype=int8"),
    "swan, momentum 0.9, bf16": ours("swan:momentum=0.9,momentum_dtype=bfloat16", 4e-3),
    "swan, momentum 0.9, float32": ours("swan:momentum=0.9,momentum_dtype=float32", 4e-3),
    "swan, momentum 0.95, float32": ours("swan:momentum=0.95,momentum_dtype=float32", 4e-3),
    "sinkgd, momentum 0.9, float32": ours("sinkgd:momentum=0.9,momentum_dtype=float32"),
    "swan, width rule": ours("swan:width_rule=spectral", 4e-3),
    "sinkgd, width rule": ours("sinkgd:width_rule=fan_in"),
    "swan, 2 % warm-up": ours("swan", 4e-3, warmup_steps=0.02),
    "swan, weight decay 0.1": ours("swan", 4e-3, weight_decay=0.1),
}
# What the summary and the picture show, with both schedules.
MAIN = ("adamw", "adamw, rates apart", "muon", "swan", "sinkgd")
# The finalists, each with rates by kind, and what is asked of embeddings, iterations, whitening and scale.
_CHAIN = "row_l2+col_l2"
_TABLES = {
    "": "",
    ", factored tables": ",embeddings=factored",
    ", row_moment tables": ",embeddings=row_moment",
    ", column_moment tables": ",embeddings=column_moment",
    ", row moments, AdamW head": ",embeddings=row_moment,heads=adamw",
    ", row moments, head by columns": ",embeddings=row_moment,heads=column_moment",
}
VARIANTS = {
    "sinkgd, operator": ("sinkgd:scale=operator", 2e-3),
    "sinkgd, L=1": ("sinkgd:num_iterations=1", 2e-3),
    "sinkgd, L=2": ("sinkgd:num_iterations=2", 2e-3),
    "swan, operator": ("swan:scale=operator", 4e-3),
    **{
        f"swan, newton_schulz{name}": (f"swan:whitening=newton_schulz{tables}", 4e-3)
        for name, tables in _TABLES.items()
    },
    "swan, bfloat16": ("swan:ns_dtype=bfloat16", 4e-3),
    "swan, 6 steps": ("swan:ns_steps=6", 4e-3),
    "sinkgd 1, polar 1, bfloat16": (f"multinorm:norms={_CHAIN}+spectral,ns_steps=1,ns_dtype=bfloat16", 2e-3),
    **{
        f"sinkgd {n}, polar {steps}{kind}": (
            f"multinorm:norms={'+'.join([_CHAIN] * n)}+spectral,whitening=polar_express,ns_steps={steps}{scale}",
            4e-3,
        )
        for n in (1, 2, 5)
        for steps in (1, 2, 3)
        for kind, scale in (("", ""), (", operator", ",scale=operator"))
    },
    "sinkgd 1, polar 1, operator, rows": (
        f"multinorm:norms={_CHAIN}+spectral+row_l2,whitening=polar_express,ns_steps=1,scale=operator",
        4e-3,
    ),
    "swan, rows": ("multinorm:norms=row_standardize+spectral+row_l2", 4e-3),
    **{
        f"{name}, {tables} tables": (f"{name}:embeddings={tables}", start)
        for name, start in (("swan", 4e-3), ("sinkgd", 1e-3))
        for tables in ("row_moment", "factored", "column_moment")
    },
    "swan, row moments, AdamW head": ("swan:embeddings=row_moment,heads=adamw", 4e-3),
    "swan, row moments, head by columns": ("swan:embeddings=row_moment,heads=column_moment", 4e-3),
    "swan, momentum 0.9": ("swan:momentum=0.9", 2e-3),
    "sinkgd, momentum 0.9": ("sinkgd:momentum=0.9", 5e-4),
    "sinkgd_polar, momentum 0.9": ("sinkgd_polar:momentum=0.9", 1e-3),
    "sinkgd_polar, row_moment tables": ("sinkgd_polar:embeddings=row_moment", 2e-3),
}
ROWS |= {of_kinds(name, k): ours(*chain, kinds=k) for name, chain in VARIANTS.items() for k in KINDS}
ROWS |= {at_constant_rate(name): replace(ROWS[name], training=CONSTANT) for name in MAIN}
ROWS |= {
    to_zero(row): replace(ROWS[row], training=TO_ZERO)
    for row in (of_kinds(name, KINDS[0]) for name in (*MAIN[1:], "swan, momentum 0.9", "sinkgd 1, polar 1"))
}

"""The learning rates of what is no matrix, as data: multiples of `learning_rate` for each kind of parameter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """One row of the table of rates, which `rates=` names.

    `finetuning` leaves every rate as it is: multiples cost 0.1 to 1 nat there. `pretraining` holds multiples of
    AdamW's best single rate, measured with models of 1.3M parameters (`recipes/benchmarks/quality.py`). Embeddings at
    32 leave `swan` 0.04 above the best after 200 steps, those at 64 `sinkgd_polar` 0.02 after 600; 48 is within 0.02
    of the best in all studies that were run with it.

    Example:
        >>> from hf_stateless.optimizer.rates import RATES
        >>> RATES["pretraining"].embedding, RATES["pretraining"].tied
        (48.0, 4.0)
    """

    embedding: float
    """Of input embeddings."""
    head: float
    """Of heads."""
    rest: float
    """Of norms, biases and what else is neither a matrix, an embedding nor a head."""
    tied: float
    """Of the embeddings of a model in which one is the head too, instead of `embedding`."""


RATES: dict[str, Rates] = {
    "finetuning": Rates(embedding=1.0, head=1.0, rest=1.0, tied=1.0),
    "pretraining": Rates(embedding=48.0, head=4.0, rest=16.0, tied=4.0),
}
SCALES = tuple(f"{kind}_lr_scale" for kind in ("embedding", "head", "rest"))
"""The options that set one of them each. A group holds that of its role only where it is not 1: sharded checkpoints
that were written before there were any lack the keys, and torch loads no key that it misses."""

"""What is asked of an 8-bit weight before a module computes with it, or makes floats of it."""

from __future__ import annotations

from torch import Tensor

from ..stored import StoredWeight
from .sharded import Int8Shard, shard_of


def refuse_to_float(weight: Tensor) -> None:
    """Refuse to make a float weight of one that is cut over ranks.

    Raises:
        ValueError: it is.
    """
    if shard_of(weight) is not None:
        raise ValueError(
            "The weights are cut over ranks: save the model, and load the folder in one process to have floats."
        )


def note_scale(weight: Tensor, scale: Tensor) -> None:
    """Note the scales of a part that a module computes with as it is, without gathering it: a copy has others."""
    if isinstance(weight, Int8Shard) and not weight.place.beside:
        weight.place.scale = scale.detach()


def check_gathered(weight: Tensor) -> None:
    """Refuse to compute with a weight that is not here as a whole.

    Raises:
        RuntimeError: a wrapper has put something else in the place of the weight, or has not gathered it.
    """
    if not isinstance(weight, StoredWeight):
        raise RuntimeError(
            f"The weight of an 8-bit layer has become a {type(weight).__name__}: call the module that fully_shard was "
            "applied to. Wrappers other than DDP and FSDP2 are not supported with 8-bit weights: load the model "
            "without quantization_config."
        )

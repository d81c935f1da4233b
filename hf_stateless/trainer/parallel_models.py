"""What cannot be exact of models that transformers has cut by tensor or expert parallelism."""

from __future__ import annotations

from torch import nn

from ..ranks.placement import is_sharded


def refuse_unknown_shards(model: nn.Module) -> None:
    """Refuse a model that is cut into plain tensors: a part that does not say so would pass for a whole matrix.

    Raises:
        ValueError: tensor parallelism, and no parameter is a DTensor.
    """
    size = getattr(model, "_tp_size", None)
    if isinstance(size, int) and size > 1 and not any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            f"The model is cut over {size} ranks by tensor parallelism, into plain tensors that do not say which part "
            "of a matrix they are, as older versions of transformers do: type pip install -U 'transformers>=5.17'."
        )

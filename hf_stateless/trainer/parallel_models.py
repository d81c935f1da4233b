"""What cannot be exact of models that transformers has cut by tensor or expert parallelism."""

from __future__ import annotations

from torch import nn

from ..ranks.placement import is_sharded
from ..weights.plans import style_of


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


def refuse_doubled_gradients(model: nn.Module, steps: int) -> None:
    """Refuse accumulation where transformers would add up a gradient again in each micro-batch.

    Norms of heads, as Qwen3's `q_norm`, have a hook that adds their gradients up over the ranks of tensor parallelism.
    In the second micro-batch it is given what is added up already: g1 + g2 becomes 2 g1 + g2 on two ranks.

    Args:
        model: that is trained.
        steps: `gradient_accumulation_steps`.

    Raises:
        ValueError: with what to type.
    """
    if steps == 1 or not (getattr(model, "_tp_size", None) or 1) > 1:
        return
    plan = getattr(model, "tp_plan", None) or {}
    trained = (name for name, p in model.named_parameters() if p.requires_grad)
    names = [name for name in trained if style_of(name, plan) == "replicated_with_grad_allreduce"]
    if names:
        raise ValueError(
            f"gradient_accumulation_steps={steps} under tensor parallelism: transformers adds up the gradient of "
            f"{names[0]} ({len(names)} such) over the ranks again in each micro-batch, expected once in a step: set "
            "gradient_accumulation_steps=1 and a larger batch, or freeze these by requires_grad_(False)."
        )

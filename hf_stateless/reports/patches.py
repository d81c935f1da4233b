"""The methods of a trainer that reports replace, because no callback can do their work; each says when it can go.

Predictions of memory replace two functions of torch for the time of a trace, see `predicted/fused.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import Trainer


def see_training_batches(trainer: Trainer, see: Callable[[Any], None]) -> None:
    """Show each batch of training to a function, by a new `trainer.compute_loss`.

    No callback is given the batch, and a hook on the model would see what TRL makes of it: DPO's pairs in one batch,
    GRPO's prompts and completions in pieces. Delete this when the Trainer hands the inputs to an event of a step.
    """
    compute_loss = trainer.compute_loss

    @functools.wraps(compute_loss)
    def compute_loss_of_seen(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            see(inputs)
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss_of_seen


class CardWriter:
    """Stands in for `trainer.create_model_card`: lets it write its card, and then writes over it on the main process.

    transformers and TRL call that method at checkpoints and before they push, and no callback learns of it:
    `on_push_begin` comes before. Delete this when the Trainer has an event after its card.
    """

    def __init__(self, trainer: Trainer, write: Callable[[Trainer, dict[str, Any]], None]):
        self.trainer, self.own_method, self.write = trainer, trainer.create_model_card, write
        self.given: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Write the trainer's own card, and ours over it."""
        self.own_method(*args, **kwargs)
        if self.trainer.is_world_process_zero():
            self.write(self.trainer, self.given)

"""The methods of a trainer that reports replace, because no callback can do their work; each says when it can go.

Predictions of memory replace two functions of torch for the time of a trace, see `predicted/fused.py`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card.markdown import one_line


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

    def __init__(self, trainer: Trainer, write: Callable[[Trainer, dict[str, Any], dict[str, Any]], None]):
        self.trainer, self.own_method, self.write = trainer, trainer.create_model_card, write
        self.given: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Write the trainer's own card, and ours over it."""
        said = self._named(args, kwargs)
        self.own_method(**said)
        if self.trainer.is_world_process_zero():
            self.write(self.trainer, self.given, said)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by the names of their parameters, each text on one line: the trainer writes them raw.

        So it writes the name of its folder, which is given here if need be.
        """
        names = inspect.signature(self.own_method).parameters
        said = {**dict(zip(names, args, strict=False)), **kwargs}
        folder = Path(self.trainer.args.output_dir).name
        if said.get("model_name") is None and "model_name" in names and folder != one_line(folder):
            said["model_name"] = folder
        return {name: _on_one_line(value) for name, value in said.items()}


def _on_one_line(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_on_one_line(inner) for inner in value]
    return one_line(value) if isinstance(value, str) else value

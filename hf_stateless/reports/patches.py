"""The methods of a trainer that reports replace, because no callback can do their work; each says when it can go.

Predictions of memory replace two functions of torch for the time of a trace, see `predicted/fused.py`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from .card.markdown import one_line
from .card.pushing import begin_push


if TYPE_CHECKING:
    from transformers import Trainer

    from .card.during_training import PushCallback


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


class OwnPush:
    """Stands in for `trainer.push_to_hub`, which sends the pickled arguments: prepares the folder alike, and pushes.

    `save_model` calls it too. No callback can keep a file out of what the Trainer sends. Delete this when
    `push_to_hub` takes patterns of what stays.
    """

    def __init__(self, trainer: Trainer, pushes: PushCallback) -> None:
        self.trainer, self.pushes = trainer, pushes

    def __call__(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save model and card, and push them; all processes have to call it.

        Returns:
            The commit, or its future with `blocking=False`; None on all processes but the main one.
        """
        trainer = self.trainer
        args = trainer.args
        begin_push(trainer)
        asked, args.push_to_hub = args.push_to_hub, False
        try:
            trainer.save_model()
        finally:
            args.push_to_hub = asked
        if not trainer.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        known = [tags] if isinstance(tags, str) else list(tags)
        known += [tag for tag in getattr(trainer.model, "model_tags", None) or () if tag not in known]
        folder = args.hub_model_id.split("/")[-1] if args.hub_model_id else Path(args.output_dir).name
        name = kwargs.pop("model_name", None) or folder
        trainer.create_model_card(model_name=name, tags=known, **kwargs)
        if trainer.hub_model_id is None and private is not None:
            args.hub_private_repo = private
        message = commit_message or "End of training"
        push = functools.partial(self.pushes.push_now, message, token=token, revision=revision)
        return push() if blocking else HfApi().run_as_future(push)


def _on_one_line(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_on_one_line(inner) for inner in value]
    return one_line(value) if isinstance(value, str) else value

"""A run that is resumed after its last step: nothing is trained, and what was missing is done."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_stateless.reports.measured.picture import draw
from hf_stateless.reports.measured.schema import PICTURE_FILE, MemoryReport


# What the Trainer would do once more at the end of the epoch, or before the first step.
_ONCE_MORE = {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "eval_on_start": False}


def train_or_finish(trainer: Trainer, checkpoint: str | None) -> None:
    """Train from a checkpoint on, if there is one; where it has reached the last step, only load it.

    The Trainer itself takes one step more when it resumes within an epoch.
    """
    if checkpoint is None or steps_of(checkpoint) < (last := last_step(trainer)):
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    if trainer.is_world_process_zero():
        print(f"{checkpoint} is at step {steps_of(checkpoint)} of {last}: nothing is left to train.")
        _complete_report(checkpoint, trainer.args.output_dir)
    with _without_steps(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    if "train_runtime" in trainer.state.log_history[-1]:
        trainer.state.log_history.pop()  # a loss of 0 over no steps


def steps_of(checkpoint: str) -> int:
    """Return how many steps a checkpoint has behind it; 0 where it does not say so."""
    file = Path(checkpoint, TRAINER_STATE_NAME)
    if not file.is_file():
        return 0
    try:
        step = TrainerState.load_from_json(str(file)).global_step
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): resume from another checkpoint.") from None
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{file} says global_step={step!r}, expected a whole number: resume from another checkpoint.")
    return step


def last_step(trainer: Trainer) -> int:
    """Return the step at which training ends: `max_steps`, or that of the last epoch."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    updates = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * max(1, updates))


@contextlib.contextmanager
def _without_steps(trainer: Trainer) -> Iterator[None]:
    """Let the Trainer load everything as for a resume, and find no batch."""
    asked = {name: getattr(trainer.args, name) for name in _ONCE_MORE}
    vars(trainer.args).update(_ONCE_MORE)
    trainer.get_batch_samples = lambda *_, **__: ([], None)
    try:
        yield
    finally:
        del trainer.get_batch_samples
        vars(trainer.args).update(asked)


def _complete_report(checkpoint: str, folder: str) -> None:
    """Complete the memory report of the run from that of its last checkpoint, if the run ended before it did so."""
    with contextlib.suppress(OSError, ValueError):
        report = MemoryReport.load(checkpoint)
        with contextlib.suppress(OSError, ValueError):
            if MemoryReport.load(folder).complete:
                return
        report.complete = True
        report.save(folder)
        with contextlib.suppress(ImportError):
            draw(report, Path(folder, PICTURE_FILE))

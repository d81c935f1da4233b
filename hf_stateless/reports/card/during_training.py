"""Pushes while a model is trained: at each save, in the background, and without what belongs to this machine only."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ...trainer.table import announce, trainer_prints
from ..command_line import first_line
from ..patches import OwnPush
from .contents import Contents, collect, listing
from .dashboard import write_dashboard
from .hub_client import limit_waits
from .private import Machine
from .pushing import WAITS, PushError, begin_push, command_for_later, repeated, upload
from .trackers import clean_tracker


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)
STAGE = ".hf_stateless_push"
"""Folder in the output folder where large files of a push are kept as links, until it is done."""


def attach_push(trainer: Trainer, *, without: Sequence[str] = (), dashboard: bool = False) -> PushCallback:
    """Let all pushes of a trainer go through one door: nothing private, a list of what goes, repeated where they fail.

    `hub_strategy` says what is pushed at saves, as the Trainer means it: `end` nothing, `every_save` the model,
    `checkpoint` also the checkpoint as `last-checkpoint/`, `all_checkpoints` each one under its name; the last two
    with `optimizer.pt`. `attach_memory_report` and `attach_model_card` call this where the trainer pushes. While it
    trains, `trainer.args.hub_strategy` is `end`, so that the Trainer itself does not push the same once more.

    A push that fails at a save is told in one line, and training goes on; `trainer.push_to_hub()` raises `PushError`,
    whose message has the command that pushes later.

    Args:
        trainer: before `trainer.train()`.
        without: patterns of names or paths in the repository that stay here, such as `optimizer.pt`; added to those
            of earlier calls.
        dashboard: push the curves of the log too, as `dashboard.html`, to which the card leads.

    Example:
        >>> import tempfile
        >>> import hf_stateless
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=2, vocab_size=32)
        >>> args = TrainingArguments(tempfile.mkdtemp(), optim="sinkgd", use_cpu=True, report_to=[])
        >>> trainer = Trainer(LlamaForCausalLM(config), args)
        >>> pushes = hf_stateless.attach_push(trainer, without=["optimizer.pt"])
        >>> hf_stateless.attach_push(trainer, without=["*.pth"]).without
        ('optimizer.pt', '*.pth')
    """
    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, PushCallback)]
    callback = found[0] if found else PushCallback(trainer)
    if not found:
        trainer.add_callback(callback)
        if type(trainer).push_to_hub is Trainer.push_to_hub:
            trainer.push_to_hub = OwnPush(trainer, callback)
        else:
            logger.warning("%s pushes by itself: nobody looks at what it sends.", type(trainer).__name__)
    callback.without += tuple(pattern for pattern in without if pattern not in callback.without)
    callback.dashboard |= dashboard
    return callback


class PushCallback(TrainerCallback):  # type: ignore[misc]
    """Pushes the model of one trainer at its saves; see `attach_push`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.without: tuple[str, ...] = ()
        self.dashboard = False
        self._strategy = HubStrategy.END
        self._api = HfApi()  # one for all: its jobs wait for each other
        self._jobs: list[Future[Any]] = []
        self._failure: BaseException | None = None
        self._told: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the pushes of the Trainer."""
        if args.hub_strategy != HubStrategy.END:
            self._strategy, args.hub_strategy = HubStrategy(args.hub_strategy), HubStrategy.END
        if state.is_world_process_zero:
            clean_tracker(Machine([args.hub_token], [args.output_dir]))
            shutil.rmtree(Path(args.output_dir) / STAGE, ignore_errors=True)  # of a run that was killed

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the curves in the folder that is pushed, if they are asked for."""
        if not self.dashboard or not state.is_world_process_zero:
            return
        try:
            write_dashboard(args.output_dir, self._repository().rsplit("/", 1)[-1], state.log_history)
        except OSError as error:
            logger.warning("The dashboard cannot be written: %s", first_line(error))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Push what was saved in the background, unless the last push is still on its way."""
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        asked = args.push_to_hub and self._strategy != HubStrategy.END and state.is_world_process_zero
        busy = any(not job.done() for job in self._jobs) and not args.hub_always_push
        if not asked or busy or not checkpoint.is_dir():
            return
        steps = args.save_strategy == "steps"
        message = f"Training in progress, {f'step {state.global_step}' if steps else f'epoch {int(state.epoch)}'}"
        begin_push(self._trainer)
        stage = Path(args.output_dir) / STAGE / str(state.global_step)
        try:
            contents = self._collect(checkpoint)
            contents.freeze(stage)
        except (OSError, ValueError, PushError) as error:
            logger.warning("Nothing is pushed at step %d: %s", state.global_step, first_line(error))
            shutil.rmtree(stage, ignore_errors=True)
            return
        self._jobs.append(self._api.run_as_future(self._push_frozen, contents, message, stage))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the push that is on its way, and say what to type if it failed."""
        self.wait()
        if self._strategy != HubStrategy.END:
            args.hub_strategy, self._strategy = self._strategy, HubStrategy.END
        if self._failure:
            logger.warning("The last push of this training failed: %s", self._failure)

    def wait(self) -> None:
        """Wait until no push is on its way."""
        for job in self._jobs:
            if error := job.exception():  # of a kind that nobody foresaw
                self._failure = error
        self._jobs.clear()
        if self._trainer.is_world_process_zero():
            shutil.rmtree(Path(self._trainer.args.output_dir) / STAGE, ignore_errors=True)

    def push_now(
        self,
        message: str,
        *,
        waits: Sequence[float] = WAITS,
        token: str | None = None,
        revision: str | None = None,
    ) -> CommitInfo:
        """Push the output folder and wait for it, on the main process.

        Raises:
            PushError: the Hub could not be reached or refused.
        """
        self.wait()
        if getattr(self._trainer, "push_in_progress", None) is not None:
            self._trainer.push_in_progress.wait_until_done()
        commit = self._repeated(self._collect(None), message, waits, token, revision)
        self._failure = None
        return commit

    def _push_frozen(self, contents: Contents, message: str, stage: Path) -> None:
        try:
            self._repeated(contents, message, WAITS, None, None)
            self._failure = None
        except PushError as error:
            self._failure = error
            logger.warning("%s Training goes on, and the next save tries again.", error)
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _repeated(
        self, contents: Contents, message: str, waits: Sequence[float], token: str | None, revision: str | None
    ) -> CommitInfo:
        trainer, args = self._trainer, self._trainer.args

        def action() -> CommitInfo:
            if trainer.hub_model_id is None:
                limit_waits()
                trainer.init_hf_repo(token=token)
            where = {"token": token or args.hub_token, "revision": revision or args.hub_revision}
            return upload(contents, trainer.hub_model_id, message, **where)

        return repeated(action, waits, self._advice)

    def _collect(self, checkpoint: Path | None) -> Contents:
        args = self._trainer.args
        machine = Machine([args.hub_token], [args.output_dir])
        own = checkpoint and checkpoint.name
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: own}
        name = names.get(self._strategy)
        contents = collect(
            args.output_dir,
            machine,
            checkpoint=checkpoint,
            checkpoints=[(name, checkpoint)] if name and checkpoint else [],
            without=self.without,
        )
        self._tell(contents, checkpoint is not None)
        return contents

    def _tell(self, contents: Contents, saving: bool) -> None:
        """Tell the list before the first push, and later what is new among that which stays here."""
        new = {name: why for name, (_, why) in contents.left_out.items() if name not in self._told}
        if not self._told:
            note = f" at each save (hub_strategy={self._strategy.value})" if saving else ""
            announce(listing(contents, self._repository(), note), printed=trainer_prints(self._trainer.args))
        else:
            for name, why in new.items():
                if not name.startswith(PREFIX_CHECKPOINT_DIR):
                    logger.warning("Not pushed: %s (%s)", name, why)
        self._told.update(contents.left_out, ["the list"])

    def _repository(self) -> str:
        args = self._trainer.args
        named = self._trainer.hub_model_id or args.hub_model_id
        return str(named or os.path.basename(os.path.abspath(args.output_dir)))

    def _advice(self, failure: str) -> str:
        args, repository = self._trainer.args, self._repository()
        more = [word for pattern in self.without for word in ("--without", pattern)]
        kept = {HubStrategy.CHECKPOINT: "last", HubStrategy.ALL_CHECKPOINTS: "all"}.get(self._strategy)
        later = command_for_later(
            args.output_dir,
            repository,
            revision=args.hub_revision,
            token=args.hub_token,
            more=[*(["--checkpoints", kept] if kept else []), *more],
        )
        return f"not pushed to {repository} {failure}. The model is complete in {args.output_dir}; {later}"

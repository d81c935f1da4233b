"""Push a trained model with its card to the Hub over a network that may fail, and keep the token out of every file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from transformers.trainer_utils import HubStrategy

from ..command_line import first_line
from .hub_client import limit_waits, seconds_asked


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import Trainer, TrainingArguments

    from .contents import Contents

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

WAITS = (5.0, 15.0, 45.0)
"""Seconds before each new attempt; within an attempt huggingface_hub repeats most requests by itself."""
PATIENCE = 600.0
"""Seconds after which a Hub that does not answer at all is not tried again."""


class Token(str):
    """A token that authenticates as usual, but is pickled as None and shown as dots."""

    def __reduce_ex__(self, protocol: Any) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __deepcopy__(self, memo: Any) -> Token:
        return self

    def __repr__(self) -> str:
        return "'...'"


class PushError(RuntimeError):
    """The model is on disk but not on the Hub; the message says why, and the command that pushes it later."""


def push(trainer: Trainer, *, waits: Sequence[float] = WAITS) -> CommitInfo | None:
    """Push the output folder, with model and card: no checkpoints, no optimizer state, no pickled arguments.

    Pushing again makes a commit only if a file has changed. `hub_strategy: checkpoint` is the way to ask for
    checkpoints with their `optimizer.pt`; they are pushed during training, see
    `hf_stateless.attach_push`.

    Args:
        trainer: after `hf_stateless.reports.card.attach.save`.
        waits: seconds before each new attempt; empty for a single one.

    Returns:
        The commit; None on all processes but the main one.

    Raises:
        PushError: the Hub could not be reached or refused.
    """
    from .during_training import attach_push

    if not trainer.is_world_process_zero():
        return None
    return attach_push(trainer).push_now("End of training", waits=waits)


def repeated(action: Callable[[], _T], waits: Sequence[float], advice: Callable[[str], str]) -> _T:
    """Do it again where it failed for a reason that may pass.

    Args:
        action: it may be done several times.
        waits: seconds before each new attempt; a busy Hub may ask for more.
        advice: what to tell, from how it failed.

    Raises:
        PushError: the last attempt failed, or there is no use in another.
    """
    start = time.monotonic()
    for attempt, wait in enumerate([*waits, None], start=1):
        try:
            return action()
        except Exception as error:
            slow = isinstance(error, (httpx.TimeoutException, ConnectionError))
            silent = slow and time.monotonic() - start > PATIENCE
            if wait is None or silent or not is_transient(error):
                raise PushError(advice(f"after {attempt} attempts: {first_line(error)}")) from error
            wait = max(wait, _asked_to_wait(error))
            logger.warning("The Hub failed (%s). Trying again in %.0f s.", first_line(error), wait)
            time.sleep(wait)
    raise AssertionError


@contextlib.contextmanager
def repository_later(args: TrainingArguments) -> Iterator[None]:
    """Let a trainer be built without its repository, which it makes with a single request; see `create_repository`."""
    asked, args.push_to_hub = args.push_to_hub, False
    try:
        yield
    finally:
        args.push_to_hub = asked


def create_repository(trainer: Trainer, *, waits: Sequence[float] = WAITS) -> None:
    """Make the repository of a trainer that was built with `repository_later`, if it is to push.

    Where the Hub is busy or away after all attempts, training begins all the same, and `push` tries at its end.

    Args:
        trainer: before `train()`.
        waits: seconds before each new attempt.

    Raises:
        PushError: the Hub refused, as for a wrong token.
    """
    if not trainer.args.push_to_hub or trainer.hub_model_id is not None or not trainer.is_world_process_zero():
        return
    limit_waits()
    try:
        repeated(trainer.init_hf_repo, waits, lambda failure: failure)
    except PushError as error:
        if not is_transient(error.__cause__):
            repository = trainer.args.hub_model_id or os.path.basename(os.path.abspath(trainer.args.output_dir))
            why = first_line(error.__cause__ or error)
            raise PushError(f"no repository {repository} on the Hub, nothing was trained: {why}") from error.__cause__
        trainer.args.hub_strategy = HubStrategy.END  # the Trainer cannot push without a repository
        logger.warning("The repository cannot be made now: the model is pushed when it is trained.")


def begin_push(trainer: Trainer) -> None:
    """Tell the callbacks of a trainer that it pushes; trackers go to the Hub then, and may fail as a push may."""
    try:
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    except Exception as error:
        logger.warning("A callback failed before the push: %s", first_line(error))


def upload(
    contents: Contents, repository: str, message: str, *, token: str | None, revision: str | None
) -> CommitInfo:
    """Make one commit of the files of a push; those that the Hub has already are not sent again."""
    limit_waits()
    operations = [
        CommitOperationAdd(name, item.source if isinstance(item.source, bytes) else str(item.source))
        for name, item in contents.pushed.items()
    ]
    api = HfApi(token=token)
    return api.create_commit(repository, operations, commit_message=message, revision=revision)


def is_transient(error: BaseException | None) -> bool:
    """Tell whether a failed push may succeed later: server errors, rate limits, and connections that broke."""
    if isinstance(error, HfHubHTTPError):
        return _may_pass(error.response.status_code)
    # What hf_xet says of an answer of the Hub; it has tried again itself, for about three minutes.
    if isinstance(error, ConnectionError) and (told := re.search(r"HTTP status \w+ error \((\d{3}) ", str(error))):
        return _may_pass(int(told[1]))
    # A proxy's error page in place of JSON is a server error too: huggingface_hub parses some answers before it looks
    # at their status.
    broken = (httpx.TransportError, ConnectionError, TimeoutError, json.JSONDecodeError)
    return isinstance(error, broken) and not isinstance(error, OfflineModeIsEnabled)


def _may_pass(status: int) -> bool:
    return status in (408, 425, 429) or status >= 500


def _asked_to_wait(error: Exception) -> float:
    """Return the seconds that a busy server asks for; huggingface_hub heeds them in some of its requests only."""
    return seconds_asked(error.response.headers.get("Retry-After", "")) if isinstance(error, HfHubHTTPError) else 0.0


def command_for_later(
    folder: str, repository: str, *, revision: str | None, token: str | None, more: Sequence[str] = ()
) -> str:
    """Return what to type to push a folder later, the token aside: it is taken from a login or from HF_TOKEN."""
    command = ["hf-stateless", "push", folder, repository, *more]
    command += ["--revision", revision] if revision else []
    explicit = token or constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
    first = "put your token into HF_TOKEN, and " if explicit and not os.environ.get("HF_TOKEN") else ""
    return f"{first}push it later with: {shlex.join(command)}"

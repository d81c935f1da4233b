"""Push a trained model with its card to the Hub over a network that may fail, and keep the token out of every file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from transformers.trainer_utils import HubStrategy

from ..command_line import first_line
from ..files import read_json
from .facts import CardFacts
from .hub_client import limit_waits, seconds_asked


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import Trainer, TrainingArguments

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

NOT_PUSHED = ("_*", "checkpoint-*", "*/checkpoint-*", "*optimizer.pt", "*optimizer.bin", "training_args.bin")
"""Files that are not pushed. `training_args.bin` is a pickle that names the folders of this machine."""
WAITS = (5.0, 15.0, 45.0)
"""Seconds before each new attempt; within an attempt huggingface_hub repeats most requests by itself."""
PATIENCE = 600.0
"""Seconds after which a Hub that does not answer at all is not tried again."""
ADAPTER_CONFIG = "adapter_config.json"


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
    checkpoints with their `optimizer.pt`; the Trainer pushes them while it trains.

    Args:
        trainer: after `hf_stateless.reports.card.attach.save`.
        waits: seconds before each new attempt; empty for a single one.

    Returns:
        The commit; None on all processes but the main one.

    Raises:
        PushError: the Hub could not be reached or refused.
    """
    if not trainer.is_world_process_zero():
        return None
    return _repeated(trainer, lambda: _upload(trainer), waits)


def _repeated(trainer: Trainer, action: Callable[[], _T], waits: Sequence[float]) -> _T:
    """Do it again where it failed for a reason that may pass.

    Raises:
        PushError: the last attempt failed, or there is no use in another.
    """
    start = time.monotonic()
    for attempt, wait in enumerate([*waits, None], start=1):
        try:
            return action()
        except Exception as error:
            silent = isinstance(error, httpx.TimeoutException) and time.monotonic() - start > PATIENCE
            if wait is None or silent or not is_transient(error):
                raise PushError(_advice(trainer, f"after {attempt} attempts: {first_line(error)}")) from error
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
        _repeated(trainer, trainer.init_hf_repo, waits)
    except PushError as error:
        if not is_transient(error.__cause__):
            repository = trainer.args.hub_model_id or os.path.basename(os.path.abspath(trainer.args.output_dir))
            why = first_line(error.__cause__ or error)
            raise PushError(f"no repository {repository} on the Hub, nothing was trained: {why}") from error.__cause__
        trainer.args.hub_strategy = HubStrategy.END  # the Trainer cannot push without a repository
        logger.warning("The repository cannot be made now: the model is pushed when it is trained.")


def _upload(trainer: Trainer) -> CommitInfo:
    args = trainer.args
    if trainer.hub_model_id is None:
        limit_waits()
        trainer.init_hf_repo()
    if trainer.push_in_progress is not None:
        trainer.push_in_progress.wait_until_done()
    limit_waits()  # only now: it closes the connections of an upload
    api, ignored = HfApi(token=args.hub_token), list(NOT_PUSHED)
    target = {"repo_id": trainer.hub_model_id, "revision": args.hub_revision, "commit_message": "End of training"}
    adapter = _public_adapter_config(args.output_dir)
    if adapter is not None:
        api.upload_file(path_or_fileobj=adapter, path_in_repo=ADAPTER_CONFIG, **target)
        ignored.append(ADAPTER_CONFIG)
    commit: CommitInfo = api.upload_folder(folder_path=args.output_dir, ignore_patterns=ignored, **target)
    return commit


def _public_adapter_config(folder: str) -> bytes | None:
    """Return an adapter's config with the Hub's name of its base model, if the one on disk names a folder."""
    file = Path(folder) / ADAPTER_CONFIG
    try:
        config = read_json(file) if file.is_file() else {}
        if not os.path.isdir(config.get("base_model_name_or_path") or ""):
            return None
        config["base_model_name_or_path"] = CardFacts.load(folder).base_model
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise PushError(f"{file}: no config of an adapter ({first_line(error)}); save the model again") from None
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def is_transient(error: BaseException | None) -> bool:
    """Tell whether a failed push may succeed later: server errors, rate limits, and connections that broke."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 425, 429) or error.response.status_code >= 500
    # A proxy's error page in place of JSON is a server error too: huggingface_hub parses some answers before it looks
    # at their status.
    broken = (httpx.TransportError, ConnectionError, TimeoutError, json.JSONDecodeError)
    return isinstance(error, broken) and not isinstance(error, OfflineModeIsEnabled)


def _asked_to_wait(error: Exception) -> float:
    """Return the seconds that a busy server asks for; huggingface_hub heeds them in some of its requests only."""
    return seconds_asked(error.response.headers.get("Retry-After", "")) if isinstance(error, HfHubHTTPError) else 0.0


def _advice(trainer: Trainer, failure: str) -> str:
    args = trainer.args
    repository = trainer.hub_model_id or args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
    command = ["hf", "upload", repository, args.output_dir, "."]
    command += [word for pattern in NOT_PUSHED for word in ("--exclude", pattern)]
    command += ["--revision", args.hub_revision] if args.hub_revision else []
    # `hf` finds the token of a login or of the variable by itself, unless that is forbidden; no token is printed.
    token = ' --token "$HF_TOKEN"' if args.hub_token or constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else ""
    first = "put your token into HF_TOKEN, and " if token and not os.environ.get("HF_TOKEN") else ""
    return (
        f"not pushed to {repository} {failure}. The model is complete in {args.output_dir}; "
        f"{first}push it later with: {shlex.join(command)}{token}"
    )

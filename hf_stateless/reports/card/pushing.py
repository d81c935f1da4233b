"""Push a trained model with its card to the Hub over a network that may fail, and keep the token out of every file."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from ..command_line import first_line
from ..files import read_json
from .facts import CardFacts


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import Trainer

logger = logging.getLogger(__name__)

NOT_PUSHED = ("_*", "checkpoint-*", "*/checkpoint-*", "*optimizer.pt", "*optimizer.bin", "training_args.bin")
"""Files that are not pushed. `training_args.bin` is a pickle that names the folders of this machine."""
WAITS = (5.0, 15.0, 45.0)
"""Seconds before each new attempt; within an attempt huggingface_hub repeats most requests by itself."""
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
    for attempt, wait in enumerate([*waits, None], start=1):
        try:
            return _upload(trainer)
        except Exception as error:
            if wait is None or not is_transient(error):
                raise PushError(_advice(trainer, f"after {attempt} attempts: {first_line(error)}")) from error
            wait = max(wait, _asked_to_wait(error))
            logger.warning("Push failed (%s). Trying again in %.0f s.", first_line(error), wait)
            time.sleep(wait)
    raise AssertionError


def _upload(trainer: Trainer) -> CommitInfo:
    args = trainer.args
    if trainer.hub_model_id is None:
        trainer.init_hf_repo()
    if trainer.push_in_progress is not None:
        trainer.push_in_progress.wait_until_done()
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
    config = read_json(file) if file.is_file() else {}
    if not os.path.isdir(config.get("base_model_name_or_path") or ""):
        return None
    config["base_model_name_or_path"] = CardFacts.load(folder).base_model
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def is_transient(error: Exception) -> bool:
    """Tell whether a failed push may succeed later: server errors, rate limits, and connections that broke."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 425, 429) or error.response.status_code >= 500
    # A proxy's error page in place of JSON is a server error too: huggingface_hub parses some answers before it looks
    # at their status.
    broken = (httpx.TransportError, ConnectionError, TimeoutError, json.JSONDecodeError)
    return isinstance(error, broken) and not isinstance(error, OfflineModeIsEnabled)


def _asked_to_wait(error: Exception) -> float:
    """Return the seconds that a busy server asks for; huggingface_hub heeds them in some of its requests only."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(asked) if asked.isdigit() else 0.0


def _advice(trainer: Trainer, failure: str) -> str:
    args = trainer.args
    repository = trainer.hub_model_id or args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
    command = ["hf", "upload", repository, args.output_dir, "."]
    command += [word for pattern in NOT_PUSHED for word in ("--exclude", pattern)]
    command += ["--revision", args.hub_revision] if args.hub_revision else []
    return (
        f"not pushed to {repository} {failure}. The model is complete in {args.output_dir}; "
        f"push it later with: {shlex.join(command)}"
    )

"""How long a push waits: for a Hub that is silent, and when a busy Hub asks to come back later."""

from __future__ import annotations

import datetime
import email.utils
import re
from typing import Any

from huggingface_hub import set_client_factory
from huggingface_hub.utils import _http, httpx  # type: ignore[attr-defined]


SILENCE = 60.0
"""Seconds without a byte after which a request fails; huggingface_hub itself waits for ever."""
LONGEST_WAIT = 300.0
"""Seconds before a new attempt at most, whatever the Hub asks for; its own limits are counted over 300 s."""
_RESET = re.compile(r"\b([rt])=(\d+)")
_LIMITED = "limited by hf_stateless"


def limit_waits() -> None:
    """Let the requests of huggingface_hub in this process fail after `SILENCE`, and bound what it sleeps.

    huggingface_hub obeys `Retry-After` without a bound. The clients that it makes are changed; one that was set with
    `set_client_factory` keeps all else, and its own timeout. Calling this again changes nothing.
    """
    factory = _http._GLOBAL_CLIENT_FACTORY
    if hasattr(factory, "limits"):
        return

    def limited() -> Any:
        client = factory()
        if client.timeout == httpx.Timeout(None):
            client.timeout = httpx.Timeout(SILENCE)
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [*hooks["response"], _bound_waits]}
        return client

    limited.limits = _LIMITED  # type: ignore[attr-defined]
    set_client_factory(limited)


def _bound_waits(response: Any) -> None:
    """Rewrite the headers of an answer that say when to come back."""
    headers = response.headers
    if "Retry-After" in headers:
        headers["Retry-After"] = str(round(seconds_asked(headers["Retry-After"])))
    if "ratelimit" in headers:
        longest = int(LONGEST_WAIT)
        headers["ratelimit"] = _RESET.sub(lambda m: f"{m[1]}={min(int(m[2][:9]), longest)}", headers["ratelimit"])


def seconds_asked(header: str) -> float:
    """Return the seconds that a `Retry-After` asks for, at most `LONGEST_WAIT`; 0 for what is no time to come.

    Args:
        header: seconds, or a date as HTTP writes it.

    Example:
        >>> from hf_stateless.reports.card.hub_client import seconds_asked
        >>> [seconds_asked(header) for header in ("30", "864000", "Wed, 21 Oct 2015 07:28:00 GMT", "nan")]
        [30.0, 300.0, 0.0, 0.0]
    """
    text = header.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        return min(float(text), LONGEST_WAIT)
    try:
        moment = email.utils.parsedate_to_datetime(text)
        utc = moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)
        seconds = (utc - datetime.datetime.now(datetime.timezone.utc)).total_seconds()
    except (TypeError, ValueError, OverflowError, IndexError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)

"""What looks like a secret, wherever it stands: it is replaced by `...` before anything is written down."""

from __future__ import annotations

import re


HIDDEN = "..."
"""What stands for all that is not told."""

# The beginnings that services give their keys, so that they are found when they leak.
_KEYS = (
    r"hf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|hf_[A-Za-z]{20,}|(?:gh[a-z]|github_pat|npm|api_org|dckr_pat|gsk|r8)_\w{10,}",
    r"(?:glpat|xapp|xox[a-z]|nvapi|pypi|pplx)-[\w-]{10,}|sk-(?=[A-Za-z_-]*\d)[\w-]{8,}|sk-\w{16,}|[a-z]k_(?:live|test)_\w+",
    r"(?:AKIA|ASIA|AIza|ya29\.|SG\.|ATATT|dop_v1_|shpat_|whsec_)[\w.-]{10,}|eyJ[\w-]{8,}(?:\.[\w-]*)*",
)
_KEY = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_KEYS)})")
_NAMED = re.compile(
    r"""["']?[\w.-]*(?:token(?![a-z])|secret|passw|passphrase|pwd|api[-_.]?key|(?:access|private|account|shared)[-_.]?key
    |credential|authoriz|auth(?![a-z])|signature|sig(?![a-z]))[\w.-]*["']?\s*[=:]\s*(?:(?:bearer|basic|token)\s+)?
    (?:"[^"]*"|'[^']*'|["']?[^\s"',;&}]+["']?)
    |bearer\s+\S+|basic\s+(?=\S*[\d=]|\S{16})\S+|-----BEGIN[\s\S]*""",
    re.IGNORECASE | re.VERBOSE,
)
# Random text: letters and digits without a pause, or such as change between small, capital and digit all the time.
_UUID = r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}"
_UNBROKEN = re.compile(rf"(?i:{_UUID})|(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{{20,}}|[A-Za-z]{{32,}}")
_LONG = re.compile(r"[A-Za-z0-9+/_=.~-]{20,}")
_BASE64 = re.compile(r"(?=([A-Za-z0-9+/]{40}))")
_CHANGES = re.compile(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z])(?=[a-z0-9])|(?<=[0-9])(?=[A-Za-z])")
_USER = re.compile(r"(\w+://)[^\s/?#@\"']+@")
_QUERY = re.compile(r"(\w+://[^\s\"'?#]*)[?#][^\s\"']*")


def without_secrets(text: str) -> str:
    """Return a text with `...` for what looks like a key, a token or a password, and addresses without their query.

    Example:
        >>> from hf_stateless.reports.secrets import without_secrets
        >>> without_secrets("read with api_key=1234 from https://host/rows?signature=56 with seed 7")
        'read with ... from https://host/rows with seed 7'
    """
    for kind in (_NAMED, _KEY):
        text = kind.sub(HIDDEN, text)
    text = _QUERY.sub(r"\1", _USER.sub(r"\1", text))
    return _LONG.sub(lambda match: HIDDEN if _is_random(match[0]) else match[0], _UNBROKEN.sub(HIDDEN, text))


def without_keys(text: str) -> str:
    """Return a text with `...` for the keys that services give only: no guess, so that a file of a model stays whole.

    Example:
        >>> from hf_stateless.reports.secrets import without_keys
        >>> without_keys("{{ bos_token = 1 }} and hf_QwErTyUiOpAsDfGh")
        '{{ bos_token = 1 }} and ...'
    """
    return _KEY.sub(HIDDEN, text)


def looks_secret(text: str) -> bool:
    """Tell whether a part of a text would be hidden."""
    return without_secrets(text) != text


def _is_random(text: str) -> bool:
    dense = 3 * len(_CHANGES.findall(text)) >= len(text)
    return dense or any(4 * len(_CHANGES.findall(part)) >= len(part) for part in _BASE64.findall(text))

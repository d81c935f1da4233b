"""Where a report comes from: the command and the versions of packages, with nothing private in them."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


PACKAGES = ("hf_stateless", "torch", "transformers", "accelerate", "trl", "peft", "bitsandbytes", "datasets")
_SECRET = re.compile(r"(token|(secret|password|api_?key|credential)s?)$", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# A URL, or a path on any system that is absolute or begins at the home or the parent folder.
_PLACE = re.compile(r"""\w+://[^\s"']*|(?<![\w./\\-])(?:~\w*|\.\.|[A-Za-z]:)?[\\/][^\s"',;=]*""")
_SEPARATORS = re.compile(r"[\\/]+")
# These name an account beside what they are for.
_ACCOUNTS = {"hub_model_id", "push_to_hub_model_id", "hub_bucket_id", "trackio_space_id"}


def published_command(arguments: Sequence[str] | None = None) -> str:
    """Return the command of this process as it may be published.

    Folders outside of the working folder are cut off; tokens, account names and code given with `-c` are left out.
    """
    program, *rest = arguments or sys.orig_argv
    name = _SEPARATORS.split(program)[-1]
    words, key = ["python" if name.startswith(("python", "pypy")) else name], ""
    for argument in rest:
        if argument == "-c":
            return shlex.join([*words, "-c"]) + " ..."
        if argument.startswith("-"):
            key, equals, value = argument.partition("=")
            words.append(key + equals + _value(key, value))
            key = "" if equals else key
        else:
            words.append(_value(key, argument))
            key = ""
    return shlex.join(words)


def _value(key: str, text: str) -> str:
    """Return the value of an argument as it may be published."""
    name = key.lstrip("-").replace("-", "_")
    if text and (_SECRET.search(name) or "organization" in name):
        return "..."
    if name in _ACCOUNTS:
        return text.rsplit("/", 1)[-1]
    return _last_name(text) if Path(text).is_absolute() else without_folders(text)


def without_folders(text: str) -> str:
    """Shorten every absolute path in a text: to what lies below the working folder, or to its last name."""
    shortened = _PLACE.sub(lambda match: _last_name(match[0]), _HUB_TOKEN.sub("...", text))
    home = str(Path.home())
    return shortened.replace(home, "~") if len(home) > 1 else shortened


def _last_name(place: str) -> str:
    """Return a path without the folders above the working folder; a URL stays, unless it is local or has a user."""
    if "://" in place and not place.startswith("file:") and "@" not in place:
        return place
    if place in ("~", str(Path.home())):
        return "~"
    here = Path.cwd()
    if here != Path(here.anchor) and Path(place).is_relative_to(here) and Path(place) != here:
        return str(Path(place).relative_to(here))
    return _SEPARATORS.split(place.rstrip("\\/"))[-1]


def versions(packages: Iterable[str] | None = None) -> dict[str, str]:
    """Return the versions of Python and of packages, by default those of `PACKAGES` that are loaded, or `unknown`."""
    if packages is None:
        packages = [name for name in PACKAGES if name in sys.modules]
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))

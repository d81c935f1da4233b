"""Where a report comes from: the command and the versions of packages, with nothing private in them."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..optimizer.options import OPTIONS
from .published_flags import SUBCOMMANDS, is_number, is_place, is_word, name_of, shape_of
from .run_facts import option_pairs
from .secrets import HIDDEN, looks_secret, without_secrets


PACKAGES = ("hf_stateless", "torch", "transformers", "accelerate", "trl", "peft", "bitsandbytes", "datasets")
# A URL, or a path on any system that is absolute or begins at the home or the parent folder.
_PLACE = re.compile(r"""\w+://[^\s"']*|(?<![\w./\\-])(?:~\w*|\.\.|[A-Za-z]:)?[\\/][^\s"',;=]*""")
_SEPARATORS = re.compile(r"[\\/]+")
# What Python itself takes before a script; the second kind has a value.
_SWITCH, _SETTING = re.compile(r"-[bBdEhiIOPqsSuvx]+"), {"-W", "-X", "-m"}
_FILE = re.compile(r".*\.(py|ya?ml|json|toml)", re.DOTALL)
# Options of transformers' optimizers and schedules, beside our own.
_OPTION_NAMES = {
    *OPTIONS,
    "rank",
    "update_proj_gap",
    "scale",
    "proj_type",
    "proj",
    "scale_type",
    "rho",
    "moving_average",
}
_OPTION_NAMES |= {"min_lr", "min_lr_rate", "num_cycles", "power", "lr_end", "num_decay_steps", "num_stable_steps"}


def published_command(arguments: Sequence[str] | None = None) -> str:
    """Return the command of this process as it may be published.

    Kept are the script, and of the flags in `published_flags` the values that look as theirs do; folders outside of
    the working folder and account names are cut off. All else becomes `...`: unknown flags, code given with `-c`, and
    whatever looks like a secret.
    """
    program, *rest = arguments or sys.orig_argv
    name = _SEPARATORS.split(program)[-1]
    python = name.startswith(("python", "pypy")) or not is_place(name) or looks_secret(name)
    words = ["python" if python else name, *_interpreter_words(rest)]
    if "-c" in words:
        return " ".join(words)
    flag = ""
    for argument in rest[len(words) - 1 :]:
        if argument.startswith("-") and not (flag and is_number(argument)):
            flag, equals, value = argument.partition("=")
            known = shape_of(flag) is not None
            words.append(flag + equals + (_value(flag, value) if equals else "") if known else HIDDEN)
            flag = "" if equals or not known else flag
        else:
            told = _value(flag, argument) if flag else HIDDEN
            words.append(_positional(argument) if told == HIDDEN and (not flag or argument.endswith(".py")) else told)
    kept = [word for word, before in zip(words, ["", *words], strict=False) if not word == before == HIDDEN]
    return " ".join(word if word.endswith(HIDDEN) else shlex.quote(word) for word in kept)


def _interpreter_words(rest: Sequence[str]) -> list[str]:
    """Return what stands before the script, as it may be published: switches of Python and a module."""
    words: list[str] = []
    while len(words) < len(rest):
        word = rest[len(words)]
        if word == "-c":
            return [*words, word, HIDDEN]
        if _SWITCH.fullmatch(word):
            words.append(word)
        elif word in _SETTING:
            value = "".join(rest[len(words) + 1 : len(words) + 2])
            words += [word, value if is_word(value) and not looks_secret(value) else HIDDEN]
            if word == "-m":
                return words[: len(rest)]
        else:
            return words
    return words[: len(rest)]


def _value(flag: str, text: str) -> str:
    """Return the value of a known flag as it may be published."""
    name, fits = name_of(flag), shape_of(flag)
    if not text:
        return text
    if name == "optim_args":
        return ",".join(f"{key}={value}" for key, value in published_options(text).items()) or HIDDEN
    if name == "lr_scheduler_kwargs":
        try:
            values = published_values(json.loads(text))
        except (ValueError, RecursionError):
            return HIDDEN
        return json.dumps(values) if isinstance(values, dict) else HIDDEN
    if name == "hub_model_id":
        text = text.rsplit("/", 1)[-1]
    return _plain(text) if fits and fits(_shortened(text)) else HIDDEN


def _positional(text: str) -> str:
    """Return a word that belongs to no flag: the name of a script or of a file with arguments."""
    if (name := _SEPARATORS.split(text)[-1]) in SUBCOMMANDS:
        return name
    return _plain(text) if _FILE.fullmatch(text) and "=" not in text and is_place(_shortened(text)) else HIDDEN


def _plain(text: str) -> str:
    return HIDDEN if "://" in text or looks_secret(text) else _shortened(text)


def _shortened(text: str) -> str:
    return _last_name(text) if Path(text).is_absolute() else _without_folders(text)


def published_options(optim_args: str | None) -> dict[str, str]:
    """Return the pairs of `optim_args` as they may be published: names and plain values of known options."""
    pairs = [(key, value) for key, value in option_pairs(optim_args) if key in _OPTION_NAMES]
    return {key: _option_value(value) for key, value in pairs}


def _option_value(text: str) -> str:
    return text if (is_word(text) or is_place(text)) and not looks_secret(text) else HIDDEN


def published_values(values: Any) -> Any:
    """Return options of a schedule as they may be published: numbers of known names; `...` if there is more."""
    if not isinstance(values, Mapping):
        return HIDDEN
    known = all(key in _OPTION_NAMES and is_number(str(value)) for key, value in values.items())
    return dict(values) if known else HIDDEN


def without_folders(text: str) -> str:
    """Shorten every absolute path in a text: to what lies below the working folder, or to its last name.

    What looks like a secret becomes `...`.
    """
    return _without_folders(without_secrets(text))


def _without_folders(text: str) -> str:
    shortened = _PLACE.sub(lambda match: _last_name(match[0]), text)
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

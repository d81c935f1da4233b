"""What a file tells of the machine and the account that wrote it: tokens and folders, found and cut out on the way."""

from __future__ import annotations

import json
import mmap
import os
import re
import socket
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import constants, get_token

from ..secrets import HIDDEN, without_keys


# What is told about every machine.
_PUBLIC = ("usr", "bin", "sbin", "etc", "dev", "proc", "sys", "lib", "lib64")
_ABSOLUTE = re.compile(r"(?:/|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\)[^\n\r\x00]*")
_IN_TEXT = re.compile(
    r"""(?:(?<!\w)file://|(?<![\w./\\<~-]))(?:~[\w.-]*|[A-Za-z]:)?(?:/|\\+)[^\s"'`,;=()<>|*?\[\]{}]+"""
)
_SEPARATORS = re.compile(r"[\\/]+")
# Variables of the environment; TOKENIZER and MAX_TOKENS are none.
_NAMES_A_SECRET = re.compile("TOKEN(?![A-Z])|API_?KEY(?![A-Z])|SECRET|PASSWORD")
# A model reads these letter by letter: nothing may be cut out of them.
_WORDS_OF_A_MODEL = ("tokenizer.json", "vocab", "merges", "added_tokens", "special_tokens_map", "tokenizer.model")
_UNTOUCHED = (".py", ".jinja", ".model", ".tiktoken")
_ARCHIVES = (".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z", ".rar", ".parquet", ".arrow", ".orc")
_LONGEST_TEXT = 16 << 20
_LONGEST_MEMBER = 256 << 20


class PrivateError(ValueError):
    """A file that holds something private that cannot be cut out of it; the message says what."""


class Machine:
    """The tokens and folders of this process: what none of the files that are pushed may hold.

    Args:
        tokens: beside that of the login and of the environment.
        folders: beside the working folder, the home and the caches.
    """

    def __init__(self, tokens: Iterable[str | None] = (), folders: Iterable[str | Path] = ()) -> None:
        known = [*tokens, get_token(), *(v for k, v in os.environ.items() if _NAMES_A_SECRET.search(k))]
        self.tokens = sorted({str(token) for token in known if token and len(str(token)) >= 8}, key=len, reverse=True)
        places = [Path.home(), Path.cwd(), constants.HF_HOME, tempfile.gettempdir(), *folders]
        full = {form for place in places for form in (os.path.abspath(place), os.path.realpath(place))}
        self.folders = sorted((folder for folder in full if _depth(folder) >= 1), key=len, reverse=True)
        # A folder such as /root or /tmp is that of everybody: only what lies in it tells something.
        telling = [folder for folder in self.folders if _depth(folder) > 1]
        self._needles = [(text, "a token") for text in self.tokens] + [(text, "a folder") for text in telling]
        self._bytes = [(form, what) for text, what in self._needles for form in _spellings(text)]

    def look(self, name: str, file: Path) -> bytes | None:
        """Return what to push in place of a file, None where it can be pushed as it is.

        Args:
            name: its path in the repository.
            file: where it lies.

        Raises:
            PrivateError: it holds something private that cannot be cut out.
        """
        self.look_at_name(name)
        base = Path(name).name
        if base.endswith(_ARCHIVES):
            raise PrivateError("compressed: nobody has looked into it")
        if base.endswith(_UNTOUCHED) or base.startswith(_WORDS_OF_A_MODEL):
            self._refuse(file)
            return None
        if base.endswith(".safetensors") or file.stat().st_size > _LONGEST_TEXT or zipfile.is_zipfile(file):
            self._refuse(file)
            return None
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(file)
            return None
        if "\0" in text:
            self._refuse(file)
            return None
        cleaned = self._clean_json(text) if base.endswith(".json") else self.without_private(text)
        self._refuse_text(cleaned)
        return None if cleaned == text else cleaned.encode()

    def look_at_name(self, name: str) -> None:
        """Refuse a name that tells the token, the host or a folder.

        Raises:
            PrivateError: it does.
        """
        host = socket.gethostname()
        if without_keys(name) != name or any(text in name for text, _ in self._needles):
            raise PrivateError("its name holds something private")
        if len(host) >= 6 and host != "localhost" and host in name:
            raise PrivateError("its name is that of this machine")

    def without_private(self, text: str) -> str:
        """Return a text without keys, tokens and folders of this machine; of a path its last part stays."""
        for token in self.tokens:
            text = text.replace(token, HIDDEN)
        return _IN_TEXT.sub(self._place, without_keys(text))

    def _place(self, match: re.Match[str]) -> str:
        place = match[0].rstrip(".:!")
        return self._shortened(place) + match[0][len(place) :] if self._is_ours(place) else match[0]

    def _is_ours(self, place: str) -> bool:
        """Tell whether a path is one of this machine: below a known folder, or one that exists."""
        plain = os.path.expanduser(place.removeprefix("file://"))
        if any(plain == folder or plain.startswith(folder + os.sep) for folder in self.folders):
            return _depth(plain) > 1
        parts = [part for part in _SEPARATORS.split(plain) if part]
        if len(parts) < 2 or parts[0] in _PUBLIC:
            return False
        try:
            return os.path.exists(plain) or os.path.isdir(os.path.dirname(plain))
        except (OSError, ValueError):
            return False

    def _shortened(self, place: str) -> str:
        here, plain = os.getcwd(), os.path.expanduser(place.removeprefix("file://"))
        if _depth(here) and plain.startswith(here + os.sep):
            return os.path.relpath(plain, here)
        return _SEPARATORS.split(plain.rstrip("\\/"))[-1]

    def _clean_json(self, text: str) -> str:
        try:
            values = json.loads(text)
            cleaned = self._clean_value("", values)
        except (ValueError, RecursionError):
            return self.without_private(text)
        return text if cleaned == values else json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"

    def _clean_value(self, key: str, value: object) -> object:
        if isinstance(value, dict):
            return {self.without_private(k): self._clean_value(k, inner) for k, inner in value.items()}
        if isinstance(value, list):
            return [self._clean_value(key, inner) for inner in value]
        if not isinstance(value, str):
            return value
        whole = bool(_ABSOLUTE.fullmatch(value.removeprefix("file://"))) and self._is_ours(value)
        if "name_or_path" in key and (whole or os.path.isdir(value)):
            return _SEPARATORS.split(value.rstrip("\\/"))[-1]
        return self._shortened(value) if whole else self.without_private(value)

    def _refuse(self, file: Path) -> None:
        for part in _parts(file):
            for form, what in self._bytes:
                if part.find(form) != -1:
                    raise PrivateError(f"holds {what} of this machine")

    def _refuse_text(self, text: str) -> None:
        data = text.encode()
        for form, what in self._bytes:
            if form in data:
                raise PrivateError(f"holds {what} of this machine")


def _depth(folder: str) -> int:
    return len([part for part in _SEPARATORS.split(os.path.splitdrive(folder)[1]) if part])


def _spellings(text: str) -> set[bytes]:
    """Return a text as files may hold it: plain, inside JSON, in an address, and in UTF-16."""
    escaped = json.dumps(text)[1:-1]
    forms = {text, escaped, escaped.replace("/", "\\/"), quote(text), quote(text, safe="")}
    return {form.encode() for form in forms} | {text.encode("utf-16-le"), text.encode("utf-16-be")}


def _parts(file: Path) -> Iterator[bytes | mmap.mmap]:
    """Yield the bytes of a file that may hold text; of tensors only what describes them."""
    with file.open("rb") as opened:
        if file.name.endswith(".safetensors"):
            yield opened.read(min(int.from_bytes(opened.read(8), "little"), _LONGEST_MEMBER))
        elif zipfile.is_zipfile(opened):
            yield from _members(file)
        elif file.stat().st_size:
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                yield mapped


def _members(file: Path) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                yield member.filename.encode()
                if not re.search(r"(^|/)data/\d+$", member.filename):  # the numbers of a tensor
                    if member.file_size > _LONGEST_MEMBER:
                        raise PrivateError("compressed: nobody has looked into it")
                    yield archive.read(member)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError) as error:
        raise PrivateError(f"cannot be looked into ({error})") from None

"""The repository's own files: which are tracked, and the code blocks of its Markdown pages."""

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NO_TEST = re.compile(r"<!-- no-test:(.*?)-->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced code block; `no_test` is the reason given in `<!-- no-test: reason -->` just before it, or None."""

    page: str
    line: int
    language: str
    code: str
    no_test: str | None

    def __str__(self):
        return f"{self.page}:{self.line}"


@cache
def tracked_files():
    """Every file under version control or about to be, as paths relative to the repository's root."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return tuple(sorted(name for name in names if (ROOT / name).is_file()))


def read(name):
    """The text of a tracked file."""
    return (ROOT / name).read_text(encoding="utf-8")


def markdown_pages():
    """Every tracked Markdown page."""
    return [name for name in tracked_files() if name.endswith(".md")]


def blocks(page, language):
    """The code blocks of one language on one page, in order."""
    text = read(page)
    found = []
    for match in _FENCE.finditer(text):
        reason = _NO_TEST.search(text, 0, match.start())
        line = text.count("\n", 0, match.start()) + 1
        no_test = reason.group(1).strip() if reason else None
        found.append(Block(page, line, match.group(1), match.group(2), no_test))
    return [block for block in found if block.language == language]


def commands(page):
    """Each command of the page's ```bash blocks as a list of words; `a && b` and line ends separate commands."""
    for block in blocks(page, "bash"):
        joined = block.code.replace("\\\n", " ")
        for part in re.split(r"\n|&&", joined):
            words = part.split("#", 1)[0].split()
            if words:
                yield block, [word.strip("\"'") for word in words]

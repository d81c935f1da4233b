"""The repository's own files: which are tracked, the pages that explain it, and what stands on them."""

import json
import re
import shlex
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent

LIMIT = 220
"""Lines that README.md may have: what does not fit is told beside the code."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^##? (.*)$", re.MULTILINE)
_CARD = re.compile(r"hub_cards/.+/README\.md")
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


def guides():
    """README.md and every page that it leads to; a card in a folder of hub_cards/ is what a run wrote, no guide."""
    return [page for page in markdown_pages() if Path(page).name == "README.md" and not _CARD.fullmatch(page)]


def pages_with(text):
    """The guides that hold this text, word for word."""
    return [page for page in guides() if text in read(page)]


def page_with(text):
    """The guide that holds this table, sentence or command.

    It may stand on any page, so that prose and pages can be edited without the tests of what they tell; that it stands
    on none is the failure.
    """
    found = pages_with(text)
    assert found, f"no page holds this, expected it word for word on one of {', '.join(guides())}:\n{text}"
    return found[0]


def sections(page):
    """Each part of a page from one `#` or `##` heading to the next, as (heading, text); code has no headings."""
    text = read(page)
    fences = [match.span() for match in _FENCE.finditer(text)]
    heads = [m for m in _HEADING.finditer(text) if not any(start < m.start() < end for start, end in fences)]
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return [(head.group(1), text[head.start() : end]) for head, end in zip(heads, ends, strict=True)]


def section(page, heading):
    """The text below one heading of a page, with the parts below smaller headings."""
    match = re.search(rf"^(#+) {re.escape(heading)}$", read(page), re.MULTILINE)
    assert match, f"{page} has no heading {heading!r}"
    rest = read(page)[match.end() :]
    following = re.search(rf"^#{{1,{len(match.group(1))}}} ", _FENCE.sub(lambda m: " " * len(m.group()), rest), re.M)
    return rest[: following.start()] if following else rest


def tables(*headers):
    """Every table of the guides whose columns begin with these headers, as (page, rows); a row is a list of cells."""
    found = []
    for page in guides():
        lines = iter(read(page).splitlines())
        for line in lines:
            if line.startswith("|") and tuple(_cells(line)[: len(headers)]) == headers:
                next(lines)
                rows = []
                while (line := next(lines, "")).startswith("|"):
                    rows.append(_cells(line))
                found.append((page, rows))
    assert found, f"no page has a table whose first columns are {' | '.join(headers)}"
    return found


def _cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


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


def card_commands(script):
    """What was typed in the runs of the cards after the name of a recipe's script, by card."""
    found = {}
    for report in sorted((ROOT / "hub_cards").glob("*/memory_report.json")):
        words = shlex.split(json.loads(report.read_text(encoding="utf-8"))["provenance"]["command"])
        if f"recipes/{script}" in words:
            typed = words[words.index(f"recipes/{script}") + 1 :]
            found[report.parent.name] = [str(ROOT / word) if word.startswith("recipes/") else word for word in typed]
    return found

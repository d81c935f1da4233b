"""Names and texts of other people as they may stand in a card: they are read as text, never as markup or code."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from ..run_facts import is_hub_id


_HARMLESS = re.compile(r"[\w./ +=,:@-]+")
_SPECIAL = re.compile(r"([\\`*\[\]|~])")
_BLOCK = re.compile(r"[#>=+|-]|`{3}|~{3}")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
# All HTML but the badges of trackers, which TRL writes.
_HTML = re.compile(r'<(?!img src="https://[^"<>\s]*"(?: (?:alt|width|height)="[^"<>]*")* ?/?>)')
_TARGET = re.compile(r"\](?=\((?!https?://|#)[^)]*(?::|&|$)|\s*:|\[)")


def visible(text: str) -> str:
    r"""Return a text without what is not seen: controls, marks that turn the direction of writing, halves of letters.

    Example:
        >>> from hf_stateless.reports.card.markdown import visible
        >>> visible("a\u202eb\x1b[31m")
        'ab[31m'
    """
    lines = re.split(r"\r\n|[\r\n\v\f\x85\u2028\u2029]", text)
    return "\n".join("".join(c for c in line.expandtabs(4) if unicodedata.category(c)[0] != "C") for line in lines)


def one_line(value: Any) -> str:
    """Return a value as one line of what is seen."""
    return " ".join(visible(str(value)).split())


def plain(value: Any) -> str:
    r"""Return a value as it stands in a line or a table of Markdown: no emphasis, link, code or HTML begins in it.

    Example:
        >>> from hf_stateless.reports.card.markdown import plain
        >>> print(plain("a <b>\n|`c`"))
        a &lt;b&gt; \|\`c\`
    """
    return _SPECIAL.sub(r"\\\1", one_line(value)).replace("<", "&lt;").replace(">", "&gt;")


def code(value: Any) -> str:
    """Return a name as code, or as plain text if anything in it could end the code."""
    text = one_line(value)
    return f"`{text}`" if _HARMLESS.fullmatch(text) else plain(text)


def link(name: str) -> str:
    """Return the link to a model on the Hub; what can be no id there is no link."""
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else code(name)


def sentences(text: str) -> str:
    """Return what somebody says, with code and links in it but no HTML, headings, fences or other blocks."""
    lines = [_no_html(line.strip()) for line in visible(_COMMENT.sub("", text)).split("\n")]
    return "\n".join(f"\\{line}" if _BLOCK.match(line) else line for line in lines)


def section(text: str) -> str:
    """Return a section of another card: all of Markdown, but no HTML, and no fence that stays open."""
    kept, fence = [], ""
    for line in visible(_COMMENT.sub("", text)).split("\n"):
        found = _FENCE.fullmatch(line)
        if fence:
            kept.append(line)
            if found and found[1].startswith(fence) and not found[2].strip():
                fence = ""
        elif found and not (found[1][0] == "`" and "`" in found[2]):
            fence = found[1]
            kept.append(line)
        else:
            kept.append(_no_html(line))
    return "\n".join([*kept, fence] if fence else kept).strip()


def _no_html(line: str) -> str:
    return _TARGET.sub(r"\\]", _HTML.sub("&lt;", line))


def metadata_values(value: Any) -> Any:
    """Return the values of a YAML block with nothing but plain words in them."""
    if isinstance(value, dict):
        return {one_line(key): metadata_values(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [metadata_values(inner) for inner in value]
    return re.sub(r"[<>`]", "", one_line(value)) if isinstance(value, str) else value

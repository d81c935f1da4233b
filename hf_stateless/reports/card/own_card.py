"""What the card that a trainer has written itself says beyond ours: method, citations, and other sections."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .facts import CardFacts


_EMPTY = re.compile(r"more information needed", re.IGNORECASE)
_HEADING = re.compile(r"#{1,6} (.*)")
# What our card says itself, or what says nothing.
_NOT_TAKEN = {
    *("Quick start", "Memory report", "Evaluation", "Hyperparameters", "Results", "Versions"),
    *("Training hyperparameters", "Training results", "Framework versions", "Citation of the optimizer"),
}


def take_sections(facts: CardFacts, text: str) -> None:
    r"""Add to the facts of a card what the trainer's own card says.

    Args:
        facts: to add to.
        text: Markdown of the trainer's card.

    Example:
        >>> from hf_stateless.reports.card.facts import CardFacts
        >>> from hf_stateless.reports.card.own_card import take_sections
        >>> facts = CardFacts(name="my-model", model="LlamaForCausalLM", parameters=100, optimizer="sinkgd")
        >>> take_sections(facts, "# my-model\n## Limits\nIt cannot count.\n## Uses\nMore information needed")
        >>> facts.kept
        {'Limits': 'It cannot count.'}
    """
    for heading, body in _sections(text):
        if heading == "Training procedure":
            facts.notes = body
        elif heading == "Citations":
            facts.citations = body
        elif heading not in _NOT_TAKEN:
            facts.kept[heading] = body


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield heading and body of every section that says something; what stands before the second heading is left out.

    A body that asks for more information, or holds nothing but comments, says nothing.
    """
    found: list[tuple[str, list[str]]] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else _HEADING.fullmatch(line.rstrip())
        if heading:
            found.append((heading.group(1).strip(), []))
        elif found:
            found[-1][1].append(line)
    for name, lines in found[1:]:
        body = "\n".join(lines).strip()
        if re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL).strip() and not _EMPTY.search(body):
            yield name, re.sub(r"\n\s*\n", "\n\n", body)

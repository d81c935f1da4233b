"""The files of a card in the output folder of a run: facts, curves, and the card that is rendered from them."""

from __future__ import annotations

import logging
from pathlib import Path

from ..files import write_text
from .curves import CURVES_FILE, draw_curves
from .facts import CARD_FILE, CardFacts
from .render import render_folder


logger = logging.getLogger(__name__)


def write_card(facts: CardFacts, folder: Path) -> None:
    """Write the facts of a card, its curves and the card itself into the output folder of a run."""
    facts.save(folder)
    drawn = False
    try:
        drawn = draw_curves(facts, folder / CURVES_FILE)
    except (ImportError, OSError, ValueError) as error:  # the card is worth more than its picture
        logger.info("No picture of the curves: %s", error)
    if not drawn:
        (folder / CURVES_FILE).unlink(missing_ok=True)
    write_text(folder / CARD_FILE, render_folder(folder))

"""Folders with tiny models for each trainer of TRL, and a quiet run."""

import contextlib

import pytest
from tiny_models import CHATS, PREFERENCES, PROMPTS, save_chat_model


SAMPLING = {"num_generations": 2, "max_completion_length": 6}
TRAINERS = {
    "SFT": (CHATS, {"max_length": 32}),
    "DPO": (PREFERENCES, {"max_length": 32}),
    "GRPO": (PROMPTS, SAMPLING),
    "RLOO": (PROMPTS, SAMPLING),
    "Reward": (PREFERENCES, {"max_length": 32}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where each trainer finds its model."""
    chat = save_chat_model(tmp_path_factory.mktemp("chat"))
    score = save_chat_model(tmp_path_factory.mktemp("score"), score=True)
    return {kind: score if kind == "Reward" else chat for kind in TRAINERS}


def train(trainer, resume=None):
    with contextlib.redirect_stdout(None):
        trainer.train(resume_from_checkpoint=resume)
    return trainer

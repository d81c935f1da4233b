"""Let a trainer write our model card in place of its own, and save a trained model with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from ..command_line import first_line
from ..patches import CardWriter
from .beside import read_beside
from .during_training import attach_push
from .facts import CARD_FILE
from .folder import write_card
from .hub_client import limit_waits
from .pushing import Token, begin_push
from .sources import collect


if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


def attach_model_card(
    trainer: Trainer,
    *,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    data: str | None = None,
    remarks: Sequence[str] | None = None,
    limits: Sequence[str] | None = None,
    beside: Sequence[str | Path] | None = None,
) -> None:
    """Let the trainer write our model card wherever it writes its own, and push that one.

    It wraps `trainer.create_model_card`, which transformers and TRL call at checkpoints and before they push. The
    trainer's own card is written first; its tags, metadata, citations and links are taken over. What is passed to
    `create_model_card` or `push_to_hub` wins over what is given here, and that over what is found out. Calling this
    again only adds what is given. A `hub_token` among the arguments still works, but no file of the run holds it.

    Args:
        trainer: a `Trainer` of transformers or TRL.
        base_model: id on the Hub of the model that is trained further, empty for random weights; default: the name
            it was loaded by.
        license: default: that of the base model's card.
        datasets: ids on the Hub of the data sets.
        data: a sentence about the data.
        remarks: more sentences, like where the weights come from.
        limits: sentences about what the run does not show.
        beside: output folders of finished runs with other optimizers, which the card compares with.

    Raises:
        ValueError: a folder in `beside` has no card and memory report.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import hf_stateless
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=2, vocab_size=32)
        >>> args = TrainingArguments(tempfile.mkdtemp(), optim="sinkgd", use_cpu=True, report_to=[])
        >>> trainer = Trainer(LlamaForCausalLM(config), args)
        >>> hf_stateless.attach_model_card(trainer, limits=["One seed."])
        >>> trainer.create_model_card()
        >>> "One seed." in Path(args.output_dir, "README.md").read_text()
        True
    """
    others = None if beside is None else [read_beside(folder) for folder in beside]
    if trainer.args.hub_token:  # the Trainer pickles its arguments into `training_args.bin` and pushes that
        trainer.args.hub_token = Token(trainer.args.hub_token)
    if trainer.args.push_to_hub:  # before it trains, so that the Trainer's own pushes do not hang either
        limit_waits()
        attach_push(trainer)
    writer = trainer.create_model_card
    if not isinstance(writer, CardWriter):
        writer = trainer.create_model_card = CardWriter(trainer, _write_over_own_card)
    given: dict[str, Any] = {"base_model": base_model, "license": license, "datasets": datasets, "data": data}
    given.update(remarks=remarks, limits=limits, beside=others)
    writer.given.update({name: value for name, value in given.items() if value is not None})


# What `create_model_card` of transformers and of TRL call what is said here.
_ARGUMENTS = {
    **{"model_name": "model_name", "finetuned_from": "base_model", "license": "license", "tasks": "tasks"},
    **{"dataset_tags": "datasets", "dataset_name": "datasets", "dataset_args": "dataset_args"},
}


def _write_over_own_card(trainer: Trainer, given: dict[str, Any], said: Mapping[str, Any]) -> None:
    folder = Path(trainer.args.output_dir)
    known = {**given, **{ours: said[name] for name, ours in _ARGUMENTS.items() if said.get(name) is not None}}
    names = said.get("dataset") or said.get("dataset_name") or said.get("dataset_tags")
    known.update({"dataset_names": names} if names else {})
    try:
        _write_card(trainer, folder, known)
    except Exception as error:  # a card is not worth a run
        if not trainer.is_in_train:
            raise
        logger.warning("Training goes on without a new model card: %s", first_line(error))


def _write_card(trainer: Trainer, folder: Path, known: Mapping[str, Any]) -> None:
    file = folder / CARD_FILE
    own_card = ModelCard.load(file, ignore_metadata_errors=True) if file.is_file() else ModelCard("")
    write_card(collect(trainer, own_card, known), folder)


def save(trainer: Trainer) -> None:
    """Save a trained model, its state and its card, without pushing. All processes have to call it."""
    args = trainer.args
    attach_model_card(trainer)
    asked, args.push_to_hub = args.push_to_hub, False  # otherwise `save_model` pushes, with a single attempt
    try:
        trainer.save_model()
        trainer.save_state()
    finally:
        args.push_to_hub = asked
    if asked:
        begin_push(trainer)
    # After the weights, because saving an adapter writes a card of PEFT's.
    trainer.create_model_card(tags=list(getattr(trainer.model, "model_tags", None) or []))

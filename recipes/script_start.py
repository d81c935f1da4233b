"""What every recipe script does before it trains: read its recipe, find its checkpoint, take the CPU's cores."""

import difflib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import yaml
from pretraining_text import InputError
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_stateless.reports.card.during_training import attach_push
from hf_stateless.reports.card.pushing import create_repository
from hf_stateless.trainer.optim_args import optimizer_names


@dataclass
class PushArguments:
    """What `--push_to_hub` sends beside the model, or keeps here."""

    push_without: str | None = field(
        default=None, metadata={"help": "Names that stay here, such as optimizer.pt,*.pth, whatever --hub_strategy."}
    )
    push_dashboard: bool = field(
        default=False, metadata={"help": "Push the curves of the run too: dashboard.html, linked from the card."}
    )


def prepare_push(trainer: Trainer, wishes: PushArguments) -> None:
    """Make the repository and say what goes to it, if the run is to be pushed."""
    if trainer.args.push_to_hub:
        names = [name.strip() for name in (wishes.push_without or "").split(",")]
        attach_push(trainer, without=[name for name in names if name], dashboard=wishes.push_dashboard)
    create_repository(trainer)


def read_recipe(file: str, known: list[str]) -> dict[str, object]:
    """Return the values of a YAML recipe; refuse a name that is not known."""
    if not os.path.isfile(file):
        raise InputError(f"File not found: --config {file}")
    values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no YAML mapping of NAME: VALUE.")
    for name in values.keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1)
        raise InputError(f"Unknown key {name!r} in {file}." + (f" Did you mean {near[0]!r}?" if near else ""))
    return values


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end: the Trainer writes the state of the run last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(folder: str) -> str | None:
    """Return the newest whole checkpoint of a folder, and say which newer ones a killed run left unfinished."""
    numbered = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in Path(folder).glob("*")]
    steps = {int(match[1]): path for match, path in numbered if match and path.is_dir()}
    for step in sorted(steps, reverse=True):
        if is_whole(steps[step]):
            return str(steps[step])
        print(f"{steps[step]} is left out: the run ended before it was whole.")
    return None


def find_checkpoint(args: TrainingArguments) -> str | None:
    """Return the checkpoint to resume from; refuse to mix a new run with the checkpoints of an old one."""
    latest = last_checkpoint(args.output_dir)
    wanted = str(args.resume_from_checkpoint or False)
    if wanted.lower() == "false" and latest:
        raise InputError(
            f"{args.output_dir} holds checkpoints of an earlier run: continue it with --resume_from_checkpoint true, "
            "or choose another --output_dir."
        )
    found = {"true": latest, "false": None}.get(wanted.lower(), wanted)
    if wanted.lower() != "false" and not (found and os.path.isdir(found)):
        raise InputError(f"No checkpoint at {found or args.output_dir}: give its folder, or true for the latest one.")
    return found


def use_all_cores(args: TrainingArguments, cpu_threads: int | None) -> None:
    """Give a single process on the CPU all cores, or as many threads as asked for."""
    if args.device.type == "cpu" and args.world_size == 1:
        # accelerate launch sets OMP_NUM_THREADS=1, which would leave all cores but one idle.
        torch.set_num_threads(cpu_threads or psutil.cpu_count(logical=False) or 1)


def refuse_other_optimizers(args: TrainingArguments) -> None:
    """Refuse to train 8-bit weights with an optimizer that does not know them."""
    if args.optim.value not in optimizer_names():
        raise InputError(
            f"Got load_in_8bit_training with optim={args.optim.value}: 8-bit weights are trained by "
            f"{', '.join(optimizer_names())}."
        )

"""Who gets which update, as text: a short table for the log, and one of every weight for `hf-stateless explain`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from ..norms.chain import Chain
from ..update.layout import layout_at
from ..update.rate import rate_scale
from ..weights.int8.convert import without_scales
from ..weights.stored import StoredWeight
from .optim_args import plain_name


logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")
# What PEFT puts in front of every name, and says nothing.
_PEFT_FRONT = re.compile(r"^base_model\.model\.")
# Longer names in the short table lose their front: the end says what it is.
_EXAMPLE_WIDTH = 48


@dataclass(frozen=True)
class Alike:
    """Parameters that differ only in the numbers of their layers."""

    pattern: str
    """Their name, with `*` for each number in it."""
    role: str
    """One of `hf_stateless.trainer.partition.ROLES`."""
    method: str
    """What updates them: a name of `optim=` for the chain of that name, else the rule."""
    layout: str
    """How they are stored, as `hf_stateless.trainer.partition.PartitionedParameter` says; empty for AdamW."""
    shape: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def numel(self) -> int:
        """Number of entries, of all of them together."""
        return torch.Size(self.shape).numel() * len(self.names)


def alike(groups: Iterable[Mapping[str, Any]], optim: str) -> list[Alike]:
    """Return the parameters of groups, those together that differ only in numbers, in the order of the groups.

    Args:
        groups: from `hf_stateless.trainer.factory.parameter_groups`.
        optim: the name that they were made for.
    """
    found: dict[tuple[str, str, str, str, tuple[int, ...]], list[str]] = {}
    for group in groups:
        role, method = group["role"], _method(group, optim)
        for i, (name, p) in enumerate(zip(group["param_names"], group["params"], strict=True)):
            layout = layout_at(group, i).name if "layout" in group else ""
            found.setdefault((_NUMBER.sub("*", name), role, method, layout, tuple(p.shape)), []).append(name)
    return [Alike(*key, tuple(names)) for key, names in found.items()]


def _method(group: Mapping[str, Any], optim: str) -> str:
    if group["algorithm"] == "lora_product":
        return f"{plain_name(optim)} (B A)"
    if group["algorithm"] != "multinorm":
        return str(group["algorithm"])
    return "frobenius" if group["layout"] == "vector" else plain_name(optim)


def describe(groups: Sequence[Mapping[str, Any]], optim: str, model: nn.Module | None = None) -> str:
    """Return the short table of who went where: a line for each method and role, with two examples of its largest.

    Args:
        groups: from `hf_stateless.trainer.factory.parameter_groups`.
        optim: the name that they were made for.
        model: to say what is frozen too.

    Example:
        >>> import torch
        >>> from hf_stateless.trainer.table import describe
        >>> weights = {"role": "matrix", "algorithm": "multinorm", "layout": "out_in", "params": [torch.zeros(3, 4)]}
        >>> print(describe([{**weights, "param_names": ["layers.0.up_proj.weight"]}], "sinkgd"))
        optim=sinkgd updates (all names: hf-stateless explain MODEL; other matrices: optim_target_modules):
        method  role    tensors  parameters    share  such as
        sinkgd  matrix        1          12  100.0 %  layers.0.up_proj.weight
    """
    kinds: dict[tuple[str, str], list[Alike]] = {}
    for row in alike(groups, optim):
        kinds.setdefault((row.method, row.role), []).append(row)
    total = max(1, sum(row.numel for rows in kinds.values() for row in rows))
    cells = [("method", "role", "tensors", "parameters", "share", "such as")]
    for (method, role), rows in kinds.items():
        tensors, numel = sum(len(row.names) for row in rows), sum(row.numel for row in rows)
        largest = sorted(rows, key=lambda row: -row.numel)[:2]
        examples = ", ".join(_shortened(_label(row)) for row in largest)
        cells.append((method, role, str(tensors), f"{numel:,}", f"{100 * numel / total:.1f} %", examples))
    head = f"optim={optim} updates (all names: hf-stateless explain MODEL; other matrices: optim_target_modules):"
    frozen = _frozen(model) if model is not None else 0
    tail = [*_whitening(groups), *_rates(groups), *([f"frozen: {frozen} tensors"] if frozen else [])]
    return "\n".join([head, *aligned(cells, text=(0, 1, -1)), *tail])


def _whitening(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the line that says how matrices are whitened; none where nothing is."""
    group = next((group for group in groups if group["role"] == "matrix" and "whitening" in group), {})
    chain = Chain.of(group)
    steps = {None: "", 1: ", one step"}.get(chain.ns_steps, f", {chain.ns_steps} steps")
    return [f"whitening: {chain.whitening}{steps}"] if chain.whitens else []


def _rates(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the line of the multiples of the learning rate; none where there are none."""
    scales = {group["role"]: scale for group in groups if (scale := rate_scale(group)) != 1}
    told = ", ".join(f"{role} {scale:g}x" for role, scale in scales.items())
    return [f"learning rates: {told}"] if told else []


def explain(groups: Sequence[Mapping[str, Any]], optim: str) -> str:
    """Return the whole table: a line for each weight, or for all that differ only in the numbers of their layers.

    Args:
        groups: from `hf_stateless.trainer.factory.parameter_groups`.
        optim: the name that they were made for.

    Example:
        >>> import torch
        >>> from hf_stateless.trainer.table import explain
        >>> group = {"role": "matrix", "algorithm": "multinorm", "layout": "out_in"}
        >>> names = [f"layers.{i}.up_proj.weight" for i in range(12)]
        >>> print(explain([{**group, "params": [torch.zeros(3, 4)] * 12, "param_names": names}], "sinkgd"))
        role    method  layout  shape  parameters  name
        matrix  sinkgd  out_in  3 x 4         144  layers.*.up_proj.weight x 12
    """
    rows = alike(groups, optim)
    several = [row.pattern for row in rows]
    cells = [("role", "method", "layout", "shape", "parameters", "name")]
    for row in rows:
        label = _label(row) if several.count(row.pattern) == 1 else _numbered(row)
        label += f" x {len(row.names)}" if len(row.names) > 1 else ""
        shape = " x ".join(map(str, row.shape)) or "1"
        cells.append((row.role, row.method, row.layout or "-", shape, f"{row.numel:,}", label))
    return "\n".join(aligned(cells, text=(0, 1, 2, 3, -1)))


def _label(row: Alike) -> str:
    return row.pattern if len(row.names) > 1 else row.names[0]


def _shortened(name: str) -> str:
    name = _PEFT_FRONT.sub("", name)
    return name if len(name) <= _EXAMPLE_WIDTH else "..." + name[3 - _EXAMPLE_WIDTH :]


def _numbered(row: Alike) -> str:
    """Return the pattern with the numbers that are meant, where others of the same pattern are updated otherwise."""
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in row.names), strict=True)
    numbers = [_ranges(sorted(set(column))) for column in columns]
    return _NUMBER.sub(lambda _: numbers.pop(0), row.names[0])


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers as `3`, or as `{0-2,5}`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def _frozen(model: nn.Module) -> int:
    """Count what is not trained; the scales of a trained 8-bit weight belong to it."""
    parts = {id(part) for p in model.parameters() if isinstance(p, StoredWeight) for part in p.stored[1:]}
    return sum(not p.requires_grad and id(p) not in parts for p in without_scales(model))


def aligned(rows: Sequence[Sequence[str]], text: Sequence[int]) -> list[str]:
    """Return rows of cells as lines of text with equal columns; those whose numbers are in `text` to the left."""
    left = {index % len(rows[0]) for index in text}
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(c.ljust(width) if i in left else c.rjust(width) for i, (c, width) in cells).rstrip())
    return lines


def announce(table: str, *, printed: bool) -> None:
    """Log a table on the main process, or print it where nobody would see that.

    Args:
        table: from `describe`.
        printed: whether it may be printed, see `trainer_prints`.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(table)
    elif printed:
        print(table, flush=True)


def trainer_prints(args: Any = None) -> bool:
    """Tell whether a Trainer lets tables be printed: yes, unless it was asked for warnings or errors only.

    Scripts leave all loggers at WARNING, that of transformers included, and a table is no warning. What every Trainer
    shows is its losses, which it prints, with and without progress bars. So is the table.

    Args:
        args: the training arguments; without them the level counts that the Trainer has set.
    """
    known = hasattr(args, "get_process_log_level")
    level = args.get_process_log_level() if known else transformers_logging.get_verbosity()
    # Left as it is, `log_level` is "passive" and stands for a level of WARNING too.
    return bool(level <= logging.WARNING) and getattr(args, "log_level", None) != "warning"

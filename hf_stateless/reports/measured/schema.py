"""`memory_report.json`: what a run took, as plain values that a card, a picture and a comparison are made from.

All sizes are integers in bytes, GiB only where somebody reads them. Each block says how its numbers came about:
`measured` by the allocator or the operating system, `counted` from the tensors, a `residual`, or `predicted`.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ...optimizer.option_kinds import shown
from ..files import read_json, write_json


SCHEMA_VERSION = 1
"""Grows when a key changes its meaning or goes away; new keys may come without it."""
REPORT_FILE = "memory_report.json"
PICTURE_FILE = "memory.png"

ASSUMPTIONS = (
    "Predicted: the same run with AdamW, of which only the optimizer's state, the gradients that it has to keep and "
    "the temporaries of its step differ; the moments have the dtype of the weights, as torch allocates them."
)
"""What stands behind every number under `predicted`."""


@dataclass
class Setup:
    """What was run, and on what."""

    device: str
    device_capacity: int | None
    """Memory of one GPU; None on CPU."""
    world_size: int
    strategy: str
    """`single`, `DDP` or `FSDP2`, otherwise what accelerate calls it."""
    model: str
    """Name of the class."""
    base_model: str | None
    """Id on the Hub of the model that was trained further; None for a local folder."""
    parameters: int
    trainable_parameters: int
    dtypes: dict[str, int]
    """Number of weights of each dtype."""
    optimizer: str
    optimizer_options: dict[str, str]
    learning_rate: float
    per_device_batch_size: int
    gradient_accumulation_steps: int
    sequence_length: int
    """Longest row seen, in tokens; 0 for a model that reads something else."""
    gradient_checkpointing: bool
    peft: dict[str, Any] | None
    """`type`, and `r` where there is one."""
    quantization: str | None


@dataclass
class Range:
    """The highest and the lowest of all ranks."""

    max: int
    min: int


@dataclass
class Moments:
    """Peaks of the two halves of a step, of the rank with the highest peak."""

    forward_backward: int
    optimizer_step: int


@dataclass
class Measured:
    """What the operating system (CPU) or the allocator (CUDA) says; evaluation and saving are left out."""

    kind: str
    """`resident set` or `CUDA allocator`."""
    peak_since: str
    """`first step`, or `process start` where the operating system cannot reset the peak."""
    steps: int
    """Optimizer steps that were measured, those before a resume included if their report was found."""
    from_step: int
    """Step at which measuring began: above 0 if the first part of a resumed run was not measured."""
    start: int
    """Held before the first step."""
    peak: Range
    moments: Moments
    reserved: Range | None
    """What the CUDA allocator has taken from the device, used or not."""
    retries: int | None
    """How often it had to give memory back to find room, all ranks together."""
    ooms: int | None


@dataclass
class Counted:
    """Bytes of tensors on the rank with the highest peak, each storage once."""

    weights: int
    """Parameters and buffers; tied weights once, quantised ones with their scales."""
    gradients: int
    """The most that was alive at once: all of them, or a few where the update runs in backward."""
    optimizer_state: int


@dataclass
class Residual:
    """The measured peak less what was counted."""

    activations_and_temporaries: int
    before_training: int
    """Held before the first step and no part of the model: on CPU Python, libraries, data; on a GPU other models."""


@dataclass
class Group:
    """The parameters that one algorithm updates in one role."""

    role: str
    algorithm: str
    tensors: int
    parameters: int
    state_bytes: int


@dataclass
class Prediction:
    """The same run with another optimizer, see `ASSUMPTIONS`."""

    gradients: int
    optimizer_state: int
    peak: int


@dataclass
class Cost:
    """Time on the main process; rates leave out the first step, which sets things up, where there are others."""

    tokens: int | None
    """Tokens of the training batches on all ranks, without padding; None for a model that reads something else."""
    tokens_per_second: float | None
    seconds_per_step: float
    optimizer_share: float | None
    """Part of the time of a step that the optimizer's `step()` takes, 0 to 1; None where updates run in backward."""
    seconds: float
    """Training without evaluation and saving."""


@dataclass
class Provenance:
    """How to get the numbers again."""

    versions: dict[str, str]
    command: str
    """Folders shortened, secrets left out."""
    date: str


@dataclass
class MemoryReport:
    """Memory of one training run, `memory_report.json` in its output folder.

    Example:
        >>> from hf_stateless.reports.measured.schema import MemoryReport
        >>> MemoryReport.from_dict({"schema_version": 1})
        Traceback (most recent call last):
        ...
        ValueError: memory report: 'setup' is missing
    """

    setup: Setup
    measured: Measured
    counted: Counted
    residual: Residual
    groups: list[Group]
    predicted: dict[str, Prediction]
    """By the name of the optimizer: `adamw_torch_fused`, `adamw_bnb_8bit`; older reports have `adamw_torch`."""
    cost: Cost
    provenance: Provenance
    complete: bool = True
    """False as long as training goes on."""
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the version first."""
        values = asdict(self)
        return {"schema_version": values.pop("schema_version"), **values}

    @classmethod
    def from_dict(cls, values: Any) -> MemoryReport:
        """Check plain values, as `to_dict` returns them, against the schema; keys that it does not know are ignored.

        Raises:
            ValueError: another version of the schema, or a value that is missing or of the wrong type.
        """
        version = values.get("schema_version") if isinstance(values, Mapping) else None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"memory report: schema_version is {shown(version)}, expected {SCHEMA_VERSION}: "
                "type pip install -U hf_stateless, or train again with this version"
            )
        report: MemoryReport = _read(cls, values, "")
        return report

    def save(self, folder: str | Path) -> Path:
        """Write `memory_report.json` into a folder, to a temporary file that then replaces it; return its path."""
        path = Path(folder) / REPORT_FILE
        write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, path: str | Path) -> MemoryReport:
        """Read the report of a run from its output folder, or from the file itself.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no JSON, or not of this schema.
        """
        file = Path(path) / REPORT_FILE if Path(path).is_dir() else Path(path)
        try:
            return cls.from_dict(read_json(file))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{file}: no JSON ({error}); delete it or train again") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None


def _read(kind: Any, value: Any, where: str) -> Any:
    """Return a value as its type says, or say where it does not fit."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"memory report: {where.strip('.')!r} is {shown(value)}, expected an object")
        hints = get_type_hints(kind)
        needed = [f.name for f in fields(kind) if f.default is MISSING]
        if missing := [name for name in needed if name not in value]:
            raise ValueError(f"memory report: {where + missing[0]!r} is missing")
        known = {name: _read(hints[name], value[name], f"{where}{name}.") for name in hints if name in value}
        return kind(**known)  # type: ignore[operator]
    if origin in (Union, types.UnionType):
        return None if value is None else _read(arguments[0], value, where)
    if origin is list and isinstance(value, list):
        return [_read(arguments[0], entry, f"{where}{number}.") for number, entry in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _read(arguments[1], entry, f"{where}{key}.") for key, entry in value.items()}
    expected = (int, float) if kind is float else origin or kind
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(
            f"memory report: {where.strip('.')!r} is {shown(value)}, expected {(origin or kind).__name__}"
        )
    if isinstance(value, int | float) and not -(2**63) < value < 2**63:  # NaN is not between them either
        raise ValueError(f"memory report: {where.strip('.')!r} is {shown(value)}, expected a number below 2**63")
    return value

"""What a model card says about a run, as plain values that are kept beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...norms.presets import PRESETS, MultiNormPreset
from ...trainer.optim_args import optimizer_names, plain_name
from ..files import read_json, write_json


SCHEMA_VERSION = 1
CARD_FILE, DATA_FILE = "README.md", "card_data.json"


@dataclass
class CardFacts:
    """All that a card says except the memory report; `card_data.json` beside the card."""

    name: str
    model: str
    """Name of the class."""
    parameters: int
    optimizer: str
    """The value of `optim`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The YAML block."""
    base_model: str | None = None
    """Id on the Hub, or the last name of a local folder."""
    base_is_local: bool = False
    origin: str | None = None
    """Id on the Hub of the model that a local base was made of, by its card."""
    adapter: str | None = None
    """Kind of adapter, like LoRA; None where the model itself was trained."""
    task: str | None = None
    """Words for the kind of training."""
    repository: str | None = None
    """Id on the Hub, once there is one."""
    chat: bool = False
    """The tokenizer has a chat template."""
    tokenizer: bool = True
    """A tokenizer is saved with the model."""
    needs_import: bool = False
    """Loading it needs `import hf_stateless`: weights in 8 bits that transformers cannot read alone."""
    in_8_bits: bool = False
    """Linear layers are stored in 8 bits, in the layout of `compressed-tensors`."""
    served: bool = False
    """vLLM has kernels for how they are stored."""
    data: str | None = None
    remarks: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    """Sentences about what the run does not show."""
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the log, thinned out."""
    beside: list[dict[str, Any]] = field(default_factory=list)
    """Runs of other optimizers, see `beside.py`."""
    versions: dict[str, str] = field(default_factory=dict)
    notes: str = ""
    """What the trainer's own card says about the procedure: method, paper, links to trackers."""
    citations: str = ""
    """What the trainer's own card asks to cite."""
    kept: dict[str, str] = field(default_factory=dict)
    """Other sections of the trainer's own card."""

    @property
    def preset(self) -> MultiNormPreset | None:
        """What the optimizer is in this package; None for one of another package."""
        return PRESETS.get(plain_name(self.optimizer))

    @property
    def title(self) -> str:
        """The optimizer's name as a reader knows it."""
        return self.preset.title if self.preset else self.optimizer

    @property
    def stateless(self) -> bool:
        """Whether it is an optimizer of this package."""
        return self.optimizer in optimizer_names()

    def save(self, folder: str | Path) -> None:
        """Write `card_data.json` to a temporary file, which then replaces it."""
        write_json(Path(folder) / DATA_FILE, {"schema_version": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def load(cls, folder: str | Path) -> CardFacts:
        """Read `card_data.json`.

        Raises:
            ValueError: another version of the schema.
        """
        values = read_json(Path(folder) / DATA_FILE)
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(f"{DATA_FILE}: schema_version is {version!r}, expected {SCHEMA_VERSION}")
        return cls(**values)

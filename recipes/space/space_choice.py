"""What a visitor of the page has chosen: read from a form or a link, and written as arguments and as a link."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import urlencode

from hf_stateless.reports.command_line import one_line
from hf_stateless.reports.predicted.table import GPUS


METHODS: dict[str, str] = {
    "adamw_torch_fused": "AdamW",
    "adamw_bnb_8bit": "8-bit AdamW",
    "galore_adamw": "GaLore",
    "swan": "SWAN",
    "sinkgd": "SinkGD",
    "sinkgd_polar": "SinkGD, polar",
}
"""Names of `optim=` that are compared, and what they are called. APOLLO is not predicted yet."""
OURS = ("swan", "sinkgd", "sinkgd_polar")
DTYPES = ("bf16", "fp32", "int8")
UPLOADED = "uploaded config.json"
"""Stands for a model whose config was uploaded: no link restores it."""
_MOST = {"batch": 65536, "seq": 1 << 20, "lora": 4096, "gpus": 1024}


def _integer(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or len(text) > 9 or not least <= int(text) <= most:
            raise ValueError(f"a whole number from {least} to {most:,}")
        return int(text)

    return parse


def _one_of(known: Any) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise ValueError(f"one of {', '.join(known)}")
        return text

    return parse


def _flag(text: str) -> bool:
    if text.lower() not in ("0", "1", "true", "false"):
        raise ValueError("1 or 0")
    return text.lower() in ("1", "true")


def _card(text: str) -> float:
    sizes = {f"{gib:g}": float(gib) for gib in GPUS}
    if text.removesuffix(".0") not in sizes:
        raise ValueError(f"one of {', '.join(sizes)} (GiB)")
    return sizes[text.removesuffix(".0")]


def _model(text: str) -> str:
    if not text or len(text) > 200 or not text.isprintable():
        raise ValueError("the id of a model on the Hub, such as Qwen/Qwen2.5-0.5B")
    return text


_PARSERS: dict[str, Callable[[str], Any]] = {
    "model": _model,
    "gpu": _card,
    "batch": _integer(1, _MOST["batch"]),
    "seq": _integer(1, _MOST["seq"]),
    "method": _one_of(METHODS),
    "dtype": _one_of(DTYPES),
    "layerwise": _flag,
    "checkpointing": _flag,
    "lora": _integer(0, _MOST["lora"]),
    "gpus": _integer(1, _MOST["gpus"]),
}


@dataclass(frozen=True)
class Choice:
    """A model, a card and a run.

    Example:
        >>> from space_choice import Choice
        >>> Choice.read({"gpu": "80", "seq": "4096"}).query()
        'model=meta-llama%2FLlama-3.1-8B&gpu=80&batch=1&seq=4096&method=swan&dtype=bf16&layerwise=1&checkpointing=1&lora=0&gpus=1'
    """

    model: str = "meta-llama/Llama-3.1-8B"
    gpu: float = 24.0
    """Memory of one card in GiB."""
    batch: int = 1
    """Sequences per card."""
    seq: int = 2048
    """Tokens per sequence."""
    method: str = "swan"
    dtype: str = "bf16"
    layerwise: bool = True
    checkpointing: bool = True
    lora: int = 0
    """Rank of adapters; 0 trains every weight."""
    gpus: int = 1
    """Cards over which FSDP2 shards."""

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Choice:
        """Check texts of a link, or values of a form; what is not named keeps its default.

        Raises:
            ValueError: in one line, what was got and what was expected.
        """
        found = {}
        for field in fields(cls):
            if field.name in values:
                text = "" if values[field.name] is None else str(values[field.name]).strip()
                try:
                    found[field.name] = _PARSERS[field.name](text)
                except ValueError as error:
                    raise ValueError(f"{field.name}={one_line(text, 60) or 'nothing'}: expected {error}.") from None
        return cls(**found)

    def query(self) -> str:
        """Return the part of a link after the question mark, that restores this choice."""
        values = {**asdict(self), "gpu": f"{self.gpu:g}"}
        if self.model == UPLOADED:
            del values["model"]
        return urlencode({key: int(value) if isinstance(value, bool) else value for key, value in values.items()})

    def optimizers(self) -> list[str]:
        """Return what `--optim` compares: with 8-bit weights only what can train them."""
        return [name for name in METHODS if name in OURS or self.dtype != "int8"]

    def optim(self) -> str:
        """Return the name of the chosen method, as `optim=` takes it."""
        return f"{self.method}_layerwise" if self.layerwise and self.method in OURS else self.method

    def arguments(self, optimizers: list[str] | None = None) -> list[str]:
        """Return the arguments of `hf-stateless memory`, but for the model.

        Raises:
            ValueError: the method cannot train 8-bit weights.
        """
        if self.method not in self.optimizers():
            raise ValueError(
                f"{METHODS[self.method]} cannot train 8-bit weights: pick bf16, or one of {', '.join(OURS)}."
            )
        flags = ["--optim", ",".join(optimizers or self.optimizers())]
        flags += ["--dtype", self.dtype, "--batch", str(self.batch), "--seq", str(self.seq)]
        flags += ["--layerwise"] if self.layerwise else []
        flags += ["--checkpointing"] if self.checkpointing else []
        flags += ["--lora", str(self.lora)] if self.lora else []
        return [*flags, *(["--fsdp", str(self.gpus)] if self.gpus > 1 else [])]

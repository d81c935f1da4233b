"""The model card: what is known about a run and its memory report, rendered as one page."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..files import GIB, write_text
from ..measured.schema import ASSUMPTIONS, PICTURE_FILE, REPORT_FILE, MemoryReport
from .facts import CARD_FILE, CardFacts
from .sources import collect


if TYPE_CHECKING:
    from transformers import Trainer


def attach_model_card(
    trainer: Trainer,
    *,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    data: str | None = None,
    remarks: Sequence[str] | None = None,
) -> None:
    """Let the trainer write our model card wherever it writes its own, and push that one.

    It wraps `trainer.create_model_card`, which transformers and TRL call at checkpoints and before they push. The
    trainer's own card is written first; its tags, metadata, citations and links are taken over. Calling this again
    only adds what is given. A `hub_token` among the arguments is moved to the variable `HF_TOKEN` of this process, so
    that no saved file holds it.

    Args:
        trainer: a `Trainer` of transformers or TRL.
        base_model: id on the Hub of the model that is trained further, empty for random weights; default: the name
            it was loaded by.
        license: default: that of the base model's card.
        datasets: ids on the Hub of the data sets.
        data: a sentence about the data.
        remarks: more sentences, like what was not compared.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> from hf_stateless.reports.card.card import attach_model_card
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=2, vocab_size=32)
        >>> args = TrainingArguments(tempfile.mkdtemp(), optim="sinkgd", use_cpu=True)
        >>> trainer = Trainer(LlamaForCausalLM(config), args)
        >>> attach_model_card(trainer, data="Trained on nothing.")
        >>> trainer.create_model_card()
    """
    if trainer.args.hub_token:
        # The Trainer pickles its arguments into training_args.bin, which it pushes.
        os.environ["HF_TOKEN"], trainer.args.hub_token = trainer.args.hub_token, None
    writer = trainer.create_model_card
    if not isinstance(writer, _CardWriter):
        writer = trainer.create_model_card = _CardWriter(trainer)
    given = {"base_model": base_model, "license": license, "datasets": datasets, "data": data, "remarks": remarks}
    writer.given.update({name: value for name, value in given.items() if value is not None})


class _CardWriter:
    """Stands in for the bound method `create_model_card` of one trainer."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.own_method = trainer, trainer.create_model_card
        self.given: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.own_method(*args, **kwargs)
        if not self.trainer.is_world_process_zero():
            return
        folder = Path(self.trainer.args.output_dir)
        own_card = ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True)
        collect(self.trainer, own_card, self.given).save(folder)
        write_text(folder / CARD_FILE, render_folder(folder))


def render_folder(folder: str | Path) -> str:
    """Return the card of an output folder from `card_data.json` and, where there is one, `memory_report.json`."""
    report = MemoryReport.load(folder) if (Path(folder) / REPORT_FILE).is_file() else None
    picture = PICTURE_FILE if (Path(folder) / PICTURE_FILE).is_file() else None
    return render(CardFacts.load(folder), report, picture)


def render(facts: CardFacts, report: MemoryReport | None = None, picture: str | None = None) -> str:
    """Return a model card: YAML block and Markdown.

    Args:
        facts: what is known about the run.
        report: its memory; None leaves the section out.
        picture: path of the picture of the report, relative to the card.

    Example:
        >>> from hf_stateless.reports.card.facts import CardFacts
        >>> from hf_stateless.reports.card.card import render
        >>> facts = CardFacts(name="my-model", model="LlamaForCausalLM", parameters=100, optimizer="sinkgd")
        >>> print(render(facts).splitlines()[0])
        # my-model
    """
    page = (
        _environment()
        .get_template("model_card.md.jinja")
        .render(
            facts=facts,
            metadata=yaml_dump(facts.metadata).strip() if facts.metadata else "",
            base=_link(facts),
            snippet=_snippet(facts),
            citation=facts.preset.citation if facts.preset else None,
            columns=list(dict.fromkeys(name for row in reversed(facts.results) for name in row)),
            section=_memory_section(report, picture) if report else None,
        )
    )
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters.update(gib=gib, number=number, cell=_cell)
    return environment


def gib(size: int | None) -> str:
    """Return bytes in GiB with three significant digits.

    Example:
        >>> from hf_stateless.reports.card.card import gib
        >>> gib(3 << 29), gib(123456), gib(0), gib(None)
        ('1.50', '0.000115', '0', '')
    """
    return "" if size is None else number(size / GIB, digits=3, smallest=0.0)


def number(value: float | None, digits: int = 4, smallest: float = 1e-5) -> str:
    """Return a number with so many significant digits and without an exponent, where that is readable.

    Example:
        >>> from hf_stateless.reports.card.card import number
        >>> number(4238.4), number(0.0512345), number(1.0), number(2e-9)
        ('4238', '0.05123', '1.000', '2e-09')
    """
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or abs(value) >= 1e9 or abs(value) < smallest:
        return f"{value:.{digits}g}"
    return f"{value:.{max(0, digits - 1 - floor(log10(abs(value))))}f}"


def _cell(value: Any) -> str:
    """Return a value as it stands in a table."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={entry}" for key, entry in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")


def _link(facts: CardFacts) -> str:
    local = facts.base_is_local or not facts.base_model
    return f"`{facts.base_model}`" if local else f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"


def _snippet(facts: CardFacts) -> str | None:
    """Return code that loads the model and runs it."""
    if facts.metadata.get("pipeline_tag") != "text-generation":
        return None
    name = facts.repository or facts.name
    prompt = '[{"role": "user", "content": "What is memory?"}]' if facts.chat else '"The "'
    first = ["import hf_stateless  # which knows how its weights are stored"] if facts.needs_import else []
    lines = [
        *first,
        "from transformers import pipeline",
        "",
        f'generate = pipeline("text-generation", model="{name}")',
    ]
    return "\n".join([*lines, f'print(generate({prompt}, max_new_tokens=64)[0]["generated_text"])'])


def _memory_section(report: MemoryReport, picture: str | None) -> dict[str, Any]:
    """Return the pieces of the memory report that are sentences or rows."""
    return {
        "report": report,
        "headline": _headline(report),
        "rows": _rows(report),
        "setup": _setup(report),
        "method": _method(report),
        "assumptions": ASSUMPTIONS,
        "picture": picture,
        "alternative_text": _alternative_text(report),
    }


def _headline(report: MemoryReport) -> str:
    state, peak, own = report.counted.optimizer_state, report.measured.peak.max, report.setup.optimizer
    text = f"The state of `{own}` took {gib(state)} GiB (counted), the run at its peak {gib(peak)} GiB (measured)."
    other = report.predicted.get("adamw_torch")
    if other and not own.startswith("adamw"):
        text += f" With `adamw_torch` the state would take {gib(other.optimizer_state)} GiB and the peak "
        text += f"{gib(other.peak)} GiB (predicted)."
    return text if report.complete else f"{text} Training was not finished when this was written."


def _rows(report: MemoryReport) -> list[dict[str, Any]]:
    """Return the table, one row for each part, with how its numbers came about."""
    counted, left, others = report.counted, report.residual, list(report.predicted.values())
    same, left_out = "; the same for the others", [None] * len(others)
    rows = [
        ("weights and buffers", [counted.weights] * (1 + len(others)), "counted" + same),
        ("gradients", [counted.gradients, *(o.gradients for o in others)], "counted; others predicted"),
        (
            "optimizer state",
            [counted.optimizer_state, *(o.optimizer_state for o in others)],
            "counted; others predicted",
        ),
        (
            "activations and temporaries",
            [left.activations_and_temporaries, *left_out],
            "residual: the rest of the peak",
        ),
        ("held before training", [left.before_training] * (1 + len(others)), "measured" + same),
        ("**peak**", [report.measured.peak.max, *(o.peak for o in others)], "measured; others predicted"),
    ]
    if report.measured.reserved:
        rows.append(("reserved on the device", [report.measured.reserved.max, *left_out], "measured"))
    return [{"name": name, "sizes": sizes, "how": how} for name, sizes, how in rows]


def _setup(report: MemoryReport) -> str:
    setup = report.setup
    capacity = f" with {gib(setup.device_capacity)} GiB" if setup.device_capacity else ""
    parts = [
        f"{setup.device}{capacity}",
        f"{setup.world_size} process" + ("es" if setup.world_size > 1 else "") + f" ({setup.strategy})",
        f"{setup.parameters:,} parameters, {setup.trainable_parameters:,} of them trained",
        " and ".join(dtype.removeprefix("torch.") for dtype in setup.dtypes),
        f"batch {setup.per_device_batch_size} x {setup.sequence_length} tokens per device"
        + (f", {setup.gradient_accumulation_steps} micro-batches" if setup.gradient_accumulation_steps > 1 else ""),
        "gradient checkpointing" if setup.gradient_checkpointing else "no gradient checkpointing",
    ]
    parts += [f"{setup.quantization} weights"] if setup.quantization else []
    cost = report.cost
    tokens = f"{cost.tokens_per_second:,.0f} tokens a second, " if cost.tokens_per_second else ""
    seconds = number(cost.seconds_per_step, digits=3)
    time = f"Measured: {tokens}{seconds} s a step, {cost.optimizer_share:.1%} of it in the optimizer."
    return f"Setup: {'; '.join(parts)}. {time}"


def _method(report: MemoryReport) -> str:
    measured = report.measured
    source = {
        "resident set": "the operating system's peak resident set of the process, Python and libraries included",
        "CUDA allocator": "the most that torch's CUDA allocator had handed out",
    }.get(measured.kind, measured.kind)
    ranks = f", of {report.setup.world_size} processes the one that took most" if report.setup.world_size > 1 else ""
    return (
        f"Measured: {source}, since {measured.peak_since}, over {measured.steps} steps{ranks}. "
        "Counted: bytes of the tensors, each storage once."
    )


def _alternative_text(report: MemoryReport) -> str:
    own = f"{report.setup.optimizer}: {gib(report.measured.peak.max)} GiB at the peak (measured)"
    others = [f"{name}: {gib(prediction.peak)} GiB (predicted)" for name, prediction in report.predicted.items()]
    return "Bars of memory by part. " + "; ".join([own, *others])

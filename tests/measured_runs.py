"""Trainers of a few steps with a memory report attached."""

import pytest
import torch
from conftest import TINY_MODELS, VOCAB_SIZE
from transformers import Trainer, TrainingArguments

import hf_stateless
from hf_stateless.reports.measured.schema import MemoryReport


KEYS = {"memory/peak_gib", "memory/optimizer_state_gib", "time/optimizer_share", "throughput/tokens_per_second"}
MIB = 1 << 20


@pytest.fixture
def without_picture(request, monkeypatch):
    """Pictures take longer than the runs here."""
    if "picture" not in request.node.name:
        monkeypatch.setattr("hf_stateless.reports.measured.picture.draw", lambda report, path: None)


class Clock:
    """Stands in for the module `time` where runs are measured; its time passes when a test says so."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in ("meter", "probes"):
        monkeypatch.setattr(f"hf_stateless.reports.measured.{module}.time", clock)
    return clock


def token_rows(count=32, shortest=5):
    """Rows of several lengths, so that batches are padded."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCAB_SIZE, (shortest + i % 4,), generator=generator).tolist() for i in range(count)]
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in rows]


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])
        for key, value in fill.items()
    }


def new_trainer(folder, optim="sinkgd", model="llama", kind=Trainer, callbacks=(), optimizers=None, **options):
    torch.manual_seed(0)
    defaults = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    defaults |= {"report_to": [], "use_cpu": True}
    args = TrainingArguments(folder, optim=optim, disable_tqdm=True, **{**defaults, **options})
    return kind(
        model=TINY_MODELS[model]() if isinstance(model, str) else model,
        args=args,
        train_dataset=token_rows(),
        eval_dataset=token_rows(4),
        data_collator=padded,
        callbacks=[*callbacks],
        **({"optimizers": optimizers} if optimizers else {}),
    )


def run(folder, *args, **kwargs):
    trainer = new_trainer(folder, *args, **kwargs)
    hf_stateless.attach_memory_report(trainer)
    trainer.train()
    return trainer, MemoryReport.load(folder)


def bytes_of(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

"""Which devices the Triton kernels are trusted on, with no such device at hand."""

import importlib.util
import logging
from types import SimpleNamespace

import pytest
import torch

from hf_stateless.update.kernels import choice


@pytest.mark.parametrize(
    ("asked", "hip", "capability", "taken", "told"),
    [
        ("", None, (9, 0), True, ""),
        ("", None, (7, 5), False, "capability 8.0 or newer"),
        ("", "6.4", (9, 4), False, "HF_STATELESS_KERNELS=triton takes them"),
        ("triton", "6.4", (9, 4), True, ""),
        ("torch", "6.4", (9, 4), False, ""),
    ],
)
def test_triton_is_taken_where_it_was_tried_or_is_asked_for(asked, hip, capability, taken, told, monkeypatch, caplog):
    for known in (choice._unfit, choice._say_once):
        known.cache_clear()
    monkeypatch.setenv(choice.VARIABLE, asked)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with caplog.at_level(logging.WARNING):
        assert choice.use_triton([SimpleNamespace(device=torch.device("cuda"))] * 2) is taken
    choice._unfit.cache_clear()
    assert len(caplog.records) == bool(told)
    assert told in caplog.text

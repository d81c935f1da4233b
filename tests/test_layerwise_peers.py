"""The benchmark of layer-wise optimizers: ours lose nothing in it, and what it cannot run it says in one line."""

import importlib.util

import layerwise_peers
import pytest
from layerwise_peers import CHECKS, OURS, PEERS, row


@pytest.mark.parametrize("check", CHECKS)
def test_ours_loses_nothing(check):
    assert row(check, list(OURS)) == ["ok"] * len(OURS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No peer is installed. Type pip install galore-torch apollo-torch"),
        (["--optim", *PEERS], r"apollo_adamw_layerwise: the package is not installed. Type pip install galore-torch"),
    ],
)
def test_without_peers_one_line_says_what_to_type(arguments, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        layerwise_peers.main(arguments)
    assert message in stopped.value.code
    assert "\n" not in stopped.value.code

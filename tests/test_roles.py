"""The roles of weights in ninety architectures of transformers, against a table that a person has read."""

import contextlib

import pytest
import torch
import transformers
from roles_table import ROLES_BY_CLASS

from hf_stateless.trainer.partition import partition_parameters


DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")


def with_few_layers(config):
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in filter(None, parts):
        for name in DEPTHS:
            depth = getattr(part, name, None)
            if isinstance(depth, int) and depth > 4 and not hasattr(part, "layer_types"):
                with contextlib.suppress(NotImplementedError):  # Funnel counts its layers in blocks
                    setattr(part, name, 4)
    return config


@pytest.mark.parametrize("name", ROLES_BY_CLASS)
def test_the_weights_of_an_architecture_have_the_roles_of_the_table(name):
    model_class = getattr(transformers, name, None)
    if model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with torch.device("meta"):
        model = model_class(with_few_layers(model_class.config_class()))
    found = {
        entry.name: f"matrix {entry.layout}" if entry.role == "matrix" else entry.role
        for entry in partition_parameters(model)
    }
    expected = ROLES_BY_CLASS[name]
    assert {weight: found.get(weight) for weight in expected} == expected

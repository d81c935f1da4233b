"""What tests of the optimizer's factories share: arguments of a Trainer, a bare environment, the text of a refusal."""

import pytest
from transformers import TrainingArguments

from hf_stateless.trainer.optim_args import parse_options


ENVIRONMENT = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # TrainingArguments sets it for good


def arguments(name, **options):
    plain = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none", "learning_rate": 1e-3}
    return TrainingArguments(**{**plain, "optim": name, **options})


def refusal(function, *args, **kwargs):
    with pytest.raises(ValueError, match=r"\S") as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def message_of(name, given):
    """The refusal of options for a name."""
    return refusal(parse_options, name, given)

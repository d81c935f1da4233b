"""Configs of DeepSpeed and accelerate as people have them, for the tests of `hf-stateless convert-config`."""

import json

import yaml


ON, OFF, AUTO = ({"enabled": value} for value in (True, False, "auto"))
ZERO2 = {"zero_optimization": {"stage": 2}}
CPU, NONE = {"device": "cpu"}, {"device": "none"}


def written(folder, values, name="config.json"):
    """A config file: values, or a text as it is."""
    path = folder / name
    dump = json.dumps if name.endswith(".json") else yaml.safe_dump
    path.write_text(values if isinstance(values, str) else dump(values))
    return path


def accelerate_config(kind, **values):
    """A config of accelerate, as its questionnaire writes it."""
    common = {"compute_environment": "LOCAL_MACHINE", "distributed_type": kind, "num_machines": 1, "num_processes": 8}
    return {**common, "machine_rank": 0, "main_training_function": "main", "use_cpu": False, **values}


def of_deepspeed(**block):
    return accelerate_config("DEEPSPEED", deepspeed_config=block)


def of_fsdp(**block):
    return accelerate_config("FSDP", fsdp_config=block)

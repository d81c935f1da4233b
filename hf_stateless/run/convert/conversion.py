"""What a converted config holds, and how it reads as a file."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

import yaml

from ...reports.command_line import one_line


@dataclass
class Conversion:
    """The accelerate config that does the same, what to type beside it, and what it leaves out.

    Args:
        config: the values of the accelerate config.
        arguments: values to type in `TrainingArguments(...)`.
        notes: one line for each thing that differs or has no counterpart.
        taken_out: what no longer stands in the script or command, such as "deepspeed=...".
    """

    config: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    taken_out: str = ""

    def comments(self, out: str) -> list[str]:
        """Return what a person has to know, one line each: the command, the values to type, the notes."""
        processes = "" if self.config.get("num_processes") else " --num_processes N"
        machines = " --machine_rank R --main_process_ip IP" if self.config.get("num_machines", 1) > 1 else ""
        lines = [f"accelerate launch --config_file {shlex.quote(out)}{processes}{machines} train.py"]
        if self.taken_out:
            lines.append(f"Take {self.taken_out} out of the script and of its command.")
        if self.arguments:
            values = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
            lines.append(f"TrainingArguments({values})")
        return [one_line(line, most=20_000) for line in [*lines, *self.notes]]

    def text(self, source: str, out: str) -> str:
        """Return the file: what a person has to know as comments, then the values as YAML."""
        head = [f"Written by hf-stateless convert-config from {one_line(source)}", *self.comments(out)]
        return "\n".join([*(f"# {line}" for line in head), yaml.safe_dump(self.config, sort_keys=False)])


def plain_ddp(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config that shards nothing."""
    kind = "MULTI_CPU" if config.get("use_cpu") else "MULTI_GPU"
    return {**config, "distributed_type": "NO" if config.get("num_processes") == 1 else kind}


def replicated(conversion: Conversion, shard: int | None, asked: str) -> None:
    """Let groups of `shard` processes hold one whole model each, as HSDP; say why where it cannot be."""
    processes = conversion.config.get("num_processes")
    if not processes or not shard or processes % shard:
        conversion.notes.append(
            f"{asked}: groups that hold one model each need the number of processes, got "
            f"{processes or 'none'} for groups of {shard or 'unknown size'}: sharded over all processes instead."
        )
    elif processes > shard:
        conversion.config["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": processes // shard,
            "parallelism_config_dp_shard_size": shard,
            "parallelism_config_tp_size": 1,
            "parallelism_config_cp_size": 1,
        }

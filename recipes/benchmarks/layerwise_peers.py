"""What a layer-wise optimizer must not lose: five checks of those that transformers ships, and of ours.

    pip install galore-torch apollo-torch
    python recipes/benchmarks/layerwise_peers.py

Each check trains a tiny LLaMA for four steps on CPU. Printed is a Markdown table with one column for each name: `ok`,
or the defect in a few words. Without `--optim` the columns are ours and the peers whose package is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_stateless  # noqa: F401


OURS = ("swan_layerwise", "sinkgd_layerwise", "multinorm_layerwise")
PEERS = {"galore_adamw_layerwise": "galore_torch", "apollo_adamw_layerwise": "apollo_torch"}
STEPS, VOCAB_SIZE = 4, 64


class Weights(TrainerCallback):
    """Keeps the weights before training and after every step; stops after step `stop_at`."""

    def __init__(self, model: torch.nn.Module, stop_at: int | None = None) -> None:
        self.model, self.stop_at = model, stop_at
        self.seen = [self.now()]

    def now(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self.now())
        if state.global_step == self.stop_at:
            control.should_training_stop = True


def train(
    optim: str, folder: str, stop_at: int | None = None, resume: bool | None = None, **options: Any
) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
    """Return the weights before training and after each step, and the Trainer's log."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=32, **sizes))
    tokens = torch.randint(3, VOCAB_SIZE, (64, 12), generator=torch.Generator().manual_seed(1)).tolist()
    defaults = {"per_device_train_batch_size": 4, "save_strategy": "no", "lr_scheduler_type": "cosine"}
    if optim in PEERS:
        defaults["optim_target_modules"] = "all-linear"
    args = TrainingArguments(
        folder,
        optim=optim,
        learning_rate=1e-2,
        max_steps=STEPS,
        warmup_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{**defaults, **options},
    )
    weights = Weights(model, stop_at)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[weights])
    trainer.train(resume_from_checkpoint=resume)
    return weights.seen, [entry for entry in trainer.state.log_history if "learning_rate" in entry]


# Each check returns the defect in a few words, or None where there is none.


def schedule(optim: str, folder: str) -> str | None:
    """A step that is logged with the rate 0 moves nothing, every other does."""
    weights, log = train(optim, folder)
    for entry, (before, after) in zip(log, pairwise(weights), strict=True):
        rate, moved = entry["learning_rate"], (after - before).abs().max().item()
        if (rate > 0) != (moved > 0):
            return f"moves by {moved:.2g} at rate {rate:.2g}"
    return None


def clipping(optim: str, folder: str) -> str | None:
    """A norm of 1e-6 leaves other weights than a norm of 1."""
    loose, tight = (train(optim, folder, max_grad_norm=norm)[0][-1] for norm in (1.0, 1e-6))
    return "`max_grad_norm` ignored" if torch.equal(loose, tight) else None


def grad_norm(optim: str, folder: str) -> str | None:
    """The norm of the first step is that of the same model and batch under AdamW."""
    logged, expected = (train(name, folder)[1][0]["grad_norm"] for name in (optim, "adamw_torch"))
    return None if math.isclose(logged, expected, rel_tol=1e-5) else f"logs {logged:.3g} for {expected:.3g}"


def resume(optim: str, folder: str) -> str | None:
    """A run that was stopped half-way ends with the weights of the run that was not, to the bit."""
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole, _ = train(optim, f"{folder}/whole", **saving)
    train(optim, f"{folder}/half", stop_at=STEPS // 2, **saving)
    resumed, _ = train(optim, f"{folder}/half", resume=True, **saving)
    difference = (resumed[-1] - whole[-1]).abs().max().item()
    return f"weights differ by {difference:.2g}" if difference else None


def accumulation(optim: str, folder: str) -> str | None:
    """Two micro-batches of 2 give the weights of one batch of 4."""
    whole, _ = train(optim, folder)
    try:
        parts, _ = train(optim, folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    except ValueError:
        return "refused"
    # Sums in another order differ in the last digit of a gradient, which whitening amplifies.
    return None if torch.allclose(parts[-1], whole[-1], rtol=1e-3, atol=1e-4) else "other weights"


CHECKS: dict[str, Callable[[str, str], str | None]] = {
    "learning-rate schedule": schedule,
    "gradient clipping": clipping,
    "logged `grad_norm`": grad_norm,
    "resume": resume,
    "gradient accumulation": accumulation,
}


def row(check: str, names: list[str]) -> list[str]:
    """Return what one check finds for each optimizer: `ok` or the defect."""
    cells = []
    for optim in names:
        with tempfile.TemporaryDirectory() as folder:
            cells.append(CHECKS[check](optim, folder) or "ok")
    return cells


def table(names: list[str]) -> str:
    """Return all checks of these optimizers as a Markdown table."""
    lines = ["| | " + " | ".join(f"`{optim}`" for optim in names) + " |", "|---|" + "---|" * len(names)]
    lines += [f"| {check} | " + " | ".join(row(check, names)) + " |" for check in CHECKS]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", nargs="+", choices=[*OURS, *PEERS], metavar="NAME", help="columns: %(choices)s")
    chosen = parser.parse_args(arguments).optim
    missing = [name for name in PEERS if not importlib.util.find_spec(PEERS[name])]
    if not chosen and len(missing) == len(PEERS):
        sys.exit("No peer is installed. Type pip install galore-torch apollo-torch, or --optim with names of ours.")
    if absent := [name for name in chosen or () if name in missing]:
        packages = " ".join(PEERS[name].replace("_", "-") for name in absent)
        sys.exit(f"{', '.join(absent)}: the package is not installed. Type pip install {packages}.")
    text = table(chosen or [*OURS, *(name for name in PEERS if name not in missing)])
    print(text)


if __name__ == "__main__":
    main()

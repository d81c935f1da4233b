"""Five things a layer-wise optimizer must not lose, checked on ours and on those that transformers ships.

`python tests/test_layerwise_peers.py` prints the table. The columns of GaLore and APOLLO need
`pip install galore-torch apollo-torch`. Their defects are asserted, so that the tests turn red when they are mended.
"""

import importlib.util
import tempfile
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_stateless  # noqa: F401


OURS = ("swan_layerwise", "sinkgd_layerwise", "multinorm_layerwise")
PEERS = {"galore_adamw_layerwise": "galore_torch", "apollo_adamw_layerwise": "apollo_torch"}
INSTALLED = [name for name, package in PEERS.items() if importlib.util.find_spec(package)]
STEPS, VOCAB_SIZE = 4, 64


class Weights(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self, model, stop_at=None):
        self.model, self.stop_at = model, stop_at
        self.seen = [self.now()]

    def now(self):
        return torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.now())
        if state.global_step == self.stop_at:
            control.should_training_stop = True


def train(optim, folder, stop_at=None, resume=None, **options):
    """Return the weights before training and after each step, and the Trainer's log."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=32, **sizes))
    tokens = torch.randint(3, VOCAB_SIZE, (64, 12), generator=torch.Generator().manual_seed(1)).tolist()
    defaults = {
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
    }
    if optim in PEERS:
        defaults["optim_target_modules"] = "all-linear"
    args = TrainingArguments(
        folder,
        optim=optim,
        learning_rate=1e-2,
        max_steps=STEPS,
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


def schedule(optim, folder):
    """A step that is logged with the rate 0 moves nothing, one with more does."""
    weights, log = train(optim, folder)
    assert [entry["learning_rate"] > 0 for entry in log] == [False, True, True, True]
    moved = [(after - before).abs().max().item() for before, after in pairwise(weights)]
    assert moved[1] > 0
    return f"moves by {moved[0]:.2g} at rate 0" if moved[0] else None


def clipping(optim, folder):
    """A norm of 1e-6 leaves other weights than a norm of 1."""
    loose, tight = (train(optim, folder, max_grad_norm=norm)[0][-1] for norm in (1.0, 1e-6))
    return "`max_grad_norm` ignored" if torch.equal(loose, tight) else None


def grad_norm(optim, folder):
    """The norm of the first step is that of the same model and batch under AdamW."""
    logged, expected = (train(name, folder)[1][0]["grad_norm"] for name in (optim, "adamw_torch"))
    return None if logged == pytest.approx(expected, rel=1e-5) else f"logs {logged:.3g} for {expected:.3g}"


def resume(optim, folder):
    """A run that was stopped half-way ends with the weights of the run that was not, to the bit."""
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole, _ = train(optim, f"{folder}/whole", **saving)
    train(optim, f"{folder}/half", stop_at=STEPS // 2, **saving)
    resumed, _ = train(optim, f"{folder}/half", resume=True, **saving)
    difference = (resumed[-1] - whole[-1]).abs().max().item()
    return f"weights differ by {difference:.2g}" if difference else None


def accumulation(optim, folder):
    """Two micro-batches of 2 give the weights of one batch of 4."""
    whole, _ = train(optim, folder)
    try:
        parts, _ = train(optim, folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    except ValueError:
        return "refused"
    # Sums in another order differ in the last digit of a gradient, which whitening amplifies.
    return None if torch.allclose(parts[-1], whole[-1], rtol=1e-3, atol=1e-4) else "other weights"


CHECKS = {
    "learning-rate schedule": schedule,
    "gradient clipping": clipping,
    "logged `grad_norm`": grad_norm,
    "resume": resume,
    "gradient accumulation": accumulation,
}
DEFECTS = {
    "learning-rate schedule": "at rate 0",
    "gradient clipping": "ignored",
    "logged `grad_norm`": "logs 0 for",
    "resume": "weights differ by",
    "gradient accumulation": "refused",
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("optim", OURS)
def test_ours_loses_nothing(optim, check, tmp_path):
    assert CHECKS[check](optim, str(tmp_path)) is None


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("optim", PEERS)
def test_the_peer_still_has_the_defect_that_the_table_shows(optim, check, tmp_path):
    if optim not in INSTALLED:
        pytest.skip(f"needs pip install {PEERS[optim].replace('_', '-')}")
    assert DEFECTS[check] in (CHECKS[check](optim, str(tmp_path)) or "")


def table():
    """Return the Markdown table of ours and of the peers that are installed."""
    columns = [*OURS, *INSTALLED]
    lines = ["| | " + " | ".join(f"`{optim}`" for optim in columns) + " |", "|---|" + "---|" * len(columns)]
    for title, check in CHECKS.items():
        cells = []
        for optim in columns:
            with tempfile.TemporaryDirectory() as folder:
                cells.append(check(optim, folder) or "ok")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    text = table()
    print(text)

"""torch's AdamW with a learning rate for each kind of parameter: the baseline of the pretraining recipes."""

import torch
from torch import nn
from transformers import TrainingArguments

from hf_stateless.optimizer.rates import RATES
from hf_stateless.trainer.partition import partition_parameters


def adamw_by_kind(model: nn.Module, args: TrainingArguments, rates: str) -> torch.optim.AdamW:
    """Return the AdamW of torch whose embeddings, heads and norms have the multiples that `rates=` gives ours.

    Args:
        model: what is trained.
        args: of the Trainer: the learning rate of matrices, betas, eps and the weight decay of matrices and tables.
        rates: a name in `hf_stateless.optimizer.rates.RATES`.
    """
    multiples = {"matrix": 1.0, **vars(RATES[rates])}
    entries = list(partition_parameters(model, None))
    if not any(entry.role == "head" for entry in entries):
        multiples["embedding"] = multiples["tied"]
    groups = [
        {
            "params": [entry.parameter for entry in entries if entry.role == role],
            "lr": args.learning_rate * multiples[role],
            "weight_decay": 0.0 if role == "rest" else args.weight_decay,
        }
        for role in dict.fromkeys(entry.role for entry in entries)
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=True)

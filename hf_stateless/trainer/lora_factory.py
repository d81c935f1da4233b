"""The factory for PEFT models, named and called like those of `peft.optimizers`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..optimizer.optimizer import StatelessOptimizer
from .adapters import has_lora
from .factory import create_optimizer


def create_lora_optimizer(model: nn.Module, name: str = "swan", *, lr: float, **options: Any) -> StatelessOptimizer:
    """Make the optimizer of a PEFT model with LoRA adapters, as the factories of `peft.optimizers` do.

    The factors A in R^{r x n} and B in R^{m x r} of an adapter are updated by steepest descent in the change of the
    product B A (`lora=product`, see `hf_stateless.optimizer.lora_product`) or each on its own (`lora=separate`).
    State kept: a one-element `step` for each factor; two moments for what is trained beside the adapters.

    Args:
        model: from `peft.get_peft_model`; LoRA, rsLoRA and DoRA, any number of adapters.
        name: `swan`, `sinkgd` or `multinorm`, or one of them with `_layerwise`.
        lr: learning rate; a step changes (alpha / r) B A by entries of root mean square `lr * lr_scale` for each of
            the two factors, so that neither r, alpha nor the shape asks for another one. Start from AdamW's.
        options: the other arguments of `create_optimizer`, and the keys of `optim_args` as Python values.

    Raises:
        ValueError: the model has no trainable LoRA adapter, or what `create_optimizer` refuses.

    Example:
        >>> import torch, hf_stateless
        >>> from peft import LoraConfig, get_peft_model
        >>> layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        >>> model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "1"]))
        >>> optimizer = hf_stateless.create_lora_optimizer(model, "swan", lr=2e-3, lora="product")
        >>> [(group["algorithm"], len(group["params"])) for group in optimizer.param_groups]
        [('lora_product', 4)]

    References:
        Steepest descent in the spectral norm: https://huggingface.co/papers/2409.20325.
    """
    if not has_lora(model):
        raise ValueError(
            "create_lora_optimizer needs a model with a trainable LoRA adapter, got none: make one by "
            "peft.get_peft_model(model, peft.LoraConfig(...)), or type hf_stateless.create_optimizer(model, ...)."
        )
    return create_optimizer(model, name, lr=lr, **options)

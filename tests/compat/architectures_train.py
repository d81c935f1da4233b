"""Two steps of training of every architecture of transformers that can be made small: trained, refused or failed.

    python tests/compat/architectures_train.py [--optim swan,sinkgd_layerwise] [--only NAME,...] [--least 100]

A model is built from its config with small sizes, and given tokens, an image or sound. Where that alone does not work
(a config that does not fit together, other inputs), it is not counted. What has a backward pass has to be trained by
our optimizers, or be refused by one line. Ends with status 1 if one failed, or if fewer than `--least` were tried.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

import hf_stateless


TASKS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION")
# By the names that configs use; a name that a config lacks is left out.
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32, "emb_dim": 32,
    "embed_dim": 32, "word_embed_proj_dim": 32, "intermediate_size": 48, "d_ff": 48, "ffn_dim": 48, "d_inner": 48,
    "n_inner": 48, "hidden_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_hidden_layers": 2,
    "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "max_position_embeddings": 64,
    "n_positions": 64, "image_size": 32, "patch_size": 8, "num_channels": 3, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "q_lora_rank": 12,
    "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "num_labels": 3, "ssm_state_size": 4, "state_size": 4, "mamba_d_state": 4,
    "num_mel_bins": 16, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
    "layerdrop": 0.0, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8,
    "rotary_dim": 8, "use_cache": False,
}  # fmt: skip


def small_config(config_class: type) -> transformers.PretrainedConfig:
    """Return a config with small sizes where it has them, parts included."""
    known = {name: value for name, value in SIZES.items() if hasattr(config_class(), name)}
    if "qk_rope_head_dim" in known:  # what such models rotate
        known["head_dim"] = known["qk_rope_head_dim"]
    with contextlib.suppress(Exception):
        return config_class(**known)
    config = config_class()
    for name, value in known.items():
        with contextlib.suppress(Exception):
            setattr(config, name, value)
    return config


def inputs(task: str, config: transformers.PretrainedConfig) -> dict[str, torch.Tensor]:
    """Return a small batch for a task, with labels where the model makes a loss of them."""
    tokens = torch.randint(3, 90, (2, 12))
    if task == "IMAGE_CLASSIFICATION":
        size = getattr(config, "image_size", 32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), height, width)}
    if task == "AUDIO_CLASSIFICATION":
        return {"input_values": torch.randn(2, 4000)}
    if task == "SEQ_TO_SEQ_CAUSAL_LM":
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a loss that every part of the output has a share in."""
    output = model(**batch)
    return (output.logits.float() * torch.linspace(-1, 1, output.logits.shape[-1])).mean()


def architectures() -> Iterator[tuple[str, str]]:
    """Yield the name of a class and its task, each class once."""
    seen = set()
    for task in TASKS:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        for model_type, name in names.items():
            name = name if isinstance(name, str) else name[0]
            if model_type in CONFIG_MAPPING and name not in seen:
                seen.add(name)
                yield name, task


def build(name: str, task: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a small model that was found to train by hand, and its batch."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = small_config(model_class.config_class)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > 30e6:
        raise ValueError(f"{size / 1e6:.0f}M parameters are not small")
    model = model_class(config).train()
    batch = inputs(task, config)
    loss_of(model, batch).backward()
    model.zero_grad(set_to_none=True)
    return model, batch


def train(model: nn.Module, batch: dict[str, torch.Tensor], optim: str) -> str:
    """Return `trained`, `refused: ...` or `failed: ...` for two steps."""
    try:
        optimizer = hf_stateless.create_optimizer(model, optim, lr=1e-3)
    except ValueError as error:
        one_line = "\n" not in str(error) and len(str(error)) < 1000
        return f"refused: {error}" if one_line else f"failed: a refusal of many lines: {error}"
    matrices = [p for g in optimizer.param_groups if g["role"] == "matrix" for p in g["params"]]
    before = [p.detach().clone() for p in matrices]
    for _ in range(2):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        return "failed: a weight is not finite"
    moved = sum(not torch.equal(p, old) for p, old in zip(matrices, before, strict=True))
    return "trained" if moved else "failed: no matrix moved"


class Slow(Exception):
    """An architecture that takes longer than it should."""


def one(name: str, task: str, optims: list[str], limit: int) -> str:
    """Return what happened to one architecture under all optimizers, the worst first."""

    def stop(*_: object) -> None:
        raise Slow(f"more than {limit} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        results = []
        for optim in optims:
            try:
                model, batch = build(name, task)
            except Exception as error:  # as many reasons as there are architectures
                return f"not run: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:110]
            try:
                results.append(train(model, batch, optim))
            except Slow as error:
                return f"not run: {error}"
            except Exception as error:
                results.append(f"failed: {optim}: {type(error).__name__}: {error}")
        return min(results, key=lambda text: ("failed", "refused", "trained").index(text.split(":")[0]))
    except Slow as error:
        return f"not run: {error}"
    finally:
        signal.alarm(0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Two steps of every architecture that can be made small.")
    parser.add_argument("--optim", default="swan,sinkgd_layerwise")
    parser.add_argument("--only", default="")
    parser.add_argument("--least", type=int, default=100)
    parser.add_argument("--limit", type=int, default=60, help="seconds for one architecture")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    wanted = set(filter(None, given.only.split(",")))
    counts: Counter[str] = Counter()
    for name, task in architectures():
        if not wanted or name in wanted:
            result = one(name, task, given.optim.split(","), given.limit)
            counts[result.split(":")[0]] += 1
            print(f"{name:<45} {result}", flush=True)
    tried = counts["trained"] + counts["refused"] + counts["failed"]
    print(f"\n{tried} tried under {given.optim}: " + ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
    enough = tried >= (len(wanted) or given.least)
    return 0 if enough and not counts["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())

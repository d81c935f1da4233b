"""Tiny models that transformers cuts by tensor and expert parallelism, and steps over them; for several processes."""

import contextlib
import dataclasses
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.distributed import DistributedConfig

from hf_stateless import create_optimizer
from hf_stateless.ranks.placement import part_of
from hf_stateless.weights.cuts import splits_of, whole_tensor


# transformers that has it also cuts into uneven parts and along two mesh dimensions; 5.17 does neither.
NEWER = "ep_size" in {field.name for field in dataclasses.fields(DistributedConfig)}
VOCAB = 61 if NEWER else 62  # odd, so that ranks have different shares of embedding and head
SIZES = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64}
SIZES |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"intermediate_size": 45 if NEWER else 46}),
    "llama_of_4_heads": (LlamaForCausalLM, LlamaConfig, {"intermediate_size": 45, "num_key_value_heads": 4}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24}),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {**EXPERTS, "num_local_experts": 4, "intermediate_size": 24, "sliding_window": 16},
    ),
}
# AdamW divides by eps what ranks add up in another order, where a gradient is nothing but that rounding.
RATES = {"lr": 1e-3, "lr_scale": 0.2, "weight_decay": 0.1, "adamw_eps": 1e-6}


def save_models(folder):
    """Write one folder for each model; return the folder of all."""
    for name, (model, config, sizes) in MODELS.items():
        torch.manual_seed(0)
        model(config(**{**SIZES, **sizes})).save_pretrained(Path(folder) / name)
    return Path(folder)


def load(folder, kind, plan=None, **options):
    """Load a model, cut by a `DistributedConfig` of these values, if there are any."""
    config = {} if plan is None else {"distributed_config": DistributedConfig(**plan)}
    given = {"dtype": torch.float32, "experts_implementation": "eager", **options, **config}
    model = AutoModelForCausalLM.from_pretrained(Path(folder) / kind, **given)
    model.train()
    return model


def batch_of(step, share=(0, 1), one_token=False):
    """The tokens of a step, or a share of them: (which, of how many)."""
    generator = torch.Generator().manual_seed(step)
    if one_token:  # all positions are alike, so that all go to one expert
        return torch.full((4, 8), 3 + step)
    return torch.randint(3, VOCAB, (4, 8), generator=generator).chunk(share[1])[share[0]]


def backward(model, step, share=(0, 1), **kind):
    tokens = batch_of(step, share, **kind)
    model(input_ids=tokens, labels=tokens).loss.backward()


@contextlib.contextmanager
def without_sync(model, optimizer):
    """Let gradients accumulate, as `no_sync` does."""
    sync = getattr(model, "set_requires_gradient_sync", lambda _: None)
    sync(False)
    with optimizer.hold():
        yield
    sync(True)


def train(
    model,
    name,
    steps,
    share=(0, 1),
    first=0,
    optimizer=None,
    one_token=False,
    passes=1,
    change=lambda _: None,
    **options,
):
    """Take steps of a loop of one's own, each of some backward passes; return the optimizer."""
    optimizer = optimizer or create_optimizer(model, name, **RATES, **options)
    for step in range(first, first + steps):
        for number in range(passes):
            optimizer.train()
            with contextlib.nullcontext() if number + 1 == passes else without_sync(model, optimizer):
                backward(model, step + 100 * number, share, one_token=one_token)
        change(step)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def weights_of(model):
    return {name: whole_tensor(p.detach()).clone() for name, p in model.named_parameters()}


def chunk(tensor, dim, which):
    chunks = tensor.chunk(2, dim)
    return chunks[which] if which < len(chunks) else tensor.narrow(dim, 0, 0)


def cut_by_hand(value, mesh, cut):
    """This rank's part: what is strided is cut last, or is two tensors packed in one."""
    (first, second), (outer, inner) = cut, mesh.get_coordinate()
    if isinstance(first, _StridedShard):
        return chunk(chunk(value, second.dim, inner), first.dim, outer)
    value = chunk(value, first.dim, outer)
    if isinstance(second, _StridedShard):
        packed = [chunk(value, second.dim, i) for i in range(2)]
        return torch.cat([chunk(one, second.dim, inner) for one in packed], second.dim)
    return chunk(value, second.dim, inner)


def undone_cuts():
    """Undo each cut with the parts of all ranks, one split after the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    cuts = [
        (_StridedShard(0, split_factor=2), Shard(0)),
        (Shard(0), Shard(0)),
        (Shard(0), Shard(1)),
        (Shard(1), Shard(0)),
        (Shard(1), _StridedShard(0, split_factor=2)),
        (_StridedShard(1, split_factor=2), Shard(1)),
    ]
    for cut in cuts:
        for shape in ((8, 12), (7, 5), (3, 4), (2, 1)):
            value = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
            place = {"shape": value.shape, "stride": value.stride(), "run_check": False}
            p = torch.nn.Parameter(DTensor.from_local(cut_by_hand(value, mesh, cut), mesh, cut, **place))
            p.grad = p.detach().clone()
            splits = splits_of(p)
            if splits is None:
                yield str(cut), shape, "unknown"
                continue
            part = p.to_local().detach()
            for split in splits:
                got = [torch.empty(split.part(rank)) for rank in range(split.ranks)]
                for source in range(split.ranks):
                    got[source] = got[source].copy_(part) if source == split.rank else got[source]
                    torch.distributed.broadcast(got[source], group=split.group, group_src=source)
                assert torch.equal(split.parts(split.whole(got))[split.rank], part)
                part = split.whole(got)
            gathered, kept = whole_tensor(p.detach()), part_of(value, p.detach())
            right = torch.equal(part, value) and torch.equal(gathered, value) and torch.equal(kept, p.to_local())
            yield str(cut), shape, "right" if right else "wrong"

"""What a case of `bits.py` says, and the tiny models and batches that it names."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import hf_stateless


VOCABULARY = 96
TWO_RANKS = ("ddp", "fsdp2", "sharded", "trainer_ddp", "trainer_fsdp2")


@dataclass(frozen=True)
class Case:
    """One training run of a few steps."""

    name: str
    """Also the name of its folder."""
    model: str
    """A key of `MODELS`; for groups made by hand, the model is made of the shapes in the groups."""
    optimizer: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `create_optimizer`, which a Trainer gets as `optim_args` and arguments."""
    dtype: str = "float32"
    """Of the weights; `int8` is a bfloat16 model whose linear layers are stored in 8 bits."""
    way: str = "create"
    """How it is trained: `create`, `lora`, `groups`, `trainer`, `function`, `quantized`, or one of `TWO_RANKS`."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Further `TrainingArguments`."""
    lora: dict[str, Any] = field(default_factory=dict)
    """Arguments of a `LoraConfig`, if the model has an adapter."""
    spoil: str = ""
    """What becomes of one gradient in some steps: `nan`, `zero` or `missing`."""
    then: dict[str, Any] = field(default_factory=dict)
    """Options that another optimizer has, which goes on from the saved state."""
    accumulate: int = 1
    """Backward passes in one step, without a Trainer."""
    steps: int = 5
    """Optimizer steps; the state is saved two steps before the end."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that are set for this case."""

    @property
    def middle(self) -> int:
        """After how many steps the state is saved."""
        return self.steps - 2


SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BLOCK = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, **BLOCK, "num_key_value_heads": 2, "max_position_embeddings": 32}
MOE = {**LLAMA, "head_dim": 8, "num_experts_per_tok": 2}
# 256 x 256 is what the C kernel and the road of eigenvalues begin with.
WIDE = {**LLAMA, "hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 1}
# No size is a multiple of 2 or 4, except where rotary embeddings need it.
ODD = {**LLAMA, "hidden_size": 30, "intermediate_size": 37, "num_attention_heads": 3, "num_key_value_heads": 1}
GPT2 = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
VIT = {**BLOCK, "image_size": 16, "patch_size": 8, "num_channels": 3, "num_labels": 3}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "odd": lambda: LlamaForCausalLM(LlamaConfig(**ODD, head_dim=10, tie_word_embeddings=False)),
    "odd_tied": lambda: LlamaForCausalLM(LlamaConfig(**ODD, head_dim=10, tie_word_embeddings=True)),
    "wide": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, tie_word_embeddings=False)),
    "broad": lambda: LlamaForCausalLM(LlamaConfig(**{**WIDE, "intermediate_size": 4112})),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2_wide": lambda: GPT2LMHeadModel(GPT2Config(**{**GPT2, "n_embd": 256, "n_layer": 1})),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=24)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**MOE, num_local_experts=4)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, **BLOCK, max_position_embeddings=32, num_labels=3)
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(**VIT)),
}


class Groups(nn.Module):
    """Parameters of given shapes, whose gradients are fixed noise.

    Args:
        groups: each has `shapes`; with `turned`, the weights of two dimensions are stored by columns.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__()
        shapes = [(shape, group.get("turned")) for group in groups for shape in group["shapes"]]
        self.weights = nn.ParameterList(
            torch.randn(*reversed(shape)).mT if turned else torch.randn(*shape) for shape, turned in shapes
        )

    def forward(self, seed: int) -> Tensor:
        """Return the loss."""
        generator = torch.Generator().manual_seed(seed)
        losses = []
        for p in self.weights:
            noise = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                noise, p = distribute_tensor(noise, p.device_mesh, p.placements).to_local(), p.to_local()
            losses.append((p.float() * noise).sum())
        return torch.stack(losses).sum()


def make_model(case: Case) -> nn.Module:
    """Return the model of a case, the same at each call."""
    torch.manual_seed(0)
    model = Groups(case.options["groups"]) if "groups" in case.options else MODELS[case.model]()
    model.to(torch.bfloat16 if case.dtype == "int8" else getattr(torch, case.dtype))
    if case.dtype == "int8":
        hf_stateless.quantize(model, hf_stateless.Int8TrainingConfig(group_size=16))
    if case.lora:
        # B starts at random, since A has no gradient while it is zero.
        model = get_peft_model(
            model, LoraConfig(r=4, init_lora_weights=False, **case.lora), autocast_adapter_dtype=False
        )
    return model.train()


def batch(case: Case, seed: int) -> dict[str, Any]:
    """Return the arguments of a forward pass: two rows."""
    generator = torch.Generator().manual_seed(seed)
    if "groups" in case.options:
        return {"seed": seed}
    if case.model == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 2])}
    tokens = torch.randint(3, VOCABULARY, (2, 8), generator=generator)
    return {"input_ids": tokens, "labels": torch.tensor([0, 2]) if case.model == "bert" else tokens}


def rows() -> list[dict[str, list[int]]]:
    """Return the data set of a Trainer."""
    tokens = torch.randint(3, VOCABULARY, (48, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]

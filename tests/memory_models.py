"""Small models, real and on the meta device, and what is alive in a step of them."""

import torch
from conftest import TINY_MODELS
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import hf_stateless
from hf_stateless.reports.predicted import build_model
from hf_stateless.reports.predicted.model import weight_bytes_of_rank
from hf_stateless.reports.predicted.state import RULES
from hf_stateless.reports.predicted.trace import LiveBytes


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def small_llama(**sizes):
    """Matrices on both sides of bitsandbytes' limit of 4096 entries, of sizes that are no multiples of its blocks."""
    defaults = {"hidden_size": 72, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 6}
    return LlamaConfig(
        **{**defaults, "num_key_value_heads": 2, "vocab_size": 301, **sizes}, architectures=["LlamaForCausalLM"]
    )


def small_gpt2():
    return GPT2Config(
        n_embd=72, n_layer=3, n_head=6, n_positions=96, vocab_size=301, bos_token_id=1, eos_token_id=2,
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip


SMALL = {"small_llama": small_llama, "small_gpt2": small_gpt2}


def real_model(name, dtype="fp32"):
    """A model with weights, tiny or small."""
    torch.manual_seed(0)
    if name in TINY_MODELS:
        return TINY_MODELS[name]().to(DTYPES[dtype])
    return AutoModelForCausalLM.from_config(SMALL[name](), dtype=DTYPES[dtype])


def meta_model(name, settings):
    """The same model from its config, without weights."""
    if name in SMALL:
        return build_model(SMALL[name](), settings)
    model = TINY_MODELS[name]()
    model.config.architectures = [type(model).__name__]
    model.config.use_cache = False
    return build_model(model.config, settings)


def state_bytes(optimizer):
    """Bytes of the tensors in an optimizer's state, each storage once; GaLore keeps some in an object."""
    storages = {}

    def look(value):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for inner in value.values():
                look(inner)
        elif hasattr(value, "ortho_matrix"):
            look(vars(value))

    for state in optimizer.state.values():
        look(dict(state))
    return sum(storages.values())


def measured_peak(model, inputs, optim, **options):
    """Bytes alive at the fullest moment of the second step on the CPU, counted from real tensors."""
    if optim in RULES:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=optim == "adamw_torch_fused")
    else:
        optimizer = hf_stateless.create_optimizer(model, optim, lr=1e-3, **options)
    model.config.use_cache = False
    before = weight_bytes_of_rank(model)
    with LiveBytes() as live:
        for _ in range(2):
            live.restart()
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return before + live.peak.total

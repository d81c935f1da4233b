"""Seeds, hypothesis profile and strategies, and tiny models made from configs, without any download."""

import gc

import environment  # noqa: F401


# isort: split
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)


# Helpers that assert or hold fixtures; to be named before they are imported.
pytest.register_assert_rewrite(
    *("architectures", "distributed_models", "finetuning_models", "finetuning_place", "interpreters"),
    *("layerwise_runs", "measured_runs", "memory_models", "optimizer_groups", "tiny_models"),
)

settings.register_profile("hf_stateless", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("hf_stateless")


def pytest_collection_modifyitems(items):
    """Put files with slow tests first: one that began last would run on one worker while the others have ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Leave what is imported out of garbage collection: every Trainer collects, and went through all of it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let the modules go in the ordinary way."""
    gc.unfreeze()


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EDGE_SHAPES = ((1, 1), (1, 7), (7, 1), (1, 1, 1), (2, 1, 5), (3, 4, 1), (2, 3, 5), (2, 5, 3), (2, 2, 3, 4))


def dense(*shape, dtype=torch.float32, scale=1.0, seed=0):
    """Random matrices without zeros or near-zeros, so that every row, column and sign is well defined."""
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return ((x + x.sign() * 0.05) * scale).to(dtype)


@st.composite
def gradients(draw, dtypes=DTYPES, min_rows=1, min_columns=1):
    """Gradients of any edge shape, dtype and scale (1e-30 to 1e30; 1e-3 to 1e3 in float16)."""
    edges = [shape for shape in EDGE_SHAPES if shape[-2] >= min_rows and shape[-1] >= min_columns]
    sizes = st.tuples(st.integers(min_rows, 33), st.integers(min_columns, 33))
    shape = draw(sizes if not edges else st.one_of(st.sampled_from(edges), sizes))
    dtype = draw(st.sampled_from(dtypes))
    exponent = draw(st.integers(-3, 3) if dtype == torch.float16 else st.integers(-30, 30))
    return dense(*shape, dtype=dtype, scale=10.0**exponent, seed=draw(st.integers(0, 2**20)))


def relative_error(actual, expected):
    """Frobenius norm of the difference over that of the expected value, in float64."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


VOCAB_SIZE = 96
SMALL = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BLOCK = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _llama(tie):
    sizes = {**SMALL, **BLOCK, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tie))


def _gpt2():
    return GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def _qwen3_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    sizes = {**SMALL, **BLOCK, **experts, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


def _t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens = {"vocab_size": VOCAB_SIZE, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(**sizes, **tokens))


def _bert():
    config = BertConfig(vocab_size=VOCAB_SIZE, **BLOCK, max_position_embeddings=64, num_labels=3)
    return BertForSequenceClassification(config)


def _vit():
    return ViTForImageClassification(ViTConfig(**BLOCK, image_size=16, patch_size=8, num_channels=3, num_labels=3))


TINY_MODELS = {
    "llama": lambda: _llama(tie=False),
    "llama_tied": lambda: _llama(tie=True),
    "gpt2": _gpt2,
    "qwen3_moe": _qwen3_moe,
    "t5": _t5,
    "bert": _bert,
    "vit": _vit,
}


def tiny_inputs(name, batch_size=2, length=8):
    """A batch with labels for `TINY_MODELS[name]`, so that `model(**batch).loss.backward()` works."""
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        pixels = torch.randn(batch_size, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "labels": torch.arange(batch_size) % 3}
    tokens = torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator)
    return {"input_ids": tokens, "labels": torch.arange(batch_size) % 3 if name == "bert" else tokens.clone()}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def make_model():
    """`make_model("llama")`: a tiny model, equal at every call."""

    def make(name):
        torch.manual_seed(0)
        return TINY_MODELS[name]()

    return make


@pytest.fixture(params=sorted(TINY_MODELS))
def any_model(request, make_model):
    """Each tiny model in turn, as (name, model)."""
    return request.param, make_model(request.param)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `-n` a file stays with one worker, so that processes which its tests share are started once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # files with few tests are often the slow ones
    return LoadFileScheduling(config, log) if config.option.dist == "load" else None

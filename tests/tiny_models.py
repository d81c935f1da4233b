"""A tiny chat model in a folder, with its tokenizer, and rows for each trainer of TRL: nothing is downloaded."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)


SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
WORDS = [f"w{i}" for i in range(27)]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SIZES = {
    "vocab_size": len(SPECIAL + WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# bitsandbytes stores 4-bit weights in blocks of 64, and some CPUs compute with 32 rows at a time.
BLOCK_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}


def chat_tokenizer():
    """One token per word; generated words come apart again."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **special)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_chat_model(folder, *, score=False, **sizes):
    """Write a LLaMA of a few thousand parameters and its tokenizer, the same at each call; return the folder.

    `score=True` gives it the head of a reward model in place of the language model's.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **sizes}, **({"num_labels": 1} if score else {}))
    (LlamaForSequenceClassification if score else LlamaForCausalLM)(config).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return str(folder)


def turn(role, i):
    """One message; what it says depends on `i` alone."""
    return {"role": role, "content": " ".join(WORDS[(7 * i + 5 * j) % len(WORDS)] for j in range(3))}


CHATS = [{"messages": [turn("user", i), turn("assistant", i + 1)]} for i in range(12)]
PROMPTS = [{"prompt": [turn("user", i)]} for i in range(12)]
PREFERENCES = [
    {**row, "chosen": [turn("assistant", i + 1)], "rejected": [turn("assistant", i + 2)]}
    for i, row in enumerate(PROMPTS)
]

# Rows as a plain Trainer takes them.
TOKEN_ROWS = [
    {"input_ids": row, "labels": row} for row in ([3 + (5 * i + 7 * j) % 29 for j in range(8)] for i in range(16))
]


def bits_and_bytes(kind):
    """What `from_pretrained` needs to quantise while loading: `int8`, `nf4`, `nf4_double`; nothing for other kinds."""
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    double = {**nf4, "bnb_4bit_use_double_quant": True}
    options = {"int8": {"load_in_8bit": True}, "nf4": nf4, "nf4_double": double}.get(kind)
    return {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": "cpu"}} if options else {}


def weights_of(model):
    """A copy of everything that the model holds: weights, adapters, and the codes and scales of quantised weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(after, before):
    """The names of the tensors that are no longer the same, bit for bit."""
    assert after.keys() == before.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}

"""Token blocks for `pretrain.py`: a tokenizer by name or trained from the text, and packing without padding."""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

from datasets import Dataset, IterableDataset
from huggingface_hub.constants import HF_HOME
from pretraining_text import DataArguments, Documents, InputError, as_sentence, load_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
TOKENIZER_DOCUMENTS = 20_000  # documents that a new tokenizer is trained on: about 43 MB of C4


def load_tokenizer(args: DataArguments, documents: Documents, vocab_size: int) -> PreTrainedTokenizerBase:
    """Load `tokenizer_name`, or train a byte-level BPE on the documents and keep it in the Hugging Face cache."""
    if args.tokenizer_name:
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
        except (OSError, ValueError) as error:
            raise InputError(
                f"Cannot load the tokenizer {args.tokenizer_name!r}: {as_sentence(error)} "
                "Leave tokenizer_name out to train one from the data."
            ) from error
        if tokenizer.eos_token is None:
            raise InputError(f"The tokenizer {args.tokenizer_name!r} has no end-of-sequence token to part documents.")
        return tokenizer
    vocab_size = args.vocab_size or vocab_size
    if vocab_size <= 256:
        raise InputError(f"Got vocab_size={vocab_size}, expected more than the 256 bytes and one end-of-text token.")
    sample = [document["text"] for document in islice(documents, TOKENIZER_DOCUMENTS)]
    key = hashlib.sha256("\0".join([str(vocab_size), *sample]).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    file = Path(HF_HOME) / "hf_stateless" / "tokenizers" / f"{key}.json"
    if not file.exists():
        _train_tokenizer(sample, vocab_size, file)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def pack(documents: Documents, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Documents:
    """Tokenize documents, join them with the end-of-sequence token and cut blocks of `block_size` tokens."""
    options = {"desc": "Tokenizing"} if isinstance(documents, Dataset) else {}
    return documents.map(
        _tokenize_and_pack,
        batched=True,
        remove_columns=["text"],
        fn_kwargs={"tokenizer": tokenizer, "block_size": block_size},
        **options,
    )


def load_blocks(args: DataArguments, vocab_size: int) -> tuple[Documents, Dataset, PreTrainedTokenizerBase]:
    """Return (train blocks, held-out blocks, tokenizer) as the Trainer takes them."""
    train, held_out = load_documents(args)
    tokenizer = load_tokenizer(args, train, vocab_size)
    train_blocks = pack(train, tokenizer, args.block_size)
    held_out_blocks = pack(held_out, tokenizer, args.block_size)
    limit = max(1, args.max_eval_tokens // args.block_size)
    if isinstance(held_out_blocks, IterableDataset):
        held_out_blocks = Dataset.from_list(list(held_out_blocks.take(limit)))
    elif len(held_out_blocks) > limit:  # evenly spaced: a part of every document
        held_out_blocks = held_out_blocks.select([i * len(held_out_blocks) // limit for i in range(limit)])
    for name, blocks in (("train", train_blocks), ("held-out", held_out_blocks)):
        if isinstance(blocks, Dataset) and len(blocks) == 0:
            raise InputError(
                f"The {name} text is shorter than one block of {args.block_size} tokens: "
                "give more text, or lower --block_size."
            )
    return train_blocks, held_out_blocks, tokenizer


def _tokenize_and_pack(batch: dict, tokenizer: PreTrainedTokenizerBase, block_size: int) -> dict:
    # verbose=False: a document longer than the tokenizer's maximum is cut into blocks, so that warning misleads.
    documents = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
    tokens = list(chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in documents["input_ids"]))
    blocks = [tokens[start : start + block_size] for start in range(0, len(tokens) - block_size + 1, block_size)]
    return {"input_ids": blocks, "labels": blocks}


def _train_tokenizer(texts: Iterable[str], vocab_size: int, file: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Another run may be writing the same tokenizer: a rename makes the file appear whole or not at all.
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        tokenizer.save(os.path.join(folder, file.name))
        os.replace(os.path.join(folder, file.name), file)

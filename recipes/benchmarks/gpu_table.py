"""The largest model of a list that trains on each size of GPU, with AdamW, and with SWAN and SinkGD, bf16 and 8 bits.

    python recipes/benchmarks/gpu_table.py --output recipes/benchmarks/results/gpu-table.json
    python recipes/benchmarks/gpu_table.py --report recipes/benchmarks/results/gpu-table.json

Every weight is trained, on one GPU: one sequence of 2048 tokens, bf16, activation checkpointing. The peaks are
predicted, as `hf-stateless memory` does it, from the shapes below; nothing is downloaded or allocated. A model fits
where its peak and 1 GiB for the CUDA context stay below 90 % of the card's memory. Two tables are printed: that of
`swan_layerwise` stands in README.md, that of `sinkgd_layerwise` in hf_stateless/weights/README.md.

SWAN leaves embeddings and heads to AdamW: whitening matrices as large as these takes about the memory of its moments.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from result_files import write_results
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

import hf_stateless
from hf_stateless.reports.files import GIB
from hf_stateless.reports.predicted import Settings, build_model, estimate
from hf_stateless.reports.predicted.table import CONTEXT_BYTES, USABLE_SHARE, fits


CARDS = (8, 12, 16, 24, 32, 48, 80)
SEQUENCE = 2048
# Class of the config; hidden and intermediate size, layers, heads, key and value heads, vocabulary, tied embeddings.
MODELS: dict[str, tuple[type[PreTrainedConfig], int, int, int, int, int, int, bool]] = {
    "Qwen2.5-0.5B": (Qwen2Config, 896, 4864, 24, 14, 2, 151936, True),
    "Llama-3.2-1B": (LlamaConfig, 2048, 8192, 16, 32, 8, 128256, True),
    "LLaMA-1.3B": (LlamaConfig, 2048, 5461, 24, 32, 32, 32000, False),
    "Qwen2.5-1.5B": (Qwen2Config, 1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": (Qwen2Config, 2048, 11008, 36, 16, 2, 151936, True),
    "Llama-3.2-3B": (LlamaConfig, 3072, 8192, 28, 24, 8, 128256, True),
    "Llama-2-7B": (LlamaConfig, 4096, 11008, 32, 32, 32, 32000, False),
    "Llama-3.1-8B": (LlamaConfig, 4096, 14336, 32, 32, 8, 128256, False),
    "Llama-2-13B": (LlamaConfig, 5120, 13824, 40, 40, 40, 32000, False),
    "Qwen2.5-14B": (Qwen2Config, 5120, 13824, 48, 40, 8, 152064, False),
    "Qwen2.5-32B": (Qwen2Config, 5120, 27648, 64, 40, 8, 152064, False),
    "Llama-3.1-70B": (LlamaConfig, 8192, 28672, 80, 64, 8, 128256, False),
}
# Title of a column: optimizer, and how weights are stored.
WAYS: dict[str, tuple[str, str]] = {
    "AdamW, bf16": ("adamw_torch_fused", "bf16"),
    "`swan_layerwise`, bf16": ("swan_layerwise", "bf16"),
    "`swan_layerwise`, int8": ("swan_layerwise", "int8"),
    "`sinkgd_layerwise`, bf16": ("sinkgd_layerwise", "bf16"),
    "`sinkgd_layerwise`, int8": ("sinkgd_layerwise", "int8"),
}
OPTIM_ARGS = {
    "adamw_torch_fused": {},
    "swan_layerwise": {"release": "all"},
    "sinkgd_layerwise": {"embeddings": "row_moment", "release": "all"},
}


def config_of(name: str) -> PreTrainedConfig:
    """Return the config of a model of the list."""
    kind, hidden, intermediate, layers, heads, key_value_heads, vocabulary, tied = MODELS[name]
    return kind(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=SEQUENCE,
        architectures=[kind.__name__.replace("Config", "ForCausalLM")],
    )


def predict(name: str) -> dict[str, Any]:
    """Return the number of parameters of a model, and its predicted peaks in bytes."""
    peaks, parameters = {}, 0
    for dtype in ("int8", "bf16"):
        settings = Settings(dtype=dtype, seq=SEQUENCE, checkpointing=True)
        model = build_model(config_of(name), settings)
        parameters = sum(p.numel() for p in model.parameters())  # in the end those of bf16, without scales
        for way, (optim, stored) in WAYS.items():
            if stored == dtype:
                peaks[way] = estimate(model, [optim], settings, OPTIM_ARGS[optim])[0].peak
    return {"parameters": parameters, "peaks": {way: peaks[way] for way in WAYS}}


def table(models: dict[str, dict[str, Any]], optimizer: str) -> str:
    """Render a Markdown table of AdamW and one of ours: for each card the model with most parameters that fits."""
    ways = [way for way, (optim, _) in WAYS.items() if optim in ("adamw_torch_fused", optimizer)]
    lines = ["| GPU | " + " | ".join(ways) + " |", "|---|" + "---|" * len(ways)]
    by_size = sorted(models, key=lambda name: models[name]["parameters"])
    for gib in CARDS:
        cells = []
        for way in ways:
            fitting = [name for name in by_size if fits(models[name]["peaks"][way], gib)]
            cells.append(f"{fitting[-1]} ({models[fitting[-1]]['peaks'][way] / GIB:.1f})" if fitting else "none")
        lines.append(f"| {gib} GiB | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(models: dict[str, dict[str, Any]]) -> str:
    """Render the table of each optimizer of this package."""
    return "\n\n".join(table(models, optim) for optim in OPTIM_ARGS if optim.endswith("_layerwise"))


def main() -> None:
    """Parse the command line; predict and write, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the predictions as JSON")
    parser.add_argument("--report", type=Path, help="print the table of such a file")
    args = parser.parse_args()
    if args.report:
        print(tables(json.loads(args.report.read_text())["models"]))
        return
    models = {}
    for name in MODELS:
        print(f"{name} ...", flush=True)
        models[name] = predict(name)
    print(tables(models))
    if args.output:
        setup = {
            "how": f"predicted; batch 1 x {SEQUENCE}, activation checkpointing, every weight trained",
            "margin": {"usable_share": USABLE_SHARE, "context_bytes": CONTEXT_BYTES},
            "optim_args": OPTIM_ARGS,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_stateless": hf_stateless.__version__,
        }
        write_results(args.output, setup, models=models)


if __name__ == "__main__":
    main()

"""The cases of `bits.py`, as rows of data."""

from typing import Any

from bits_models import Case


def chain(name: str, norms: str, **options: Any) -> Case:
    """Return the case of a chain of norms."""
    return Case(name, "llama", "multinorm", {"norms": norms.split("+"), **options})


def by_hand(name: str, *groups: dict[str, Any], way: str = "groups", **values: Any) -> Case:
    """Return a case of parameter groups that no model made."""
    return Case(name, "", options={"groups": list(groups)}, way=way, **values)


DECAY = {"weight_decay": 0.1}
STATELESS = {"embeddings": "stateless"}
SINKHORN = {"embeddings": "sinkhorn_momentum"}
FLOAT_MOMENTUM = {"momentum": 0.9, "momentum_dtype": "float32"}
ADAPTER = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 8}
NO_CLIPPING = {"max_grad_norm": 0.0}
ALL = {"release": "all"}
NO_KERNELS = {"HF_STATELESS_KERNELS": "torch"}
HUGE = (65600, 256)  # a few rows above 2^24 entries, where SinkGD and AdamW begin to work in blocks
MULTI = {"algorithm": "multinorm"}
SWAN = {"norms": ("row_standardize", "spectral"), "num_iterations": 1}
VECTOR = {"norms": ("frobenius",), "num_iterations": 1, "layout": "vector"}
HUGE_SINKGD = {"shapes": [HUGE], **MULTI, "num_iterations": 2}
FUNCTION_CHAINS = ("row_l2+col_l2", "row_standardize+spectral", "row_l2+spectral", "row_l2+sign", "col_l2+frobenius")
NAMES = ("swan", "sinkgd", "multinorm")

CASES: tuple[Case, ...] = (
    *(Case(name, "llama", name, DECAY) for name in NAMES),
    *(Case(f"{name}-layerwise", "llama", f"{name}_layerwise") for name in NAMES),
    *(Case(f"{name}-layerwise-all", "llama", f"{name}_layerwise", {**ALL, **DECAY}) for name in NAMES),
    *(Case(f"{name}-bfloat16", "llama", name, DECAY, "bfloat16") for name in NAMES),
    *(Case(f"{name}-int8", "llama", name, DECAY, "int8") for name in NAMES),
    *(Case(f"{name}-wide", "wide", name) for name in NAMES),
    *(Case(f"{name}-wide-bfloat16", "wide", name, DECAY, "bfloat16") for name in NAMES),
    *(Case(f"{name}-gpt2", "gpt2", name, DECAY) for name in NAMES),
    *(Case(f"{name}-mixtral", "mixtral", name) for name in NAMES),
    # Chains of norms.
    chain("chain-row-spectral-3", "row_l2+spectral", num_iterations=3),
    chain("chain-row-sign", "row_l2+sign"),
    chain("chain-row", "row_l2"),
    chain("chain-col", "col_l2"),
    chain("chain-col-row", "col_l2+row_l2", num_iterations=3),
    chain("chain-row-col", "row_l2+col_l2", num_iterations=2),
    chain("chain-row-col-sign", "row_l2+col_l2+sign", num_iterations=2),
    chain("chain-sign", "sign"),
    chain("chain-frobenius", "frobenius"),
    chain("chain-standardize-col", "row_standardize+col_l2", num_iterations=2),
    chain("chain-standardize-col-spectral", "row_standardize+col_l2+spectral"),
    chain("chain-spectral", "spectral"),
    chain("chain-spectral-col", "spectral+col_l2", num_iterations=2),
    # Options.
    Case("sinkgd-1-iteration", "llama", "sinkgd", {"num_iterations": 1}),
    Case("sinkgd-1-iteration-wide", "wide", "sinkgd", {"num_iterations": 1}),
    Case("sinkgd-lr-scale", "llama", "sinkgd", {"lr_scale": 0.3, **STATELESS}),
    Case("swan-no-center", "llama", "swan", {"center": False}),
    Case("swan-2-iterations", "llama", "swan", {"num_iterations": 2}),
    Case("swan-nsds", "llama", "swan", {"whitening": "nsds", "ns_steps": 3}),
    Case("swan-eigh", "llama", "swan", {"whitening": "eigh"}),
    Case("swan-polar-express", "llama", "swan", {"whitening": "polar_express"}),
    Case("swan-polar-express-9", "llama", "swan", {"whitening": "polar_express", "ns_steps": 9}, "bfloat16"),
    Case("swan-ns-steps", "llama", "swan", {"ns_steps": 5, "ns_beta": 0.5}),
    Case("swan-ns-steps-wide", "wide", "swan", {"ns_steps": 5}),
    Case("swan-ns-beta-wide", "wide", "swan", {"ns_beta": 0.5}),
    Case("swan-float16-products", "llama", "swan", {"ns_dtype": "float16"}),
    Case("sinkgd-adamw-8bit", "llama", "sinkgd", {"embeddings": "adamw_8bit"}),
    Case("sinkgd-adamw-8bit-bfloat16", "wide", "sinkgd", {"embeddings": "adamw_8bit", **DECAY}, "bfloat16"),
    Case("sinkgd-stateless", "llama", "sinkgd", {**STATELESS, **DECAY}),
    Case("swan-stateless-bfloat16", "llama_tied", "swan", STATELESS, "bfloat16"),
    Case("swan-stateless-layerwise", "gpt2", "swan_layerwise", {**STATELESS, **ALL}),
    Case("sinkgd-sinkhorn-momentum", "llama", "sinkgd", {**SINKHORN, **DECAY}),
    Case("sinkgd-sinkhorn-momentum-bfloat16", "gpt2", "sinkgd", SINKHORN, "bfloat16"),
    Case("swan-adamw-options", "llama", "swan", {"adamw_lr": 0.01, "adamw_beta1": 0.8, "adamw_beta2": 0.95}),
    Case("swan-adamw-eps", "llama", "swan", {"adamw_eps": 1e-4}, "bfloat16"),
    Case("sinkgd-nearest", "llama", "sinkgd", {"stochastic_rounding": False}, "bfloat16"),
    Case("sinkgd-nearest-int8", "llama", "sinkgd", {"stochastic_rounding": False}, "int8"),
    Case("sinkgd-nearest-wide", "wide", "sinkgd", {"stochastic_rounding": False}, "bfloat16"),
    Case("sinkgd-seed", "llama", "sinkgd", {"seed": 7}, "bfloat16"),
    Case("sinkgd-min-signal", "llama", "sinkgd", {"min_signal": 0.5}, steps=21),
    Case("swan-min-signal-momentum", "llama", "swan", {"min_signal": 0.5, "momentum": 0.9}, steps=21),
    Case("swan-momentum", "llama", "swan", {"momentum": 0.9}),
    Case("swan-momentum-bfloat16", "llama", "swan", {"momentum": 0.9, "momentum_dtype": "bfloat16"}, "bfloat16"),
    Case("swan-momentum-float32", "llama", "swan", {"momentum": 0.8, "momentum_dtype": "float32"}),
    Case("sinkgd-momentum-int8-weights", "llama", "sinkgd", {"momentum": 0.9}, "int8"),
    Case("sinkgd-momentum-nearest", "gpt2", "sinkgd", {"momentum": 0.9, "stochastic_rounding": False}),
    Case("sinkgd-momentum-wide", "wide", "sinkgd", {"momentum": 0.9}),
    Case("sinkgd-momentum-moe", "qwen3_moe", "sinkgd", {"momentum": 0.9}, "bfloat16"),
    Case("sinkgd-momentum-layerwise", "llama", "sinkgd_layerwise", {"momentum": 0.9}),
    Case("swan-width-spectral", "llama", "swan", {"width_rule": "spectral"}),
    Case("sinkgd-width-fan-in", "gpt2", "sinkgd", {"width_rule": "fan_in", **STATELESS}),
    Case("sinkgd-targets", "llama", "sinkgd", {"target_modules": ["q_proj", "lm_head"]}),
    Case("swan-split-alone", "llama", "swan", {"split_whitening": True}),
    # Models, dtypes and ways to call.
    Case("swan-tied", "llama_tied", "swan", DECAY),
    Case("sinkgd-tied-layerwise", "llama_tied", "sinkgd_layerwise", ALL, "bfloat16"),
    Case("sinkgd-gpt2-wide", "gpt2_wide", "sinkgd", DECAY, "bfloat16"),
    Case("sinkgd-gpt2-layerwise", "gpt2", "sinkgd_layerwise", {}, "bfloat16"),
    Case("swan-gpt-oss", "gpt_oss", "swan"),
    Case("sinkgd-gpt-oss", "gpt_oss", "sinkgd", DECAY, "bfloat16"),
    Case("sinkgd-qwen3-moe-layerwise", "qwen3_moe", "sinkgd_layerwise"),
    Case("swan-t5", "t5", "swan"),
    Case("sinkgd-bert", "bert", "sinkgd", DECAY),
    Case("swan-vit-convolution", "vit", "swan", {"target_modules": ["projection", "q_proj", "fc1"]}),
    Case("sinkgd-float64", "llama", "sinkgd", {}, "float64"),
    Case("swan-float16", "llama", "swan", {}, "float16"),
    Case("sinkgd-int8-layerwise", "llama", "sinkgd_layerwise", {**STATELESS, **ALL}, "int8"),
    Case("swan-int8-wide", "wide", "swan", DECAY, "int8"),
    Case("sinkgd-int8-wide-momentum", "wide", "sinkgd", {"momentum": 0.9}, "int8"),
    Case("sinkgd-wide-no-kernels", "wide", "sinkgd", environment=NO_KERNELS),
    Case("sinkgd-accumulated", "llama", "sinkgd", accumulate=2),
    Case("sinkgd-hold-layerwise", "llama", "sinkgd_layerwise", ALL, accumulate=2),
    Case("sinkgd-nan", "llama", "sinkgd", spoil="nan"),
    Case("swan-nan-momentum", "llama", "swan", {"momentum": 0.9}, spoil="nan"),
    Case("sinkgd-nan-wide", "wide", "sinkgd", {}, "bfloat16", spoil="nan"),
    Case("swan-zero", "llama", "swan", {"momentum": 0.9, **DECAY}, spoil="zero"),
    Case("sinkgd-missing", "llama", "sinkgd", DECAY, spoil="missing"),
    # LoRA.
    Case("lora-separate", "llama", "swan", {}, lora=ADAPTER, way="lora"),
    Case("lora-product", "llama", "swan", {"lora": "product"}, lora=ADAPTER, way="lora"),
    Case("lora-product-sinkgd", "llama", "sinkgd", {"lora": "product", **DECAY}, "bfloat16", lora=ADAPTER, way="lora"),
    Case("lora-product-layerwise", "llama", "swan_layerwise", {"lora": "product"}, lora=ADAPTER, way="lora"),
    Case("lora-product-nan", "llama", "swan", {"lora": "product"}, lora=ADAPTER, way="lora", spoil="nan"),
    Case("lora-rank-stabilised", "llama", "multinorm", {"lora": "product"}, lora={**ADAPTER, "use_rslora": True}),
    Case("lora-dora", "llama", "sinkgd", {"momentum": 0.9}, lora={**ADAPTER, "use_dora": True}),
    Case(
        "lora-gpt2", "gpt2", "sinkgd", {"lora": "product"}, lora={"target_modules": ["c_attn"], "fan_in_fan_out": True}
    ),
    Case("lora-over-int8", "llama", "sinkgd", {}, "int8", lora=ADAPTER),
    Case(
        "lora-embedding",
        "llama",
        "sinkgd",
        {"lora": "product", **STATELESS},
        lora={"target_modules": ["embed_tokens", "q_proj"]},
    ),
    # Groups made by hand.
    by_hand(
        "groups-layouts",
        {"shapes": [(6, 4, 3, 3)], **MULTI, "layout": "conv"},
        {"shapes": [(6, 4, 3, 3)], **MULTI, **SWAN, "layout": "conv"},
        {"shapes": [(3, 10, 7), (3, 10, 7)], **MULTI, "layout": "in_out", **DECAY},
        {"shapes": [(7,)], **MULTI, **VECTOR},
        {"shapes": [(1, 7), (7, 1), (1, 1)], **MULTI, **SWAN},
    ),
    by_hand(
        "groups-algorithms",
        {"shapes": [(9, 14), (9, 14)], **MULTI, "seed": 3},
        {"shapes": [(4, 16), (8, 4), (4, 16), (8, 4)], "algorithm": "lora_product", "scaling": 2.0},
        {"shapes": [(31, 6), (5,), (9,)], "algorithm": "adamw", "betas": (0.8, 0.9), **DECAY},
        {"shapes": [(3, 300)], "algorithm": "adamw_8bit"},
        {"shapes": [(31, 6)], "algorithm": "sinkhorn_momentum", "momentum": 0.8},
        dtype="bfloat16",
    ),
    by_hand(
        "groups-turned",
        {"shapes": [(9, 14), (9, 14)], **MULTI, "turned": True},
        {"shapes": [(9, 14)], **MULTI, "norms": ("spectral",), "turned": True, "momentum": 0.9},
        {"shapes": [(31, 6)], "algorithm": "adamw", "turned": True},
        {"shapes": [(31, 6)], "algorithm": "sinkhorn_momentum", "turned": True},
        dtype="bfloat16",
    ),
    by_hand("groups-huge-sinkgd", HUGE_SINKGD, dtype="bfloat16"),
    by_hand("groups-huge-no-kernels", HUGE_SINKGD, dtype="bfloat16", environment=NO_KERNELS),
    by_hand("groups-huge-adamw", {"shapes": [HUGE], "algorithm": "adamw"}, dtype="bfloat16"),
    by_hand("groups-large-momentum", {"shapes": [(2048, 2112)], **MULTI, "momentum": 0.9}),
    # Without an optimizer.
    *(Case(f"function-{norms}", "", options={"norms": norms.split("+")}, way="function") for norms in FUNCTION_CHAINS),
    Case("quantized", "llama", options={"group_size": 16}, dtype="bfloat16", way="quantized"),
    # Another optimizer goes on from the state.
    Case("then-float-momentum", "llama", "swan", {"momentum": 0.9}, then=FLOAT_MOMENTUM),
    Case("then-int8-momentum", "gpt2", "sinkgd", FLOAT_MOMENTUM, then={"momentum_dtype": "int8"}),
    Case("then-no-momentum", "llama", "swan", {"momentum": 0.9}, then={"momentum": 0.0, "num_iterations": 2}),
    Case("then-product", "llama", "swan", {}, lora=ADAPTER, then={"lora": "product"}),
    # Trainer on one process.
    *(Case(f"trainer-{name}", "llama", name, DECAY, way="trainer") for name in NAMES),
    Case("trainer-accumulated", "llama", "sinkgd", {}, way="trainer", trainer={"gradient_accumulation_steps": 2}),
    Case("trainer-layerwise", "llama", "swan_layerwise", {}, way="trainer", trainer={"gradient_checkpointing": True}),
    Case(
        "trainer-layerwise-all",
        "llama",
        "sinkgd_layerwise",
        {**ALL, **STATELESS},
        "int8",
        way="trainer",
        trainer=NO_CLIPPING,
    ),
    Case(
        "trainer-layerwise-accumulated",
        "gpt2",
        "sinkgd_layerwise",
        {},
        way="trainer",
        trainer={"gradient_accumulation_steps": 2},
    ),
    Case("trainer-layerwise-broad", "broad", "sinkgd_layerwise", {}, "bfloat16", way="trainer"),
    Case("trainer-momentum", "llama", "swan", {"momentum": 0.9, "adamw_lr": 0.01}, "bfloat16", way="trainer"),
    Case("trainer-autocast", "llama", "sinkgd", SINKHORN, way="trainer", trainer={"bf16": True, "adam_beta2": 0.95}),
    Case(
        "trainer-chain",
        "llama_tied",
        "multinorm",
        {"norms": ["row_l2", "spectral"], "num_iterations": 2, "target_modules": "all-linear"},
        way="trainer",
    ),
    Case("trainer-lora", "llama", "swan", {"lora": "product"}, lora=ADAPTER, way="trainer"),
    Case("trainer-factory", "llama", "SwanFactory", DECAY, way="trainer"),
    # Two ranks.
    *(Case(f"ddp-{name}", "odd", name, DECAY, way="ddp") for name in NAMES),
    Case("ddp-split", "odd", "swan", {"split_whitening": True, **STATELESS}, way="ddp"),
    Case("ddp-split-wide", "wide", "swan", {"split_whitening": True, "momentum": 0.9}, "bfloat16", way="ddp"),
    Case("ddp-min-signal", "odd", "sinkgd", {"min_signal": 0.5}, way="ddp", steps=21),
    Case("ddp-int8", "odd", "sinkgd", SINKHORN, "int8", way="ddp"),
    Case("ddp-layerwise", "odd_tied", "swan_layerwise", {"momentum": 0.9}, "bfloat16", way="ddp"),
    Case("ddp-layerwise-all", "gpt2", "sinkgd_layerwise", {**ALL, **DECAY}, way="ddp"),
    *(Case(f"fsdp2-{name}", "odd", name, DECAY, way="fsdp2") for name in NAMES),
    Case("fsdp2-wide", "wide", "swan", STATELESS, "bfloat16", way="fsdp2"),
    Case("fsdp2-momentum", "odd", "swan", FLOAT_MOMENTUM, way="fsdp2"),
    Case("fsdp2-momentum-int8", "odd", "sinkgd", {"momentum": 0.9}, "bfloat16", way="fsdp2"),
    Case("fsdp2-stateless", "odd", "sinkgd", STATELESS, "bfloat16", way="fsdp2"),
    Case("fsdp2-sinkhorn-momentum", "odd_tied", "sinkgd", {**SINKHORN, **DECAY}, way="fsdp2"),
    Case("fsdp2-adamw-8bit", "odd", "sinkgd", {"embeddings": "adamw_8bit"}, way="fsdp2"),
    Case("fsdp2-local-chain", "odd", "multinorm", {"norms": ["row_l2", "sign"], "width_rule": "fan_in"}, way="fsdp2"),
    Case("fsdp2-moe", "qwen3_moe", "sinkgd", {}, way="fsdp2"),
    Case("fsdp2-min-signal", "odd", "swan", {"min_signal": 0.5}, way="fsdp2", steps=21),
    Case("fsdp2-layerwise", "odd", "sinkgd_layerwise", {}, way="fsdp2"),
    Case("fsdp2-layerwise-all", "odd", "swan_layerwise", {**ALL, **FLOAT_MOMENTUM}, way="fsdp2"),
    *(
        by_hand(
            f"sharded-{cut}",
            {"cut": cut, "shapes": [(9, 14), (9, 14), (1, 6)], **MULTI, **DECAY},
            {"cut": cut, "shapes": [(9, 14), (9, 14), (9, 14)], **MULTI, **SWAN},
            {"cut": cut, "shapes": [(9, 14)], **MULTI, "layout": "in_out", **FLOAT_MOMENTUM},
            {"cut": cut, "shapes": [(3, 10, 7)], **MULTI},
            {"cut": cut, "shapes": [(9, 14)], **MULTI, "norms": ("col_l2",), "num_iterations": 1},
            {"cut": cut, "shapes": [(6, 4, 3, 3)], **MULTI, "layout": "conv", "norms": ("spectral",)},
            {"cut": cut, "shapes": [(4, 16), (8, 4)], "algorithm": "lora_product"},
            {"cut": cut, "shapes": [(31, 6), (1, 6)], "algorithm": "sinkhorn_momentum"},
            {"cut": cut, "shapes": [(31, 6)], "algorithm": "adamw"},
            way="sharded",
        )
        for cut in (0, 1, None)
    ),
    by_hand(
        "sharded-bfloat16",
        {"cut": 0, "shapes": [(9, 14), (9, 14), (1, 6)], **MULTI},
        {"cut": 0, "shapes": [(1, 6), (9, 14)], **MULTI, "norms": ("spectral",)},
        {"cut": 0, "shapes": [(31, 6), (1, 6)], "algorithm": "adamw"},
        {"cut": 0, "shapes": [(7,), (1,)], **MULTI, **VECTOR},
        way="sharded",
        dtype="bfloat16",
    ),
    Case("trainer-ddp-split", "odd", "swan", {}, way="trainer_ddp"),
    Case("trainer-ddp-not-split", "odd", "multinorm", {"split_whitening": False}, way="trainer_ddp"),
    Case(
        "trainer-ddp-layerwise",
        "odd",
        "sinkgd_layerwise",
        {},
        "bfloat16",
        way="trainer_ddp",
        trainer={"gradient_accumulation_steps": 2},
    ),
    Case("trainer-fsdp2", "odd", "sinkgd", DECAY, way="trainer_fsdp2"),
    Case("trainer-fsdp2-layerwise", "odd", "swan_layerwise", SINKHORN, way="trainer_fsdp2"),
)

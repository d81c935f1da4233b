"""What the processes of `test_int8_parallel.py` do: tiny 8-bit models that transformers cuts while it loads them."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import distributed_worker
import torch
from parallel_models import MODELS, NEWER, RATES, SIZES, VOCAB, load, train
from rank_checkpoints import load_full, load_sharded, save_full, save_sharded, whole_state
from rank_processes import announce_rank, errors_of, joined
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import Trainer, TrainingArguments

from hf_stateless import Int8TrainingConfig, create_optimizer, dequantize
from hf_stateless.ranks.placement import local_shard, part_of
from hf_stateless.weights.int8.convert import int8_weights


TP, EP = {"tp_plan": "auto"}, {"tp_size": 2, "ep_size": 2}
# Four ranks have a head each, and a group of each row.
GROUP = 8
TOKENS = 61 if NEWER else 64  # which 5.17 wants to be a multiple of the ranks
OWN_SIZES = {
    "llama": {"intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 8, "attention_bias": NEWER},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_key_value_heads": 4},
    "gpt_oss": {"intermediate_size": 32, "num_key_value_heads": 4},
}
# Sizes of which two ranks have whole groups of 128, for which predictions are made.
WIDE = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 1, "num_key_value_heads": 4}
WIDE |= {"vocab_size": 64, "num_attention_heads": 4}
PREDICTED = {
    "llama": {**WIDE, "intermediate_size": 512},
    "qwen3_moe": {**WIDE, "moe_intermediate_size": 256},
}
PREDICTED_PLANS = {"llama": TP, "qwen3_moe": EP if NEWER else TP}
TABLES = {"embeddings": "factored"}
# What one process saves, in both layouts, and how others cut it.
SAVED = {"llama": TP, "qwen3_moe": EP if NEWER else TP}
# Steps on gradients of whole numbers, which all ranks know: the model, its plan, the optimizer and its options.
GIVEN = {
    "llama, tp, swan": ("llama", TP, "swan", {}),
    "llama, tp, sinkgd_polar": ("llama", TP, "sinkgd_polar", {}),
    "llama, tp, sinkgd": ("llama", TP, "sinkgd", {}),
    "llama, tp, momentum": ("llama", TP, "swan", {"momentum": 0.5, "momentum_dtype": "float32"}),
    "llama, tp, to nearest": ("llama", TP, "swan", {"stochastic_rounding": False}),
    "llama, tp, tables": ("llama", TP, "swan", TABLES),
    "qwen3_moe, tp, swan": ("qwen3_moe", TP, "swan", {}),
    "qwen3_moe, tp, sinkgd": ("qwen3_moe", TP, "sinkgd", {}),
    "qwen3_moe, ep, sinkgd": ("qwen3_moe", EP, "sinkgd", {}),
    "gpt_oss, ep, swan": ("gpt_oss", EP, "swan", {}),
}
ON_FOUR = ("llama, tp, swan", "llama, tp, sinkgd", "llama, tp, tables", "qwen3_moe, tp, swan")
# Training by forward and backward: the model, its plan, the optimizer and its options.
TRAINED = {
    "llama, tp, swan_layerwise": ("llama", TP, "swan_layerwise", {}),
    "llama, tp, sinkgd with tables": ("llama", TP, "sinkgd", TABLES),
    "qwen3_moe, tp, sinkgd_layerwise": ("qwen3_moe", TP, "sinkgd_layerwise", {}),
    "qwen3_moe, ep, sinkgd": ("qwen3_moe", EP, "sinkgd", TABLES),
    "gpt_oss, ep, swan": ("gpt_oss", EP, "swan", {}),
}
STEPS = 3


def known(cases):
    """Of cases, those that this transformers has a way for."""
    return {case: given for case, given in cases.items() if NEWER or given[1] == TP}


def save_models(folder):
    """Write a float model of each kind."""
    for kind, own in OWN_SIZES.items():
        model, config, sizes = MODELS[kind]
        torch.manual_seed(0)
        model(config(**{**SIZES, **sizes, **own, "vocab_size": TOKENS})).save_pretrained(Path(folder) / kind)
        if kind in PREDICTED:
            model(config(**{**SIZES, **sizes, **PREDICTED[kind]})).save_pretrained(Path(folder) / f"predicted {kind}")
    return Path(folder)


def in_8_bits(folder, kind, plan=None, group_size=GROUP, **options):
    config = Int8TrainingConfig(group_size=group_size, **options)
    return load(folder, kind, plan, quantization_config=config)


def given_gradients(model, step):
    """Give each parameter small whole numbers, of a tensor that is cut this rank's part."""
    for number, p in enumerate(p for p in model.parameters() if p.requires_grad):
        generator = torch.Generator().manual_seed(1000 * step + number)
        whole = torch.randint(-2, 3, p.shape, generator=generator).to(p.dtype)
        p.grad = whole
        if isinstance(p, DTensor):
            place = {"shape": whole.shape, "stride": whole.stride(), "run_check": False}
            p.grad = DTensor.from_local(part_of(whole, p).contiguous(), p.device_mesh, p.placements, **place)


def take_steps(model, name, options, first=0, last=STEPS, optimizer=None):
    """Take steps on given gradients; return the optimizer."""
    optimizer = optimizer or create_optimizer(model, name, **RATES, **options)
    for step in range(first, last):
        optimizer.train()
        given_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def run_given(folder, case, plan=None):
    kind, _, name, options = GIVEN[case]
    model = in_8_bits(folder, kind, plan, embeddings="embeddings" in options)
    take_steps(model, name, options)
    return model


def run_trained(folder, case, plan=None):
    kind, _, name, options = TRAINED[case]
    model = in_8_bits(folder, kind, plan, embeddings="embeddings" in options)
    train(model, name, STEPS, **options)
    return model


def worker(world, folder, rank, out):
    """Do everything that needs several processes, and save what came of it."""
    announce_rank(rank, world)
    folder = Path(folder)
    with joined(rank, out, world) as save:
        results = {"given": {}, "trained": {}}
        for case, (_, plan, *_) in known(GIVEN).items():
            if world == 2 or case in ON_FOUR:
                model = run_given(folder, case, plan)
                results["given"][case] = whole_state(model)
                model.save_pretrained(folder / f"{case} on {world}")
        for case, (_, plan, *_) in known(TRAINED).items() if world == 2 else ():
            results["trained"][case] = whole_state(run_trained(folder, case, plan))
        results["loaded"] = reloaded(folder, world)
        results["resumed"] = resumed(folder, world)
        results["kept"] = kept(folder)
        if world == 2:
            results["sent"] = sent(folder)
            results["shapes"] = {kind: shapes(folder, kind) for kind in PREDICTED}
            results["absent"] = whole_state(run_absent(folder, rank))
            results["refused"] = refused(folder)
            distributed_worker.let_accelerate_shard_on_cpu()
            results["trainer"] = run_trainer(folder, TP)
        save(results)


def reloaded(folder, world):
    """Load what one process has saved, save it again, and go on with it."""
    states = {}
    for kind, plan in SAVED.items():
        plan = {name: world if name != "tp_plan" else value for name, value in plan.items()}
        model = load(folder, f"{kind} saved", plan, quantization_config=Int8TrainingConfig())
        model.save_pretrained(folder / f"{kind} saved again on {world}")
        take_steps(model, "swan", {}, first=STEPS, last=STEPS + 1)
        states[kind] = whole_state(model)
    return states


def save_alone(folder):
    """Write what one process has trained, and a model whose groups are too wide for two."""
    in_8_bits(folder, "llama", group_size=32).save_pretrained(Path(folder) / "wide")
    for kind in SAVED:
        model = in_8_bits(folder, kind)
        take_steps(model, "swan", {})
        model.save_pretrained(Path(folder) / f"{kind} saved")


def go_on_alone(folder, kind):
    model = load(folder, f"{kind} saved", quantization_config=Int8TrainingConfig())
    take_steps(model, "swan", {}, first=STEPS, last=STEPS + 1)
    return model.state_dict()


def resumed(folder, world):
    """Go on from a SHARDED checkpoint, and from the FULL one that two ranks have written.

    Not of stacks that are packed: torch's SHARDED checkpoints refuse how their rows are cut, of float weights too.
    """
    _, plan, name, options = GIVEN["llama, tp, tables"]

    def fresh():
        return in_8_bits(folder, "llama", plan, embeddings=True)

    model = fresh()
    optimizer = take_steps(model, name, options, last=1)
    save_sharded(model, optimizer, folder / f"sharded{world}")
    if world == 2:
        save_full(model, optimizer, folder / "full.pt")
    states = {}
    model = fresh()
    optimizer = create_optimizer(model, name, **RATES, **options)
    load_sharded(model, optimizer, folder / f"sharded{world}")
    take_steps(model, name, options, first=1, optimizer=optimizer)
    states["SHARDED"] = whole_state(model)
    model = fresh()
    optimizer = load_full(model, lambda made: create_optimizer(made, name, **RATES, **options), folder / "full.pt")
    take_steps(model, name, options, first=1, optimizer=optimizer)
    states["FULL of 2"] = whole_state(model)
    return states


def kept(folder):
    """The bytes of 8-bit weights that a rank has, by what reaches the optimizer."""
    counted = {}
    for kind in ("llama", "qwen3_moe"):
        model = in_8_bits(folder, kind, TP, embeddings=True)
        shards = [local_shard(p) for _, p in int8_weights(model)]
        counted[kind] = sum(t.untyped_storage().nbytes() for shard in shards for t in shard.stored)
    return counted


def shapes(folder, kind):
    """The shapes of what a rank has, in groups of 128."""
    model = in_8_bits(folder, f"predicted {kind}", PREDICTED_PLANS[kind], group_size=128)
    return {name: tuple(local_shard(p).shape) for name, p in model.named_parameters()}


def sent(folder):
    """How often a collective is called by the optimizer in a step."""
    counts = {}
    for kind, model in {"int8": in_8_bits(folder, "llama", TP), "float": load(folder, "llama", TP)}.items():
        optimizer = create_optimizer(model, "sinkgd", **RATES)
        given_gradients(model, 0)
        with CommDebugMode() as mode:
            optimizer.step()
        counts[kind] = {str(name).removeprefix("c10d."): n for name, n in mode.get_comm_counts().items()}
    return counts


ABSENT = ("layers.1.self_attn.q_proj.weight", *(("layers.0.mlp.experts.gate_up_proj",) if NEWER else ()))


def run_absent(folder, rank=None):
    """Of some weights the second rank has no gradient; on one process its part is zero."""
    model = in_8_bits(folder, "qwen3_moe", (EP if NEWER else TP) if rank is not None else None)
    optimizer = create_optimizer(model, "sinkgd", **RATES)
    for step in range(STEPS):
        optimizer.train()
        given_gradients(model, step)
        for name, p in model.named_parameters():
            if name.endswith(ABSENT) and rank is None:
                p.grad.narrow(0, p.shape[0] // 2, p.shape[0] // 2).zero_()
            elif name.endswith(ABSENT) and rank == 1:
                p.grad = None
        optimizer.step()
        optimizer.zero_grad()
    return model


def run_trainer(folder, plan=None):
    """Train with the Trainer, and save by it; return the norms that it logs with the state of the model."""
    distributed_worker.forget_accelerate()
    args = TrainingArguments(
        f"{folder}/out",
        optim="sinkgd_layerwise",
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = torch.randint(3, VOCAB, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(in_8_bits(folder, "llama", plan), args, train_dataset=data)
    with redirect_stdout(io.StringIO()):
        trainer.train()
    if NEWER:  # with 5.17 the Trainer has the first rank alone save, which waits for the others
        trainer.save_model(f"{folder}/by the trainer{' in parts' if plan else ''}")
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"norms": torch.tensor(norms), **whole_state(trainer.model)}


def refused(folder):
    """Return the errors of what cannot work."""
    packed = {"tp_size": 2, "tp_plan": {"model.layers.*.mlp.experts.gate_up_proj": "packed_rowwise"}}
    model = in_8_bits(folder, "llama", TP)
    fed = {"momentum": 0.5, "momentum_dtype": "float32", "rounding_feedback": True}
    acts = {
        "groups": lambda: in_8_bits(folder, "llama", TP, group_size=64),
        "rows": lambda: in_8_bits(folder, "llama", TP, group_size=None),
        "stored groups": lambda: load(folder, "wide", TP, quantization_config=Int8TrainingConfig()),
        "packed columns": lambda: in_8_bits(folder, "gpt_oss", packed),
        "fsdp": lambda: in_8_bits(folder, "llama", {"fsdp_size": 2}),
        "floats": lambda: dequantize(model),
        "int8 momentum": lambda: take_steps(model, "swan", {"momentum": 0.5}),
        "feedback": lambda: take_steps(model, "swan", fed),
    }
    return errors_of(acts)

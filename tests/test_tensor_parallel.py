"""Models that transformers cuts by tensor and expert parallelism, on gloo processes against one process."""

import io
import os
import time
from contextlib import redirect_stdout
from types import SimpleNamespace

import distributed_worker
import pytest
import torch
from parallel_models import (
    NEWER,
    RATES,
    VOCAB,
    backward,
    load,
    save_models,
    train,
    undone_cuts,
    weights_of,
)
from rank_processes import announce_rank, joined, on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import Trainer, TrainingArguments

import hf_stateless
from hf_stateless import create_optimizer
from hf_stateless.trainer.handler import handle


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

needs_newer = pytest.mark.skipif(not NEWER, reason="this transformers cuts by tensor parallelism alone")
TP, EP = {"tp_plan": "auto"}, {"tp_size": 2, "ep_size": 2}
EP_FSDP = {"fsdp_size": 2, "ep_size": 2}
# The model, how it is cut, the optimizer and the number of steps; under FSDP2 each rank has half of the tokens.
ON_TWO = {
    **{f"llama, tp, {name}": ("llama", TP, name, 3) for name in ("sinkgd_polar", "multinorm", "swan_layerwise")},
    "llama, tp, sinkgd": ("llama", TP, "sinkgd", 20),
    "llama, tp, swan": ("llama", TP, "swan", 3),
    "llama, tp, sinkgd_layerwise": ("llama", TP, "sinkgd_layerwise", 3),
    "qwen3_moe, tp, sinkgd": ("qwen3_moe", TP, "sinkgd", 3),
    "qwen3_moe, ep, sinkgd": ("qwen3_moe", EP, "sinkgd", 20),
    "qwen3_moe, ep, swan": ("qwen3_moe", EP, "swan", 3),
    "qwen3_moe, ep, sinkgd_layerwise": ("qwen3_moe", EP, "sinkgd_layerwise", 3),
    "qwen3_moe, ep and fsdp, swan": ("qwen3_moe", EP_FSDP, "swan", 3),
    "gpt_oss, tp, sinkgd": ("gpt_oss", TP, "sinkgd", 3),
    "gpt_oss, ep, sinkgd": ("gpt_oss", EP, "sinkgd", 3),
    "gpt_oss, ep, swan_layerwise": ("gpt_oss", EP, "swan_layerwise", 3),
}
FSDP_TP = {"fsdp_size": 2, "tp_size": 2}
ON_FOUR = {
    "llama_of_4_heads, tp, sinkgd": ("llama_of_4_heads", TP, "sinkgd", 20),
    "llama_of_4_heads, tp, swan": ("llama_of_4_heads", TP, "swan", 3),
    "qwen3_moe, ep and fsdp, sinkgd": ("qwen3_moe", {"fsdp_size": 4, "ep_size": 4}, "sinkgd", 20),
    "llama, fsdp and tp, sinkgd": ("llama", FSDP_TP, "sinkgd", 20),
    "llama, fsdp and tp, swan_layerwise": ("llama", FSDP_TP, "swan_layerwise", 3),
    "llama, replicas and tp, sinkgd": ("llama", {"dp_replicate_size": 2, "tp_size": 2}, "sinkgd", 3),
    "qwen3_moe, fsdp and tp, sinkgd": ("qwen3_moe", FSDP_TP, "sinkgd", 3),
    "qwen3_moe, fsdp, tp and ep, sinkgd": ("qwen3_moe", {**FSDP_TP, "ep_size": 2}, "sinkgd", 3),
    "qwen3_moe, fsdp, tp and wide ep, swan": ("qwen3_moe", {**FSDP_TP, "ep_size": 4}, "swan", 3),
}
PLANS = {"llama": TP, "qwen3_moe": EP}
# The same with two backward passes a step.
ACCUMULATED = {
    case: {**ON_TWO, **ON_FOUR}[case]
    for case in (
        "llama, tp, sinkgd_layerwise",
        "llama, tp, swan",
        "qwen3_moe, ep and fsdp, swan",
        "qwen3_moe, fsdp and tp, sinkgd",
        "llama, fsdp and tp, swan_layerwise",
    )
}
# The model, the optimizer with its options, and the parameters that have no gradient on one rank, or on none.
TO_MATRICES = ("layers.0.mlp.up_proj.weight", "layers.1.self_attn.o_proj.weight")
ABSENT = {
    "rows and columns, sinkgd": ("llama", "sinkgd", {}, TO_MATRICES),
    "rows and columns, swan": ("llama", "swan", {}, TO_MATRICES),
    "rows and columns, momentum": ("llama", "sinkgd", {"momentum": 0.9, "momentum_dtype": "float32"}, TO_MATRICES),
    "experts, sinkgd": ("qwen3_moe", "sinkgd", {}, ("layers.0.mlp.experts.gate_up_proj",)),
    "experts, multinorm": ("qwen3_moe", "multinorm", {}, ("layers.0.mlp.experts.gate_up_proj", "embed_tokens.weight")),
    **{
        f"a table, {name}": ("llama", "sinkgd", {"embeddings": name}, ("embed_tokens.weight",))
        for name in ("adamw", "row_moment")
    },
    "frozen on all": ("llama", "sinkgd", {}, ("layers.0.mlp.up_proj.weight", "embed_tokens.weight")),
}
TABLES = ("adamw", "row_moment", "factored", "sinkhorn_momentum", "stateless")
# What a sinkgd step sends: five iterations for each mesh dimension, and flags of AdamW's gradients.
COUNTED = {"llama, tp, sinkgd": 5 + 1, "qwen3_moe, tp, sinkgd": 5 + 1, "qwen3_moe, ep, sinkgd": 5 + 1}
COUNTED |= {"llama, fsdp and tp, sinkgd": 2 * (5 + 1), "qwen3_moe, fsdp and tp, sinkgd": 2 * (5 + 1)}
TRAINED = {
    "plain": ("llama", "sinkgd", {}),
    "layerwise": ("llama", "sinkgd_layerwise", {}),
    "swan": ("llama", "swan", {}),
    "experts": ("qwen3_moe", "sinkgd", {}),
    "experts, layerwise": ("qwen3_moe", "sinkgd_layerwise", {}),
    "accumulated": ("llama", "swan", {"gradient_accumulation_steps": 2}),
    "experts, accumulated": ("qwen3_moe", "sinkgd_layerwise", {"gradient_accumulation_steps": 2}),
    "accumulated, layerwise": ("llama", "sinkgd_layerwise", {"gradient_accumulation_steps": 2}),
    "not clipped": ("llama", "sinkgd_layerwise", {"max_grad_norm": 0.0, "optim_args": "release=all"}),
}
if not NEWER:
    ON_TWO, ON_FOUR = {case: given for case, given in ON_TWO.items() if given[1] == TP}, {}
    ACCUMULATED = {case: given for case, given in ACCUMULATED.items() if case in ON_TWO}
    # There an embedding is a plain tensor, of which all ranks compute the same gradient or none.
    ABSENT = {case: given for case, given in ABSENT.items() if PLANS[given[0]] == TP and "a table" not in case}
    COUNTED = {case: count for case, count in COUNTED.items() if case in ON_TWO}
    TRAINED = {case: given for case, given in TRAINED.items() if PLANS[given[0]] == TP}


def share_of(plan, rank, world):
    """Which of how many shares of a batch a rank has: ranks of one tensor parallel group have the same."""
    shares = plan.get("fsdp_size", 1) * plan.get("dp_replicate_size", 1) if plan else 1
    return rank * shares // world, shares


def freeze_norms_of_heads(model, passes):
    """Freeze the parameters whose gradients transformers adds up again in each of several passes."""
    for parameter in (p for n, p in model.named_parameters() if passes > 1 and ("q_norm" in n or "k_norm" in n)):
        parameter.requires_grad_(False)


def run(folder, case, cases, rank=0, world=1, **options):
    kind, plan, name, steps = cases[case]
    model = load(folder, kind, plan if world > 1 else None)
    freeze_norms_of_heads(model, options.get("passes", 1))
    train(model, name, steps, share_of(plan, rank, world) if world > 1 else (0, 1), **options)
    return weights_of(model)


def run_absent(folder, case, rank=None):
    """Of some parameters the second rank has no gradient in the first step and the last, and none has in the second.

    On one process, with None for a rank, the part that the second rank would hold is zero.
    """
    kind, name, options, absent = ABSENT[case]
    model = load(folder, kind, PLANS[kind] if rank is not None else None)
    params = [(n, p) for n, p in model.named_parameters() if n.endswith(absent)]
    for _, p in params:
        p.requires_grad_("frozen" not in case)

    def change(step):
        for n, p in params:
            if step == 1 or rank == 1:
                p.grad = None
            elif rank is None and p.grad is not None:
                dim = 1 if "o_proj" in n else 0
                part = -(-p.shape[dim] // 2)
                p.grad.narrow(dim, part, p.shape[dim] - part).zero_()

    train(model, name, 3, change=change, **options)
    return weights_of(model)


def count(folder, case, cases, rank, world):
    """How often each collective is called in a step."""
    kind, plan, name, _ = cases[case]
    model = load(folder, kind, plan)
    optimizer = create_optimizer(model, name, **RATES)
    backward(model, 0, share_of(plan, rank, world))
    with CommDebugMode() as mode:
        optimizer.step()
    return {str(operation).removeprefix("c10d."): n for operation, n in mode.get_comm_counts().items()}


def run_tables(folder, embeddings, plan=None):
    model = load(folder, "llama", plan)
    train(model, "sinkgd", 3, embeddings=embeddings)
    return weights_of(model)


def run_idle(folder, name="sinkgd", plan=None, release="", **options):
    """All tokens go to one expert of a layer, so that those of one rank see none, and have a gradient of zero."""
    model = load(folder, "qwen3_moe", plan, num_experts_per_tok=1, **options)
    for part in (".q_", ".k_"):  # where all positions are alike, their gradient is nothing but rounding
        for parameter in (p for n, p in model.named_parameters() if part in n):
            parameter.requires_grad_(False)
    train(model, name + release, 3, one_token=True)
    return weights_of(model)


def run_resumed(folder, rank):
    """Take steps, hand the state to a fresh optimizer of a fresh model, and take as many more with both."""
    model, fresh = (load(folder, "qwen3_moe", EP) for _ in range(2))
    optimizer = train(model, "sinkgd", 3)
    fresh.load_state_dict(model.state_dict())
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
    other = create_optimizer(fresh, "sinkgd", **RATES)
    other.load_state_dict(torch.load(io.BytesIO(state.getvalue()), weights_only=False))
    train(model, "sinkgd", 3, first=3, optimizer=optimizer)
    train(fresh, "sinkgd", 3, first=3, optimizer=other)
    return weights_of(model), weights_of(fresh)


def run_trainer(folder, case, plan=None):
    """The weights and the norms that the Trainer logs."""
    kind, optim, options = TRAINED[case]
    distributed_worker.forget_accelerate()
    args = TrainingArguments(
        f"{folder}/out",
        optim=optim,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"max_grad_norm": 0.5, **options},
    )
    rows = torch.randint(3, VOCAB, (32, 8), generator=torch.Generator().manual_seed(0)).tolist()
    model = load(folder, kind, plan)
    freeze_norms_of_heads(model, args.gradient_accumulation_steps)
    trainer = Trainer(model, args, train_dataset=[{"input_ids": r, "labels": r} for r in rows])
    with redirect_stdout(io.StringIO()):
        trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return weights_of(trainer.model), torch.tensor(norms)


def run_clipped_by_nan(folder, plan):
    """One rank alone has a NaN in its part of a matrix, and of the embedding."""
    model = load(folder, "llama", plan)
    optimizer = create_optimizer(model, "sinkgd", **RATES)
    before = weights_of(model)
    backward(model, 0)
    spoiled = ("model.layers.0.self_attn.o_proj.weight", "lm_head.weight")
    for name, p in model.named_parameters():
        if name in spoiled and p.device_mesh.get_local_rank() == 1:
            p.grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    return sorted(name for name, value in weights_of(model).items() if torch.equal(value, before[name]))


def on_two_experts(models, rank):
    shared = {**EP, "ep_implementation": "all_reduce"}
    idle = {
        "all_to_all, sinkgd": run_idle(models, "sinkgd", EP),
        "all_to_all, swan": run_idle(models, "swan", EP, "_layerwise"),
        "all_reduce, sinkgd": run_idle(models, "sinkgd", shared, experts_implementation="grouped_mm"),
    }
    return {"idle": idle, "resumed": run_resumed(models, rank)}


def on_two(rank, folder):
    torch.set_num_threads(1)
    announce_rank(rank, 2)
    models = f"{folder}/models-{rank}"
    save_models(models)
    with joined(rank, folder, 2) as save:
        results = {case: run(models, case, ON_TWO, rank, 2) for case in ON_TWO}
        results["counts"] = {case: count(models, case, ON_TWO, rank, 2) for case in COUNTED if case in ON_TWO}
        results["tables"] = {name: run_tables(models, name, TP) for name in TABLES}
        accumulated = [case for case in ACCUMULATED if case in ON_TWO]
        results["accumulated"] = {case: run(models, case, ON_TWO, rank, 2, passes=2) for case in accumulated}
        results["absent"] = {case: run_absent(models, case, rank) for case in ABSENT}
        if NEWER:
            results |= on_two_experts(models, rank)
        results["spoiled"] = run_clipped_by_nan(models, TP)
        distributed_worker.let_accelerate_shard_on_cpu()
        results["trainer"] = {case: run_trainer(models, case, PLANS[TRAINED[case][0]]) for case in TRAINED}
        save(results)


def on_four(rank, folder):
    torch.set_num_threads(1)
    announce_rank(rank, 4)
    models = f"{folder}/models-{rank}"
    save_models(models)
    with joined(rank, folder, 4) as save:
        results = {case: run(models, case, ON_FOUR, rank, 4) for case in ON_FOUR}
        results["counts"] = {case: count(models, case, ON_FOUR, rank, 4) for case in COUNTED if case in ON_FOUR}
        accumulated = [case for case in ACCUMULATED if case in ON_FOUR]
        results["accumulated"] = {case: run(models, case, ON_FOUR, rank, 4, passes=2) for case in accumulated}
        results["splits"] = list(undone_cuts())
        save(results)


def on_two_of_which_one_dies(rank, folder):
    """The second rank is gone when the first takes a step; the first says how that ended, and after how long."""
    torch.set_num_threads(1)
    announce_rank(rank, 2)
    models = save_models(f"{folder}/models-{rank}")
    with joined(rank, folder, 2) as save:
        found = {}
        loaded = {name: load(models, "llama", TP) for name in ("sinkgd", "swan")}
        for model in loaded.values():
            backward(model, 0)
        if rank == 1:
            save({"gone": True})
            os._exit(0)
        for name, model in loaded.items():
            before = time.monotonic()
            try:
                create_optimizer(model, name, **RATES).step()
            except RuntimeError as error:
                found[name] = (type(error).__name__, time.monotonic() - before)
        save(found)


@pytest.fixture(scope="module")
def two():
    """What each of two ranks got, from one start of two processes."""
    return on_ranks(on_two, 2)


@pytest.fixture(scope="module")
def four():
    """The same of four."""
    return on_ranks(on_four, 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def assert_same(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ON_TWO)
def test_a_model_cut_by_transformers_trains_as_on_one_process(case, two, models):
    expected = run(models, case, ON_TWO)
    for of_rank in two:
        assert_same(of_rank[case], expected)


@pytest.mark.parametrize("case", ON_FOUR)
def test_a_model_cut_over_four_ranks_trains_as_on_one_process(case, four, models):
    expected = run(models, case, ON_FOUR)
    for of_rank in four:
        assert_same(of_rank[case], expected)


@pytest.mark.parametrize("case", ACCUMULATED)
def test_passes_without_sync_add_up_to_one_step_of_one_process(case, request, models):
    expected = run(models, case, ACCUMULATED, passes=2)
    for of_rank in request.getfixturevalue("two" if case in ON_TWO else "four"):
        assert_same(of_rank["accumulated"][case], expected)


@pytest.mark.parametrize("case", ABSENT)
def test_what_has_no_gradient_on_a_rank_steps_as_if_it_were_zero_there(case, two, models):
    expected = run_absent(models, case)
    for of_rank in two:
        assert_same(of_rank["absent"][case], expected)


@pytest.mark.parametrize("embeddings", TABLES)
def test_an_embedding_whose_gradient_is_whole_on_each_rank_steps_as_on_one_process(embeddings, two, models):
    expected = run_tables(models, embeddings)
    for of_rank in two:
        assert_same(of_rank["tables"][embeddings], expected)


@pytest.mark.parametrize("case", COUNTED)
def test_sinkgd_sends_one_all_reduce_per_mesh_dimension_and_iteration(case, request):
    for of_rank in request.getfixturevalue("two" if case in ON_TWO else "four"):
        assert of_rank["counts"][case] == {"allreduce_": COUNTED[case]}


@needs_newer
@pytest.mark.parametrize("case", ["all_to_all, sinkgd", "all_to_all, swan", "all_reduce, sinkgd"])
def test_experts_without_tokens_on_a_rank_get_what_one_process_gives_them(case, two, models):
    expected = run_idle(models, case.split(", ")[1])
    for of_rank in two:
        assert_same(of_rank["idle"][case], expected)


@needs_newer
def test_a_state_of_expert_parallelism_resumes_to_the_bit(two):
    for of_rank in two:
        assert_same(*of_rank["resumed"], tolerance=0)


def test_a_nan_in_the_part_of_one_rank_is_skipped_on_all(two):
    expected = ["lm_head.weight", "model.layers.0.self_attn.o_proj.weight"]
    assert [of_rank["spoiled"] for of_rank in two] == [expected, expected]


@pytest.mark.parametrize("case", TRAINED)
def test_the_trainer_clips_by_the_norm_of_one_process(case, two, models):
    weights, norms = run_trainer(models, case)
    for of_rank in two:
        assert_same(of_rank["trainer"][case][1], norms)
        assert_same(of_rank["trainer"][case][0], weights)
    assert len(norms) == 4


def test_cuts_along_two_mesh_dimensions_are_undone_one_after_the_other(four):
    for of_rank in four:
        assert {told for *_, told in of_rank["splits"]} == {"right"}


def test_after_a_killed_rank_the_other_ends_with_an_error():
    survivor, _ = on_ranks(on_two_of_which_one_dies, 2)
    assert set(survivor) == {"sinkgd", "swan"}
    assert all(seconds < 60 for _, seconds in survivor.values())


def test_plain_tensors_of_tensor_parallelism_are_refused_in_one_line():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model._tp_size = 2
    with pytest.raises(ValueError, match=r"over 2 ranks.*pip install -U 'transformers>=5.17'\.$"):
        hf_stateless.create_optimizer(model, "sinkgd", lr=1e-3)


@pytest.mark.parametrize("name", ["sinkgd", "swan", "sinkgd_layerwise"])
def test_accumulation_that_transformers_adds_up_twice_is_refused_unless_frozen(name, models, tmp_path):
    model = load(models, "qwen3_moe")
    model._tp_size = 2
    kwargs = {"adam_kwargs": {"betas": (0.9, 0.999), "eps": 1e-8}, "optim_args": {}, "optimizer_kwargs": {}}
    args = TrainingArguments(tmp_path, optim=name, use_cpu=True, report_to=[], gradient_accumulation_steps=2)
    place = SimpleNamespace(model=model, args=args, **kwargs)
    with pytest.raises(
        ValueError, match=r"^gradient_accumulation_steps=2 .*layers.0.self_attn.q_norm.weight \(4 such"
    ):
        handle(name, place)
    freeze_norms_of_heads(model, 2)
    with pytest.raises(ValueError, match="plain tensors"):  # what is refused next of a model that is not cut
        handle(name, place)


@pytest.mark.parametrize("name", ["sinkgd_layerwise", "swan_layerwise", "multinorm_layerwise"])
def test_an_older_trainer_that_cannot_clip_several_meshes_is_refused_beside_layerwise(name, monkeypatch, tmp_path):
    monkeypatch.delattr(Trainer, "_mixed_mesh_grad_norm")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        place = init_device_mesh("cpu", (1,))
        model[0].weight = torch.nn.Parameter(distribute_tensor(model[0].weight.detach(), place, [Shard(0)]))
        assert isinstance(model[0].weight, DTensor)
        kwargs = {"adam_kwargs": {"betas": (0.9, 0.999), "eps": 1e-8}, "optim_args": {}, "optimizer_kwargs": {}}
        args = TrainingArguments(tmp_path, optim=name, use_cpu=True, report_to=[])
        with pytest.raises(ValueError, match=r"tensor parallelism.*leave out _layerwise"):
            handle(name, SimpleNamespace(model=model, args=args, **kwargs))
    finally:
        torch.distributed.destroy_process_group()

"""Layer-wise updates on two gloo processes: DDP and FSDP2 against one process, and the memory that is saved."""

import contextlib
import copy
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from conftest import TINY_MODELS, VOCAB_SIZE
from live_gradients import LiveGradients, gradient_bytes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_stateless import StatelessOptimizer, create_optimizer


pytestmark = pytest.mark.slow
WORLD, STEPS, DEPTH, BLOCKS = 2, 3, 8, 3


class Tower(nn.Module):
    """Two kinds of layers in turn, which makes two groups of matrices; some can be left out of a forward."""

    def __init__(self):
        super().__init__()
        self.spare = nn.LayerNorm(16)
        self.embed = nn.Embedding(31, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) if i % 2 else Conv1D(16, 16) for i in range(DEPTH))
        self.norm = nn.LayerNorm(16)

    def forward(self, tokens, without=()):
        hidden = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            hidden = hidden if i in without else torch.tanh(block(hidden))
        return (self.norm(hidden) - 1).pow(4).mean()


class Tied(nn.Module):
    """A matrix that two modules share, an embedding that is also the head, and a weight of the model's own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 31, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, tokens):
        hidden = self.second(torch.tanh(self.first(self.embed(tokens)))) * self.scale
        return self.head(hidden).square().mean()


class Reentrant(Tower):
    """Checkpointed blocks, with a norm behind them that is not checkpointed."""

    def forward(self, tokens):
        hidden = self.spare(self.embed(tokens))
        for block in self.blocks:
            hidden = torch.tanh(checkpoint(block, hidden, use_reentrant=True))
        return (self.norm(hidden) - 1).pow(4).mean()


class Block(nn.Module):
    """Four matrices: two of one shape that two ranks cut unevenly, and one of a single row, which one rank has."""

    def __init__(self):
        super().__init__()
        self.up, self.side, self.down = nn.Linear(16, 9), nn.Linear(16, 9), nn.Linear(9, 16)
        self.gate = nn.Linear(16, 1)

    def forward(self, hidden, in_part=False):
        if in_part:
            return self.down(self.up(hidden))
        inner = torch.tanh(self.up(hidden)) * self.side(hidden)
        return hidden + torch.sigmoid(self.gate(hidden)) * self.down(inner)


class Blocks(nn.Module):
    """Blocks of several matrices, of which the middle one can be used in part, and a matrix outside of them."""

    def __init__(self):
        super().__init__()
        self.spare = nn.LayerNorm(16)
        self.embed = nn.Embedding(31, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.out = nn.Linear(16, 5)

    def forward(self, tokens, in_part=False):
        hidden = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            hidden = block(hidden, in_part and i == 1)
        return self.out(hidden).pow(4).mean()


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = TINY_MODELS["llama"]()

    def forward(self, tokens):
        return self.model(input_ids=tokens, labels=tokens).loss


def built(kind, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return kind().to(dtype)


def tokens(rank=None, step=0):
    """All tokens of a step, or those of one rank."""
    every = torch.randint(0, 31, (4, 6), generator=torch.Generator().manual_seed(step))
    return every if rank is None else every.chunk(WORLD)[rank]


def weights_of(model):
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def step_once(model, optimizer, *inputs):
    model(*inputs).backward()
    optimizer.step()
    optimizer.zero_grad()


# Each case: the model, its dtype, the name and the options of the optimizer.
REPLICATED = {
    **{name: (Tower, torch.float32, name, {}) for name in ("swan", "sinkgd", "multinorm")},
    "bfloat16": (Tower, torch.bfloat16, "sinkgd", {}),
    "all released": (Tower, torch.float32, "sinkgd", {"release": "all"}),
    "tied": (Tied, torch.float32, "sinkgd", {}),
    "tied, all released": (Tied, torch.float32, "sinkgd", {"release": "all"}),
    "llama": (Llama, torch.float32, "sinkgd", {}),
    "llama, all released": (Llama, torch.bfloat16, "sinkgd", {"release": "all"}),
}
# DDP is told of parameters that no rank uses, here `spare`.
UNUSED = {"find_unused_parameters": True}


def make(case, rank, layerwise, wrap=DistributedDataParallel):
    """Return the wrapped model and its optimizer; ranks start from different weights, which wrapping has to mend."""
    kind, dtype, name, options = REPLICATED[case]
    model = built(kind, dtype, seed=rank)
    if layerwise:
        optimizer = create_optimizer(model, f"{name}_layerwise", lr=0.01, lr_scale=0.2, weight_decay=0.1, **options)
        return wrap(model, **UNUSED), optimizer
    plain = wrap(model, **UNUSED)
    options = {key: value for key, value in options.items() if key != "release"}
    return plain, create_optimizer(plain, name, lr=0.01, lr_scale=0.2, weight_decay=0.1, **options)


def run_replicated(rank, case):
    trained = []
    for layerwise in (True, False):
        model, optimizer = make(case, rank, layerwise)
        for step in range(STEPS):
            step_once(model, optimizer, tokens(rank, step))
        trained.append(weights_of(model))
    return trained


def run_partly_used(rank, release):
    """Layers that one rank leaves out, layers that both leave out, and at last a rank that uses no layer at all."""
    left_out = [([(1, 2), ()], [(), (6, 7)]), ([(0, 7), (7,)], [(7,), (3, 7)]), ([tuple(range(DEPTH)), ()], [(), ()])]
    trained = []
    for layerwise in (True, False):
        model = built(Tower)
        if layerwise:
            optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01, weight_decay=0.1, release=release)
        model = DistributedDataParallel(model, **UNUSED)
        if not layerwise:
            optimizer = create_optimizer(model, "sinkgd", lr=0.01, weight_decay=0.1)
        for case in left_out:
            for step, without in enumerate(case):
                step_once(model, optimizer, tokens(rank, step), without[rank])
        trained.append(weights_of(model))
    return trained


def run_accumulated(rank, release, hold_all):
    trained = []
    for layerwise in (True, False):
        model = built(Tower)
        if layerwise:
            optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01, release=release)
        model = DistributedDataParallel(model, **UNUSED)
        optimizer = optimizer if layerwise else create_optimizer(model, "sinkgd", lr=0.01)
        for step in range(STEPS):
            with model.no_sync(), optimizer.hold():
                model(tokens(rank, 2 * step)).backward()
            with optimizer.hold() if hold_all else contextlib.nullcontext():
                model(tokens(rank, 2 * step + 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(weights_of(model))
    return trained


def run_measured(rank, release):
    """Peak of live gradient bytes in the second step, what DDP's buckets hold, and the sizes of the groups."""
    model = built(Tower)
    model.spare.requires_grad_(False)
    live = LiveGradients(model)
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01, release=release)
    model = DistributedDataParallel(model)
    peaks = []
    for step in range(2):
        live.peak = 0
        model(tokens(rank, step)).backward()
        peaks.append(live.peak)
        optimizer.step()
        optimizer.zero_grad()
    sizes = gradient_bytes(optimizer)
    managed = model._get_ddp_logging_data()["total_parameter_size_bytes"]
    deadline = time.monotonic() + 10
    while live.now() and time.monotonic() < deadline:  # gloo's threads let go of a tensor a little later
        time.sleep(0.01)
    return {"peaks": peaks, "managed": managed, "left": live.now(), **sizes}


def run_clipped(rank):
    """The norm that accelerate reports and the weights after clipping, layer-wise and plain."""
    results = []
    for layerwise in (True, False):
        accelerator, model = Accelerator(cpu=True), built(Llama)
        assert accelerator.num_processes == WORLD
        name = "sinkgd_layerwise" if layerwise else "sinkgd"
        model, optimizer = accelerator.prepare(
            model, create_optimizer(model, name, lr=0.01, lr_scale=0.2, adamw_eps=1e-2)
        )
        norms = []
        for step in range(STEPS):
            accelerator.backward(model(tokens(rank, step)))
            norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.1))
            optimizer.step()
            optimizer.zero_grad()
        results.append((torch.stack(norms), weights_of(model)))
    return results


def run_compiled(rank):
    """DDP around a compiled model, of which the names have a prefix."""
    model = built(Tower)
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01, lr_scale=0.2, weight_decay=0.1)
    wrapped = DistributedDataParallel(torch.compile(model, backend="aot_eager"), **UNUSED)
    for step in range(STEPS):
        step_once(wrapped, optimizer, tokens(rank, step))
    return weights_of(model)


def refusal(make_error):
    try:
        make_error()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def run_refused(rank):
    def reentrant():
        model = built(Reentrant)
        model.norm.requires_grad_(False)  # then backward begins inside a checkpoint
        optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01)
        step_once(DistributedDataParallel(model), optimizer, tokens(rank))

    return {
        "wrapped": refusal(
            lambda: create_optimizer(DistributedDataParallel(built(Tower)), "sinkgd_layerwise", lr=0.01)
        ),
        "reentrant": refusal(reentrant),
    }


def run_reentrant(rank):
    trained = []
    for layerwise in (True, False):
        model = built(Reentrant)
        if layerwise:
            optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01, lr_scale=0.2)
        model = DistributedDataParallel(model)
        optimizer = optimizer if layerwise else create_optimizer(model, "sinkgd", lr=0.01, lr_scale=0.2)
        for step in range(STEPS):
            step_once(model, optimizer, tokens(rank, step))
        trained.append(weights_of(model))
    return trained


def run_wrapped_twice(rank):
    """DDP around another module than the optimizer knows, so that it also has the hooked matrices in its buckets."""
    model = built(Tower)
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01, lr_scale=0.2, weight_decay=0.1)
    wrapped = DistributedDataParallel(nn.Sequential(model), gradient_as_bucket_view=True, **UNUSED)
    for step in range(STEPS):
        step_once(wrapped, optimizer, tokens(rank, step))
    return weights_of(model)


def run_by_hand(rank):
    """Groups made by hand around a model that DDP has in its buckets."""
    model = DistributedDataParallel(built(Tower), **UNUSED)
    matrices = [p for p in model.parameters() if p.shape == (16, 16)]
    optimizer = StatelessOptimizer([{"params": matrices, "algorithm": "multinorm"}], lr=0.01, release="matrices")
    optimizer.train()
    step_once(model, optimizer, tokens(rank))
    return weights_of(model)


def run_late(rank, join):
    """torch.distributed is initialised after the optimizer was made."""
    model = built(Tower)
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01)
    join()
    model = DistributedDataParallel(model, **UNUSED)
    message = refusal(lambda: model(tokens(rank)).backward())
    optimizer.zero_grad()
    optimizer.train()
    model.require_forward_param_sync = True
    return message


def sharded(model):
    for block in (model.embed, *model.blocks):
        fully_shard(block)
    return fully_shard(model)


# Each case: the model, the name, the options, and whether the optimizer is made before the model is sharded, as
# accelerate does.
SHARDED = {
    **{name: (Tower, name, {}, False) for name in ("swan", "sinkgd", "multinorm")},
    "all released": (Tower, "sinkgd", {"release": "all"}, False),
    "swapped": (Tower, "sinkgd", {}, True),
    "swapped, all released": (Tower, "sinkgd", {"release": "all"}, True),
    "blocks": (Blocks, "sinkgd", {}, True),
    "blocks, swan": (Blocks, "swan", {}, False),
    "blocks, all released": (Blocks, "sinkgd", {"release": "all", "embeddings": "sinkhorn_momentum"}, False),
}


def run_sharded(rank, case):
    """Return the weights and how many gradients were left, layer-wise, and the weights of the plain optimizer."""
    kind, name, options, swapped = SHARDED[case]
    plain_options = {key: value for key, value in options.items() if key != "release"}
    plain, _ = train_sharded(rank, kind, name, plain_options, swapped)
    return *train_sharded(rank, kind, f"{name}_layerwise", options, swapped), plain


def train_sharded(rank, kind, name, options, swapped):
    model = built(kind)
    model.spare.requires_grad_(False)
    if not swapped:
        sharded(model)
    optimizer = create_optimizer(model, name, lr=0.01, lr_scale=0.2, weight_decay=0.1, **options)
    if swapped:
        sharded(model)
        now = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [now[parameter] for parameter in group["param_names"]]
    for step in range(STEPS):
        optimizer.train()
        step_with_hold(model, optimizer, rank, step)
    left = sum(p.grad is not None for g in optimizer.param_groups for p in g["params"])
    return weights_of(model), left


def step_with_hold(model, optimizer, rank, step):
    """Two micro-batches, of which the first is not reduced."""
    model.set_requires_gradient_sync(False)
    with optimizer.hold():
        model(tokens(rank, 2 * step)).backward()
    model.set_requires_gradient_sync(True)
    model(tokens(rank, 2 * step + 1)).backward()
    assert not isinstance(optimizer.released_norm(), DTensor)
    optimizer.step()
    optimizer.zero_grad()


def run_counted(rank, name, release, in_part):
    """Collectives and the most matrices whose gradients wait for their block, in one step after the first."""
    model = built(Blocks)
    model.spare.requires_grad_(False)
    sharded(model)
    waiting = []
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.shape != (31, 16)]
    for p in matrices:
        p.register_post_accumulate_grad_hook(lambda _: waiting.append(sum(q.grad is not None for q in matrices)))
    optimizer = create_optimizer(model, f"{name}_layerwise", lr=0.01, release=release)
    step_once(model, optimizer, tokens(rank))
    waiting.clear()
    with CommDebugMode() as mode:
        model(tokens(rank), in_part).backward()
        assert optimizer.released_norm() > 0
        optimizer.step()
    counts = {str(operation).removeprefix("c10d."): count for operation, count in mode.get_comm_counts().items()}
    return {"counts": counts, "waiting": max(waiting), "left": sum(p.grad is not None for p in matrices)}


def run_used_in_part(rank):
    """Steps that use a block in part, between steps that use all of it."""
    trained = []
    for name in ("sinkgd_layerwise", "sinkgd"):
        model = built(Blocks)
        model.spare.requires_grad_(False)
        optimizer = create_optimizer(sharded(model), name, lr=0.01, weight_decay=0.1)
        for step in range(STEPS):
            step_once(model, optimizer, tokens(rank, step), step == 1)
        trained.append(weights_of(model))
    return trained


def run_broken_backward(rank):
    """A backward pass that fails in the middle of a block, then one that does not, and the plain optimizer's step."""
    mesh = init_device_mesh("cpu", (WORLD,))
    start = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    results = []
    for layerwise in (None, "matrices"):
        later, first = (nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in start)
        group = {"params": [later, first], "param_names": ["layers.0.a", "layers.0.b"], "algorithm": "multinorm"}
        optimizer = StatelessOptimizer([group], lr=0.1, release=layerwise)
        optimizer.train()
        if layerwise:
            broken = later * 1
            broken.register_hook(fail)
            error = refusal(lambda broken=broken, first=first: (broken.pow(2).sum() + first.pow(2).sum()).backward())
            assert first.grad is not None  # it waits for the other one
            optimizer.zero_grad()
            optimizer.step()
        unchanged = torch.equal(first.full_tensor(), start[1])
        (later.pow(3).sum() + first.pow(3).sum()).backward()
        optimizer.step()
        results.append([p.full_tensor().detach() for p in (later, first)])
    return {"weights": results, "error": error, "unchanged": unchanged}


def fail(grad):
    raise RuntimeError("backward failed")


def run_sharded_norm(rank, kind):
    """The norm of released shards, layer-wise, and of all shards after a plain backward."""
    norms = []
    for name in ("sinkgd_layerwise", "sinkgd"):
        model = built(kind)
        model.spare.requires_grad_(False)
        optimizer = create_optimizer(sharded(model), name, lr=0.01)
        model(tokens(rank)).backward()
        if name == "sinkgd":
            matrices = [p.grad for g in optimizer.param_groups if g["role"] == "matrix" for p in g["params"]]
            norms.append(torch.nn.utils.get_total_norm(matrices).full_tensor())
        else:
            norms.append(optimizer.released_norm())
    return norms


# Name, release, whether one block is used in part.
COUNTED = [("sinkgd", "matrices", False), ("sinkgd", "matrices", True), ("sinkgd", "all", False)]
COUNTED += [("swan", "matrices", False)]


def worker(rank, folder):
    torch.set_num_threads(1)
    # For accelerate, which asks for an address although the process group is there.
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": 29500}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in sizes.items()}}

    def join():
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)

    results = {"late": run_late(rank, join)}
    try:
        results |= {case: run_replicated(rank, case) for case in REPLICATED}
        for release in ("matrices", "all"):
            results[f"partly used, {release}"] = run_partly_used(rank, release)
            results[f"measured, {release}"] = run_measured(rank, release)
            for hold_all in (False, True):
                results[f"accumulated, {release}, {hold_all}"] = run_accumulated(rank, release, hold_all)
        results |= {f"sharded, {case}": run_sharded(rank, case) for case in SHARDED}
        results |= {"clipped": run_clipped(rank), "compiled": run_compiled(rank), "refused": run_refused(rank)}
        results |= {"wrapped twice": run_wrapped_twice(rank), "reentrant": run_reentrant(rank)}
        results["by hand"] = run_by_hand(rank)
        results |= {f"sharded norm, {kind.__name__}": run_sharded_norm(rank, kind) for kind in (Tower, Blocks)}
        for case in COUNTED:
            results[f"counted, {case}"] = run_counted(rank, *case)
        results |= {"used in part": run_used_in_part(rank), "broken": run_broken_backward(rank)}
        torch.save(results, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    """What each of two ranks got, from one start of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (folder,), nprocs=WORLD)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def assert_close(actual, expected, tolerance=0.0):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def trained_alone(kind, name, options, steps, dtype=torch.float32, frozen=()):
    """One process with the tokens of all ranks; each step has as many micro-batches as it is given."""
    model = built(kind, dtype)
    for part in frozen:
        getattr(model, part).requires_grad_(False)
    optimizer = create_optimizer(model, name, lr=0.01, lr_scale=0.2, weight_decay=0.1, **options)
    for micro_batches in steps:
        for micro_batch in micro_batches:
            model(tokens(step=micro_batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


# ---- DDP


@pytest.mark.parametrize("case", [*REPLICATED, "reentrant"])
def test_ddp_equals_plain_ddp_to_the_bit_on_every_rank(case, results):
    (layerwise, plain), (layerwise_1, _) = results[0][case], results[1][case]
    assert_close(layerwise, layerwise_1)
    assert_close(layerwise, plain)


@pytest.mark.parametrize("case", [case for case, (_, dtype, *_) in REPLICATED.items() if dtype == torch.float32])
def test_ddp_equals_one_process_with_the_doubled_batch(case, results):
    kind, _, name, options = REPLICATED[case]
    options = {key: value for key, value in options.items() if key != "release"}
    expected = trained_alone(kind, name, options, [[step] for step in range(STEPS)])
    # Whitening amplifies the rounding of what lies along small singular values.
    assert_close(results[0][case][0], expected, 1e-5 if name == "sinkgd" else 2e-4)
    start = weights_of(built(kind))
    assert all((value != start[key]).any() for key, value in expected.items() if "spare" not in key)


@pytest.mark.parametrize("release", ["matrices", "all"])
def test_layers_that_a_rank_leaves_out_neither_hang_nor_part_the_ranks(release, results):
    (layerwise, plain), (layerwise_1, _) = (results[rank][f"partly used, {release}"] for rank in range(WORLD))
    assert_close(layerwise, layerwise_1)
    assert_close(layerwise, plain)


@pytest.mark.parametrize("release", ["matrices", "all"])
@pytest.mark.parametrize("hold_all", [False, True])
def test_accumulation_under_ddp_is_exact(release, hold_all, results):
    (layerwise, plain), (layerwise_1, _) = (
        results[rank][f"accumulated, {release}, {hold_all}"] for rank in range(WORLD)
    )
    assert_close(layerwise, layerwise_1)
    assert_close(layerwise, plain)


@pytest.mark.parametrize("release", ["matrices", "all"])
def test_ddp_holds_a_few_gradients_and_no_bucket_for_the_released(release, results):
    """Two all-reduces are in flight while the next gradient is made."""
    for rank in range(WORLD):
        measured = results[rank][f"measured, {release}"]
        kept = measured["adamw"] if release == "matrices" else 0
        assert measured["managed"] <= measured["adamw"]
        assert measured["managed"] < 0.5 * measured["multinorm"]
        largest = max(measured["largest"], measured["adamw"])
        assert max(measured["peaks"]) <= 3 * largest + kept < measured["multinorm"] + measured["adamw"]
        assert measured["left"] == 0


def test_matrices_in_the_buckets_of_ddp_are_updated_in_the_step(results):
    assert_close(results[0]["by hand"], results[1]["by hand"])
    model = built(Tower)
    matrices = [p for p in model.parameters() if p.shape == (16, 16)]
    optimizer = StatelessOptimizer([{"params": matrices, "algorithm": "multinorm"}], lr=0.01)
    step_once(model, optimizer, tokens())
    assert_close(results[0]["by hand"], weights_of(model), 1e-5)


def test_clipping_under_ddp_knows_the_norm_of_all_gradients(results):
    for rank in range(WORLD):
        (norms, layerwise), (plain_norms, plain) = results[rank]["clipped"]
        assert_close(norms, plain_norms, 1e-6)
        assert_close(layerwise, plain, 1e-6)
        assert_close(layerwise, results[0]["clipped"][0][1])


@pytest.mark.parametrize("case", ["compiled", "wrapped twice"])
def test_ddp_around_a_wrapped_model_equals_one_process(case, results):
    expected = trained_alone(Tower, "sinkgd", {}, [[step] for step in range(STEPS)])
    for rank in range(WORLD):
        assert_close(results[rank][case], expected, 1e-5)


def test_what_ddp_would_spoil_is_refused_with_the_fix(results):
    for rank in range(WORLD):
        assert "create the optimizer first and wrap the model" in results[rank]["refused"]["wrapped"]
        assert "set its use_reentrant=False" in results[rank]["refused"]["reentrant"]
        assert "initialise it first, or call optimizer.train()" in results[rank]["late"]


# ---- FSDP2


@pytest.mark.parametrize("case", SHARDED)
def test_fsdp2_equals_plain_fsdp2_and_leaves_no_gradient(case, results):
    for rank in range(WORLD):
        layerwise, left, plain = results[rank][f"sharded, {case}"]
        assert_close(layerwise, plain, 1e-6)
        assert left == 0


@pytest.mark.parametrize("case", [case for case, (_, name, *_) in SHARDED.items() if name == "sinkgd"])
def test_fsdp2_equals_one_process(case, results):
    steps = [[2 * step, 2 * step + 1] for step in range(STEPS)]
    kind, _, options, _ = SHARDED[case]
    options = {key: value for key, value in options.items() if key != "release"}
    expected = trained_alone(kind, "sinkgd", options, steps, frozen=["spare"])
    for rank in range(WORLD):
        assert_close(results[rank][f"sharded, {case}"][0], expected, 1e-5)


@pytest.mark.parametrize("kind", ["Tower", "Blocks"])
def test_fsdp2_reports_the_norm_of_whole_gradients(kind, results):
    for rank in range(WORLD):
        released, expected = results[rank][f"sharded norm, {kind}"]
        assert_close(released, expected, 1e-6)


def test_sinkgd_sends_five_all_reduces_and_a_norm_for_each_block(results):
    """The matrix outside of the blocks counts as one; the AdamW part adds one all-reduce of flags in the step."""
    for rank in range(WORLD):
        for in_part in (False, True):
            counted = results[rank][f"counted, {('sinkgd', 'matrices', in_part)}"]
            assert counted["counts"]["allreduce_"] == (5 + 1) * (BLOCKS + 1) + 1
            assert counted["left"] == 0


def test_the_gradients_of_one_block_wait_at_a_time(results):
    for rank in range(WORLD):
        for case in COUNTED:
            assert results[rank][f"counted, {case}"]["waiting"] == 4


def test_released_vectors_and_embeddings_add_flags_and_no_more_norms(results):
    """Each block has biases too: one more all-reduce, of flags. The embedding and the last bias are on their own."""
    for rank in range(WORLD):
        counted = results[rank][f"counted, {('sinkgd', 'all', False)}"]
        assert counted["counts"]["allreduce_"] == (5 + 1 + 1) * BLOCKS + (5 + 1) + 2 * (1 + 1)


def test_swan_sends_two_all_to_alls_for_the_matrices_of_one_shape_in_a_block(results):
    for rank in range(WORLD):
        counts = results[rank][f"counted, {('swan', 'matrices', False)}"]["counts"]
        assert counts["alltoall_base_"] == 2 * BLOCKS
        assert counts["allreduce_"] == BLOCKS + 1 + 1


def test_a_block_that_is_used_in_part_is_updated_all_the_same(results):
    for rank in range(WORLD):
        layerwise, plain = results[rank]["used in part"]
        assert_close(layerwise, plain, 1e-6)


def test_an_error_in_backward_leaves_nothing_behind(results):
    for rank in range(WORLD):
        broken = results[rank]["broken"]
        assert broken["error"] == "backward failed"
        assert broken["unchanged"]
        assert_close(*broken["weights"], 1e-6)


# ---- The Trainer, started by torchrun

SCRIPT = """
import sys, torch
from test_layerwise_distributed import train_by_trainer
world = int(__import__("os").environ["WORLD_SIZE"])
assert world == 2, world
train_by_trainer(sys.argv[1])
"""
RUNS = {
    "layerwise": ("sinkgd_layerwise", {}),
    "plain": ("sinkgd", {}),
    "layerwise, accumulated": ("sinkgd_layerwise", {"gradient_accumulation_steps": 2}),
    "layerwise, all released": ("sinkgd_layerwise", {"optim_args": "release=all", "max_grad_norm": 0.0}),
    "plain, unclipped": ("sinkgd", {"max_grad_norm": 0.0}),
    "layerwise swan": ("swan_layerwise", {"optim_args": "lr_scale=0.2"}),
    "plain swan": ("swan", {"optim_args": "lr_scale=0.2"}),
}


def trainer_run(optim, folder, batch_size=2, **options):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCAB_SIZE, (64, 12), generator=generator).tolist()
    args = TrainingArguments(
        f"{folder}/out",
        optim=optim,
        max_steps=4,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    torch.manual_seed(0)
    trainer = Trainer(TINY_MODELS["llama"](), args, train_dataset=[{"input_ids": r, "labels": r} for r in rows])
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return trainer, {"norms": norms, "weights": weights_of(trainer.model)}


def train_by_trainer(folder):
    results = {}
    for case, (optim, options) in RUNS.items():
        trainer, results[case] = trainer_run(optim, folder, **options)
        assert trainer.accelerator.num_processes == dist.get_world_size() == WORLD
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    torch.save(results, Path(folder) / f"trainer-{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def trainer_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORLD)]
    command = [*launcher, "script.py", str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"trainer-{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_the_trainer_on_two_processes_keeps_replicas_equal_to_the_bit(trainer_results):
    assert_close(trainer_results[0], trainer_results[1])


@pytest.mark.parametrize(
    ("layerwise", "plain"),
    [
        ("layerwise", "plain"),
        ("layerwise, all released", "plain, unclipped"),
        ("layerwise swan", "plain swan"),
    ],
)
def test_the_trainer_on_two_processes_trains_as_the_plain_optimizer(layerwise, plain, trainer_results):
    assert_close(trainer_results[0][layerwise]["weights"], trainer_results[0][plain]["weights"], 5e-6)
    assert trainer_results[0][layerwise]["norms"] == pytest.approx(trainer_results[0][plain]["norms"], rel=1e-5)


@pytest.mark.parametrize(("case", "batch_size"), [("layerwise", 4), ("layerwise, accumulated", 8)])
def test_the_trainer_on_two_processes_equals_one_with_the_whole_batch(case, batch_size, trainer_results, tmp_path):
    _, expected = trainer_run("sinkgd", tmp_path, batch_size=batch_size)
    assert_close(copy.copy(trainer_results[0][case]["weights"]), expected["weights"], 1e-5)
    assert trainer_results[0][case]["norms"] == pytest.approx(expected["norms"], rel=1e-5)

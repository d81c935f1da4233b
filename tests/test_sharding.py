"""FSDP2 and DDP on two gloo processes against one process; what cannot be sharded is refused."""

import copy

import pytest
import torch
import torch.distributed as dist
from rank_processes import joined, on_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_stateless import PRESETS, create_optimizer


WORLD = 2
STEPS = 3
# What each case passes to create_optimizer; the first entry is the name.
SHARDED = {
    **{name: (name, {}) for name in PRESETS},
    "stateless embeddings": ("sinkgd", {"embeddings": "stateless"}),
    "sinkhorn momentum": ("sinkgd", {"embeddings": "sinkhorn_momentum"}),
    "AdamW": ("sinkgd", {"embeddings": "adamw"}),
    "row moments": ("sinkgd", {"embeddings": "row_moment"}),
    "factored": ("sinkgd", {"embeddings": "factored", "heads": "column_moment"}),
    "8-bit moments": ("sinkgd", {"embeddings": "adamw_8bit"}),
}
# Of these also in bf16, where noise depends on the number of the step, on a rank that holds nothing of a layer too.
HALVES = ("sinkgd", "AdamW", "sinkhorn momentum", "row moments", "factored")


class OddModel(nn.Module):
    """Sizes that two ranks cannot halve, down to a layer of which the second rank holds nothing."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 10)
        self.wide = nn.Linear(10, 13)
        self.single = nn.Linear(13, 1)
        self.tall = nn.Linear(13, 7)

    def forward(self, tokens):
        hidden = torch.tanh(self.wide(self.embed(tokens)))
        return (self.tall(hidden).square() + self.single(hidden)).mean()


def odd_model(dtype=torch.float32):
    torch.manual_seed(0)
    return OddModel().to(dtype)


def tokens(rank=None):
    """All tokens, or those of one rank."""
    every = torch.randint(0, 31, (4, 6), generator=torch.Generator().manual_seed(1))
    return every if rank is None else every.chunk(WORLD)[rank]


def take_steps(model, optimizer, batch):
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()


def whole(model):
    return {
        key: value.full_tensor().clone() if isinstance(value, DTensor) else value.clone()
        for key, value in model.state_dict().items()
    }


def sharded(dtype=torch.float32):
    model = odd_model(dtype)
    for layer in (model.embed, model.wide, model.single, model.tall):
        fully_shard(layer)
    return fully_shard(model)


def run_sharded(rank, name, options):
    model = sharded()
    optimizer = create_optimizer(model, name, lr=0.01, lr_scale=0.2, weight_decay=0.1, **options)
    take_steps(model, optimizer, tokens(rank))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return whole(model)


def run_resumed(rank, name, options, full, dtype=torch.float32):
    """Take steps, hand the state to a fresh optimizer through torch's checkpoint code, and take as many more."""
    model = sharded(dtype)
    optimizer = create_optimizer(model, name, lr=0.01, lr_scale=0.2, weight_decay=0.1, **options)
    take_steps(model, optimizer, tokens(rank))
    saved = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=full, cpu_offload=full)
    )
    saved = copy.deepcopy(saved)
    fresh_model = sharded(dtype)
    fresh_model.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh = create_optimizer(fresh_model, name, lr=0.01, lr_scale=0.2, weight_decay=0.1, **options)
    loading = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full)
    set_optimizer_state_dict(fresh_model, fresh, saved, options=loading)
    take_steps(model, optimizer, tokens(rank))
    take_steps(fresh_model, fresh, tokens(rank))
    return whole(model), whole(fresh_model)


def run_spoiled(rank):
    """One rank alone sees a NaN, in its part of the embedding, and one in its part of a matrix."""
    model = sharded()
    optimizer = create_optimizer(model, "sinkgd", lr=0.01)
    before = whole(model)
    model(tokens(rank)).backward()
    if rank == 1:
        model.embed.weight.grad.to_local()[0, 0] = float("nan")
        model.tall.weight.grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    return sorted(key for key, value in whole(model).items() if torch.equal(value, before[key]))


def run_rounded(rank):
    """Equal bf16 rows on both ranks, moved by half of the spacing: noise that were equal would round them equally."""
    model = fully_shard(nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)))
    weight = next(model.parameters())
    weight.data.fill_(1.0)
    optimizer = create_optimizer(model, "sinkgd", lr=2.0**-9, lr_scale=1.0)
    (model(torch.ones(1, 64, dtype=torch.bfloat16)).sum()).backward()
    optimizer.step()
    return weight.full_tensor().clone()


def run_replicated(rank):
    model = DistributedDataParallel(odd_model(torch.bfloat16))
    optimizer = create_optimizer(model, "sinkgd", lr=0.01, weight_decay=0.1)
    take_steps(model, optimizer, tokens(rank))
    return {key: value.clone() for key, value in model.module.state_dict().items()}


def worker(rank, folder):
    torch.set_num_threads(1)
    with joined(rank, folder, WORLD) as save:
        results = {case: run_sharded(rank, name, options) for case, (name, options) in cases().items()}
        for kind, full in (("full", True), ("sharded", False)):
            for case, (name, options) in cases().items():
                results[f"{kind}: {case}"] = run_resumed(rank, name, options, full)
            for case in HALVES:
                results[f"{kind}: {case} in halves"] = run_resumed(rank, *SHARDED[case], full, torch.bfloat16)
        results |= {"spoiled": run_spoiled(rank), "rounded": run_rounded(rank), "replicated": run_replicated(rank)}
        save(results)


def cases():
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return {case: value for case, value in SHARDED.items() if case != "8-bit moments"}
    return SHARDED


@pytest.fixture(scope="module")
def results():
    """What each of two ranks got, from one start of two processes."""
    return on_ranks(worker, WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases())
def test_fsdp2_equals_one_process(case, results):
    name, options = SHARDED[case]
    model = odd_model()
    start = copy.deepcopy(model.state_dict())
    take_steps(model, create_optimizer(model, name, lr=0.01, lr_scale=0.2, weight_decay=0.1, **options), tokens())
    expected = model.state_dict()
    for rank in range(WORLD):
        torch.testing.assert_close(results[rank][case], dict(expected), rtol=1e-5, atol=1e-5)
    assert all((expected[key] - start[key]).abs().max() > 1e-3 for key in start)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*cases(), *(f"{case} in halves" for case in HALVES)])
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_fsdp2_resumes_to_the_bit(case, kind, results):
    for rank in range(WORLD):
        straight, resumed = results[rank][f"{kind}: {case}"]
        torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


@pytest.mark.slow
def test_a_nan_on_one_rank_is_skipped_on_all(results):
    assert results[0]["spoiled"] == results[1]["spoiled"] == ["embed.weight", "tall.weight"]


@pytest.mark.slow
def test_shards_are_rounded_by_their_own_noise(results):
    first, second = results[0]["rounded"].float().chunk(WORLD)
    assert abs((first != second).float().mean().item() - 0.5) < 0.05
    assert abs((first < 1).float().mean().item() - 0.5) < 0.05


@pytest.mark.slow
def test_ddp_replicas_stay_equal_to_the_bit_in_bfloat16(results):
    torch.testing.assert_close(results[0]["replicated"], results[1]["replicated"], rtol=0, atol=0)
    assert (results[0]["replicated"]["wide.weight"] != odd_model(torch.bfloat16).wide.weight).any()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused_with_what_to_type(use_orig_params, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(odd_model(), device_id=cpu, use_orig_params=use_orig_params)
        with pytest.raises(
            ValueError, match=r"FSDP1 flattens parameters.*set fsdp_version: 2 in the accelerate config"
        ):
            create_optimizer(model, "sinkgd", lr=0.01)
    finally:
        dist.destroy_process_group()

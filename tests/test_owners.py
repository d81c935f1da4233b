"""Who whitens what: balance of the owners, and replicas that share the work on whole matrices."""

import pytest
import torch
import torch.distributed as dist
from conftest import dense
from hypothesis import given
from hypothesis import strategies as st
from rank_processes import joined, on_ranks

from hf_stateless import PRESETS, StatelessOptimizer
from hf_stateless.ranks import ways
from hf_stateless.ranks.owners import assign_owners, whitening_cost


WORLD = 3
# Five matrices of four shapes: no multiple of the number of replicas.
SHAPES = [(9, 4), (4, 9), (9, 4), (2, 5, 6), (1, 3)]
CHAINS = {name: PRESETS[name] for name in ("swan", "multinorm")}


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 9))
def test_every_matrix_has_an_owner_and_the_load_is_what_was_given_out(costs, ranks):
    load = [0] * ranks
    owners = assign_owners(costs, load)
    assert all(0 <= owner < ranks for owner in owners)
    assert load == [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(ranks)]
    # The greedy rule leaves no rank ahead of another by more than one matrix.
    assert max(load) - min(load) <= max(costs, default=0)


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 20)), max_size=6), st.integers(1, 9))
def test_matrices_of_one_shape_are_spread_evenly_whatever_came_before(classes, ranks):
    load = [0] * ranks
    for cost, count in classes:
        owners = assign_owners([cost] * count, load)
        owned = [owners.count(rank) for rank in range(ranks)]
        assert max(owned) - min(owned) <= 1
    assert max(load) - min(load) <= max((cost for cost, _ in classes), default=0)


def test_llama_blocks_are_balanced_over_eight_ranks():
    load = [0] * 8
    for shape, count in (((4096, 4096), 128), ((11008, 4096), 64), ((4096, 11008), 32)):
        assign_owners([whitening_cost(shape)] * count, load)
    assert len(set(load)) == 1


def stepped(preset, *, split, rank=0, dtype=torch.float32):
    """Weights after two steps; with a rank, its gradients are its own."""
    params = [torch.nn.Parameter(dense(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(SHAPES)]
    chain = {**preset.group(), "split_whitening": split}
    optimizer = StatelessOptimizer([{"params": params, "algorithm": "multinorm", **chain}], lr=0.1)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = dense(*p.shape, seed=100 * rank + 10 * step + i, dtype=dtype)
        if step:
            params[0].grad[0, 0] = float("nan")
        optimizer.step()
    return [p.detach() for p in params]


def worker(rank, folder):
    torch.set_num_threads(1)
    with joined(rank, folder, WORLD) as save:
        results = {"world": dist.get_world_size()}
        for name, preset in CHAINS.items():
            for dtype in (torch.float32, torch.bfloat16):
                results[name, "split", str(dtype)] = stepped(preset, split=True, dtype=dtype)
            results[name, "differing"] = stepped(preset, split=True, rank=rank)
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(ways, "BATCH_BYTES", 1)
                results[name, "one by one"] = stepped(preset, split=True)
        save(results)


@pytest.fixture(scope="module")
def results():
    return on_ranks(worker, WORLD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_replicas_that_share_the_whitening_get_the_bits_of_one_process(name, dtype, results):
    expected = stepped(CHAINS[name], split=False, dtype=dtype)
    for of_rank in results:
        assert of_rank["world"] == WORLD
        assert all(map(torch.equal, of_rank[name, "split", str(dtype)], expected))


@pytest.mark.parametrize("name", CHAINS)
def test_how_much_is_computed_in_a_turn_does_not_matter(name, results):
    for of_rank in results:
        assert all(map(torch.equal, of_rank[name, "one by one"], of_rank[name, "split", "torch.float32"]))


@pytest.mark.parametrize("name", CHAINS)
def test_ranks_whose_gradients_differ_keep_their_own_updates(name, results):
    for rank, of_rank in enumerate(results):
        expected = stepped(CHAINS[name], split=False, rank=rank)
        assert all(map(torch.equal, of_rank[name, "differing"], expected))
    assert not torch.equal(results[0][name, "differing"][1], results[1][name, "differing"][1])

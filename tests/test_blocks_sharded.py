"""Several matrices in one parameter, cut over two ranks anywhere, against one process."""

import pytest
import torch
from conftest import dense
from rank_processes import joined, on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_stateless import StatelessOptimizer
from hf_stateless.update.layout import layout_of, listed_layouts


WORLD = 2
# Cuts of the first dimension go between experts, through one, and through rows of all.
SHAPES = {"out_in*2": (8, 5), "out_in*3": (9, 5), "out_in/3": (5, 9), "in_out*3": (5, 9), "in_out/3": (9, 5)}
CHAINS = {
    "sinkgd": {},
    "swan": {"norms": ("row_standardize", "spectral"), "num_iterations": 1},
    "rows": {"norms": ("row_l2",), "num_iterations": 1},
    "columns": {"norms": ("col_l2",), "num_iterations": 1},
    "sign": {"norms": ("sign",), "num_iterations": 1},
    "momentum": {"norms": ("spectral",), "num_iterations": 1, "momentum": 0.9, "momentum_dtype": "float32"},
    "product": {"algorithm": "lora_product", "norms": ("spectral",), "num_iterations": 1},
}
PAIR = ("out_in*3", "out_in/3")
CASES = {
    f"{chain} {cut}": (chain, cut)
    for chain in CHAINS
    for cut in ("rows", "columns", "replicated")
    if (chain, cut) != ("product", "replicated")
}


def names_of(chain):
    return PAIR if chain == "product" else [*SHAPES, *SHAPES]  # two of each class, for owners


def gradient(layout, shape, step, seed):
    """In the first and the third step a matrix has none; in the second it has some in its last row or column only."""
    grad = dense(*shape, seed=100 * step + seed)
    matrices = layout_of(layout).as_matrix(grad)
    if step == 1:
        matrices[1, :-1, :-1] = 0
    else:
        matrices[1] = 0
    return grad


def weights(chain, mesh=None, placements=None):
    """The weights after three steps, with those of the matrix without gradient after the first."""
    names = names_of(chain)
    params = [dense(*SHAPES[name], seed=50 + i) for i, name in enumerate(names)]
    if mesh is not None:
        params = [distribute_tensor(p, mesh, placements) for p in params]
    params = [torch.nn.Parameter(p) for p in params]
    options = {"algorithm": "multinorm", "weight_decay": 0.1, "lr_scale": 0.5, **CHAINS[chain]}
    optimizer = StatelessOptimizer([{"params": params, "layouts": listed_layouts(names), **options}], lr=0.1)
    results = []
    for step in range(3):
        for i, (p, name) in enumerate(zip(params, names, strict=True)):
            grad = gradient(name, SHAPES[name], step, i)
            p.grad = grad if mesh is None else distribute_tensor(grad, mesh, placements)
        optimizer.step()
        results.append([(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in params])
    return results


def worker(rank, folder):
    torch.set_num_threads(1)
    with joined(rank, folder, WORLD) as save:
        mesh = init_device_mesh("cpu", (WORLD,))
        cuts = {"rows": [Shard(0)], "columns": [Shard(1)], "replicated": [Replicate()]}
        results = {case: weights(chain, mesh, cuts[cut]) for case, (chain, cut) in CASES.items()}
        results["split"] = weights("swan")  # plain tensors of replicas, which share the whitening
        save(results)


@pytest.fixture(scope="module")
def results():
    """What each of two ranks got, from one start of two processes."""
    return on_ranks(worker, WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "split"])
def test_ranks_together_do_what_one_does(case, results):
    chain = CASES.get(case, ("swan",))[0]
    expected, names = weights(chain), names_of(chain)
    starts = [dense(*SHAPES[name], seed=50 + i) for i, name in enumerate(names)]
    for rank in range(WORLD):
        torch.testing.assert_close(results[rank][case], expected, rtol=1e-4, atol=1e-5)
        first, second, third = results[rank][case]
        for i, name in enumerate(names):
            start, one, two, three = (layout_of(name).as_matrix(t[i])[1] for t in (starts, first, second, third))
            assert torch.equal(one, start)
            assert torch.equal(three, two)
            assert not torch.equal(two, one)

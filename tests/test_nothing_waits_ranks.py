"""On two processes too no step reads what lies on a GPU, and each road leaves the same bits."""

import logging

import pytest
import torch
from conftest import dense
from rank_processes import joined, on_ranks
from roads import DECAY, MOMENTUM, ROW, SINKGD, SWAN, of_cpus, of_gpus, spoil
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_stateless import StatelessOptimizer


WORLD = 2
KINDS = ("plain", "nan", "zero", "plain", "inf")
ROWS, COLUMNS, TWICE = (Shard(0),), (Shard(1),), (Shard(0), Shard(1))
UNEVEN, ONE_ROW, PAIR = ((9, 14), (9, 14), (1, 6)), ((1, 6),), ((2, 9), (6, 2))
FLOAT_MOMENTUM = {"momentum": 0.9, "momentum_dtype": "float32"}
GUARDED = ("plain",) * 17 + ("weak", "plain")
# Shapes, how they are cut, options of their group, kinds of gradients.
SHARDED = {
    **{f"{name} {cut}": (UNEVEN, cut, chain, KINDS)
       for name, chain in (("sinkgd", SINKGD), ("swan", SWAN), ("row", ROW)) for cut in (ROWS, COLUMNS)},
    "sinkgd one row": (ONE_ROW, ROWS, SINKGD, KINDS),
    "sinkgd replicated": (UNEVEN, (Replicate(),), SINKGD, KINDS),
    "sinkgd in_out": (UNEVEN, ROWS, {**SINKGD, "layout": "in_out"}, KINDS),
    "swan three in one": (((12, 5),), ROWS, {**SWAN, "layouts": "0=out_in*3"}, (*KINDS, "third")),
    "sinkgd momentum": (UNEVEN, ROWS, {**SINKGD, **MOMENTUM}, KINDS),
    "swan momentum": (UNEVEN, COLUMNS, {**SWAN, **FLOAT_MOMENTUM}, KINDS),
    "sinkgd min_signal": (UNEVEN, ROWS, {**SINKGD, "min_signal": 0.5}, GUARDED),
    "adamw": (((9, 14), (9,)), ROWS, {"algorithm": "adamw"}, KINDS),
    "sinkhorn_momentum": (UNEVEN, ROWS, {"algorithm": "sinkhorn_momentum"}, KINDS),
    "row_moment": (UNEVEN, ROWS, {"algorithm": "row_moment"}, KINDS),
    "factored": (UNEVEN, COLUMNS, {"algorithm": "factored"}, KINDS),
    "lora_product": (PAIR, ROWS, {"algorithm": "lora_product"}, KINDS),
}  # fmt: skip
# 19 steps of `min_signal` in one dtype are enough.
LEFT_OUT = {("sinkgd min_signal", "bfloat16")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def sharded(shapes, cut, options, kinds, dtype, road):
    """This rank's weights and states after steps with gradients of some kinds."""
    mesh = init_device_mesh("cpu", (WORLD,))
    params = [
        torch.nn.Parameter(distribute_tensor(dense(*s, seed=i, dtype=dtype), mesh, cut)) for i, s in enumerate(shapes)
    ]
    optimizer = StatelessOptimizer([{"params": params, "algorithm": "multinorm", **DECAY, **options}], lr=0.05)
    for step, kind in enumerate(kinds):
        for i, p in enumerate(params):
            grad = dense(*p.shape, dtype=dtype, seed=100 * step + i + 1)
            bad = kind == "weak" or i % 2 == step % 2 or len(params) == 1
            p.grad = distribute_tensor(spoil(grad, kind) if bad else grad, mesh, cut)
        with road():
            optimizer.step()
    return left(optimizer)


def left(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [*params, *(t for p in params for _, t in sorted(optimizer.state[p].items()))]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def replicas(rank, differ_in, road, messages):
    """Weights after each of some steps in which replicas share the whitening, if they have the same gradients."""
    params = [torch.nn.Parameter(dense(6, 9, seed=i)) for i in range(3)]
    group = {"params": params, "algorithm": "multinorm", "split_whitening": True, **SWAN, **DECAY}
    optimizer, after = StatelessOptimizer([group], lr=0.05), []
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = dense(6, 9, seed=10 * step + i + 1 + (1000 * rank if step in differ_in else 0))
        with road():
            optimizer.step()
        after.append([p.detach().clone() for p in params])
    return after


def released(road):
    """Weights and states after backward passes on replicas, in one of which no rank uses a table of AdamW's."""
    weight, table = (torch.nn.Parameter(dense(*shape)) for shape in ((6, 9), (5, 3)))
    for p in (weight, table):
        p._ddp_ignored = True
    groups = [{"params": [weight], "algorithm": "multinorm", **SINKGD}, {"params": [table], "algorithm": "adamw"}]
    optimizer = StatelessOptimizer([{**group, **DECAY} for group in groups], lr=0.05, release="all")
    for step in range(4):
        with road():
            optimizer.train()
            used = [weight] if step == 2 else [weight, table]
            sum((p * dense(*p.shape, seed=step + 1)).sum() for p in used).backward()
            optimizer.step()
            optimizer.zero_grad()
    return left(optimizer)


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def worker(rank, folder):
    torch.set_num_threads(1)
    messages = Messages()
    logging.getLogger("hf_stateless").addHandler(messages)
    with joined(rank, folder, WORLD) as save:
        results = {}
        for road in (of_cpus, of_gpus):
            gpu = road is of_gpus
            for name, (shapes, cut, options, kinds) in SHARDED.items():
                for dtype_name, dtype in DTYPES.items():
                    if (name, dtype_name) not in LEFT_OUT:
                        results[name, dtype_name, gpu] = sharded(shapes, cut, options, kinds, dtype, road)
            results["released", gpu] = released(road)
            messages.texts.clear()
            for differ_in in ((), (0, 1, 2, 3), (2, 3), (2,)):
                results["replicas", differ_in, gpu] = replicas(rank, differ_in, road, messages)
            results["texts", gpu] = list(messages.texts)
        save(results)


@pytest.fixture(scope="module")
def results():
    return on_ranks(worker, WORLD)


@pytest.mark.parametrize(("case", "dtype"), [(c, d) for c in SHARDED for d in DTYPES if (c, d) not in LEFT_OUT])
def test_shards_take_the_same_steps_on_both_roads(case, dtype, results):
    for of_rank in results:
        assert_same(of_rank[case, dtype, True], of_rank[case, dtype, False])


def test_gradients_that_no_rank_had_move_nothing_in_backward_on_both_roads(results):
    for of_rank in results:
        assert_same(of_rank["released", True], of_rank["released", False])
        assert of_rank["released", True][-1] == 3  # steps of the table, which one backward pass did not use


@pytest.mark.parametrize("differ_in", [(), (0, 1, 2, 3)])
def test_replicas_that_agree_or_differ_from_the_first_step_on_take_the_same_steps(differ_in, results):
    for of_rank in results:
        for ours, expected in zip(*(of_rank["replicas", differ_in, gpu] for gpu in (True, False)), strict=True):
            assert_same(ours, expected)


@pytest.mark.parametrize("differ_in", [(2, 3), (2,)])
def test_replicas_that_begin_to_differ_never_mix_their_gradients(differ_in, results):
    """The host learns of it one step later, so that nothing moves in that step; and it is said."""
    for of_rank in results:
        ours, expected = (of_rank["replicas", differ_in, gpu] for gpu in (True, False))
        assert_same([w for step in ours[:2] for w in step], [w for step in expected[:2] for w in step])
        assert_same(ours[2], ours[1])
        assert not any(map(torch.equal, ours[3], ours[2]))
        assert any("gradients of the processes differ" in text for text in of_rank["texts", True])
        assert not of_rank["texts", False]
    first, second = (of_rank["replicas", differ_in, True][3] for of_rank in results)
    assert all(map(torch.equal, first, second)) == (differ_in == (2,))


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

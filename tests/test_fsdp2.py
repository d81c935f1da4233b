"""Sharded steps on four gloo processes against one process: every cut of a matrix, and what is sent for it."""

from functools import cache

import pytest
import table_moments_runs
import torch
import torch.distributed as dist
from conftest import dense
from rank_processes import joined, on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from hf_stateless import PRESETS, StatelessOptimizer


WORLD = 4
STEPS = 2
SINKGD = {"norms": ("row_l2", "col_l2"), "num_iterations": 5}
SWAN = {"norms": ("row_standardize", "spectral"), "num_iterations": 1}
# Nine rows give four ranks 3, 3, 3 and none; one row gives three ranks nothing.
UNEVEN, ONE_ROW, EXPERTS, KERNELS = (9, 14), (1, 6), (3, 10, 7), (6, 4, 3, 3)
# Embedding tables of fewer rows than ranks, of rows for three of four ranks, and of rows for all.
TABLES = ((3, 8), (9, 14), (31, 6))
SHARD0, SHARD1, SHARD2 = (Shard(0),), (Shard(1),), (Shard(2),)
HYBRID, TWO_CUTS = (Replicate(), Shard(0)), (Shard(0), Shard(1))
CUTS_OF_TABLES = (SHARD0, HYBRID, SHARD1, TWO_CUTS, (Replicate(),))
CHAINS = {
    **{name: preset.group() for name, preset in PRESETS.items()},
    **{norm: {"norms": (norm,), "num_iterations": 1} for norm in ("sign", "frobenius", "col_l2", "row_standardize")},
    "col_l2+row_l2": {"norms": ("col_l2", "row_l2"), "num_iterations": 3},
}
OPERATOR = {**SINKGD, "scale": "operator"}
CHAINS |= {"sinkgd by operator": OPERATOR, "row_l2 by operator": {**OPERATOR, "norms": ("row_l2",)}}
MOMENTUM = {"momentum": 0.9, "momentum_dtype": "float32"}
CHAINS |= {"sinkgd with momentum": {**SINKGD, **MOMENTUM}, "swan with momentum": {**SWAN, **MOMENTUM}}
INT8 = {"momentum": 0.9, "momentum_dtype": "int8", "stochastic_rounding": False}
# Name of a case: shape, placements, options of its group.
CASES = {
    **{f"{chain}, rows": (UNEVEN, SHARD0, options) for chain, options in CHAINS.items()},
    **{f"{chain}, columns": (UNEVEN, SHARD1, options) for chain, options in CHAINS.items()},
    **{f"{chain}, in_out": (UNEVEN, SHARD0, {**options, "layout": "in_out"}) for chain, options in CHAINS.items()},
    **{f"{chain}, replicated rows": (UNEVEN, HYBRID, options) for chain, options in CHAINS.items()},
    "sinkgd, one row": (ONE_ROW, SHARD0, SINKGD),
    "sinkgd, one row in_out": (ONE_ROW, SHARD0, {**SINKGD, "layout": "in_out"}),
    "sinkgd, two cuts": (UNEVEN, TWO_CUTS, SINKGD),
    "sinkgd, replicated": (UNEVEN, (Replicate(),), SINKGD),
    "sinkgd, one iteration": (UNEVEN, SHARD0, {**SINKGD, "num_iterations": 1}),
    "sinkgd, convolution": (KERNELS, SHARD0, {**SINKGD, "layout": "conv"}),
    "sinkgd by operator, one row": (ONE_ROW, SHARD0, OPERATOR),
    "sinkgd by operator, one row in_out": (ONE_ROW, SHARD0, {**OPERATOR, "layout": "in_out"}),
    "sinkgd by operator, two cuts": (UNEVEN, TWO_CUTS, OPERATOR),
    "sinkgd by operator, convolution": (KERNELS, SHARD0, {**OPERATOR, "layout": "conv"}),
    "swan, two cuts": (UNEVEN, TWO_CUTS, SWAN),
    "swan, one row": (ONE_ROW, SHARD0, SWAN),
    "swan, convolution": (KERNELS, SHARD0, {**SWAN, "layout": "conv"}),
    "vector": ((7,), SHARD0, {"norms": ("frobenius",), "num_iterations": 1, "layout": "vector"}),
    **{
        f"{name}, experts {cut} {layout}": (EXPERTS, cut, {**CHAINS[name], "layout": layout})
        for name in ("sinkgd", "swan", "sinkgd by operator")
        for cut in (SHARD0, SHARD1, SHARD2)
        for layout in ("out_in", "in_out")
    },
    **{
        f"sinkgd, int8 momentum, {shape} {cut}": (shape, cut, {**SINKGD, **INT8})
        for shape, cut in ((UNEVEN, SHARD0), (UNEVEN, HYBRID), (ONE_ROW, SHARD0), (EXPERTS, SHARD0), (EXPERTS, SHARD1))
    },
    "swan, two cuts, momentum": (UNEVEN, TWO_CUTS, {**SWAN, **MOMENTUM}),
    "swan, width rule": (UNEVEN, SHARD0, {**SWAN, "width_rule": "spectral"}),
    "sinkgd, width rule, in_out": (UNEVEN, SHARD1, {**SINKGD, "width_rule": "fan_in", "layout": "in_out"}),
    "swan, width rule, two cuts": (UNEVEN, TWO_CUTS, {**SWAN, "width_rule": "fan_in"}),
}
BOUNDED = {"sinkgd": SINKGD, "swan": SWAN, "sinkgd by operator": OPERATOR}
# Factors on the gradient that leave an update of one process as it is, or nothing to update.
GRADIENTS = {"plain": 1.0, "tiny": 1e-30, "huge": 1e30, "zero": 0.0}


def gradient(shape, kind, step):
    if kind != "graded":
        return dense(*shape, seed=step) * GRADIENTS[kind]
    # Sizes that differ by more than the square of a float32 can hold, from row to row and from column to column.
    grad = dense(*shape, seed=step)
    for dim in range(len(shape)):
        exponents = torch.linspace(-9, 9, shape[dim]).view([-1 if d == dim else 1 for d in range(len(shape))])
        grad = grad * 10**exponents
    return grad


def take_steps(shape, place, options, kind="plain", count=2):
    """Step some weights of one shape, which `place` distributes as it does their gradients; return them whole."""
    params = [torch.nn.Parameter(place(dense(*shape, seed=7 + i))) for i in range(count)]
    optimizer = StatelessOptimizer(
        [{"params": params, "algorithm": "multinorm", "weight_decay": 0.1, **options}], lr=0.1
    )
    for step in range(STEPS):
        for i, p in enumerate(params):
            p.grad = place(gradient(shape, kind, STEPS * i + step))
        optimizer.step()
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in params]


def step_tables(place):
    """Step embedding tables by momentum, of which some rows get no gradient in some steps; return them whole."""
    params = [torch.nn.Parameter(place(dense(*shape, seed=i))) for i, shape in enumerate(TABLES)]
    optimizer = StatelessOptimizer([{"params": params, "algorithm": "sinkhorn_momentum", "weight_decay": 0.1}], lr=0.1)
    for step in range(STEPS):
        for i, p in enumerate(params):
            grad = dense(*TABLES[i], seed=STEPS * i + step)
            grad[step] = 0
            p.grad = place(grad)
        optimizer.step()
    tensors = [*params, *(optimizer.state[p]["momentum_buffer"] for p in params)]
    return [t.full_tensor().detach() if isinstance(t, DTensor) else t.detach() for t in tensors]


@cache
def mesh_of(dimensions):
    return init_device_mesh("cpu", (WORLD,) if dimensions == 1 else (2, WORLD // 2))


def place_by(placements, dtype=torch.float32):
    """The function that distributes whole tensors."""
    return lambda whole: distribute_tensor(whole.to(dtype), mesh_of(len(placements)), placements)


def run_spoiled(placements, options, value):
    """Spoil one entry of one of two gradients, which one rank alone holds."""
    spoiled, p = with_gradients([UNEVEN] * 2, placements)
    before = spoiled.full_tensor().detach().clone(), p.full_tensor().detach().clone()
    local = spoiled.grad.to_local()
    # The last part that is not empty, on all of its replicas.
    last = 2 if len(placements) == 1 else WORLD // 2 - 1
    if p.device_mesh.get_local_rank(len(placements) - 1) == last:
        local.view(-1)[0] = value
    optimizer = StatelessOptimizer([{"params": [spoiled, p], "algorithm": "multinorm", **options}], lr=0.1)
    optimizer.step()
    unchanged = [torch.equal(q.full_tensor(), b) for q, b in zip((spoiled, p), before, strict=True)]
    return unchanged, [optimizer.state[q]["step"].item() for q in (spoiled, p)]


def refused(placements, of_gradient=None, options=INT8):
    """The message about momentum in 8 bits for rows that are cut, or about a gradient that is cut in another way."""
    params = with_gradients([UNEVEN], placements)
    if of_gradient:
        params[0].grad = place_by(of_gradient)(dense(*UNEVEN))
    optimizer = StatelessOptimizer([{"params": params, "algorithm": "multinorm", **options}])
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)


def counted(params, options, steps=1):
    """How often each collective is called in a step."""
    optimizer = StatelessOptimizer([{"params": params, "algorithm": "multinorm", **options}], lr=0.1)
    with CommDebugMode() as mode:
        optimizer.step()
    return {str(operation).removeprefix("c10d."): count for operation, count in mode.get_comm_counts().items()}


def with_gradients(shapes, placements=SHARD0, dtype=torch.float32):
    place = place_by(placements, dtype)
    params = []
    for seed, shape in enumerate(shapes):
        params.append(torch.nn.Parameter(place(dense(*shape, seed=seed))))
        params[-1].grad = place(dense(*shape, seed=seed))
    return params


def run_counts():
    layer = [(16, 16)] * 4 + [(43, 16)] * 2 + [(16, 43)]
    counts = {f"sinkgd {n}": counted(with_gradients(layer * n), SINKGD) for n in (1, 3)}
    counts |= {f"swan {n}": counted(with_gradients(layer * n), SWAN) for n in (1, 3)}
    counts |= {f"sinkgd by operator {n}": counted(with_gradients(layer * n), OPERATOR) for n in (1, 3)}
    counts["sinkgd experts"] = counted(with_gradients([EXPERTS, *layer]), SINKGD)
    counts["sinkgd hybrid"] = counted(with_gradients(layer, HYBRID), SINKGD)
    counts["row norms"] = counted(with_gradients(layer), {"norms": ("row_l2",), "num_iterations": 1})
    counts["with adamw"] = with_adamw(layer)
    return counts


def with_adamw(layer):
    """Matrices of two groups, and three groups of AdamW as a model has them."""
    groups = [{"params": with_gradients(layer), "algorithm": "multinorm", **SINKGD} for _ in range(2)]
    groups += [{"params": with_gradients([(31, 16), (16,)]), "algorithm": "adamw"} for _ in range(3)]
    optimizer = StatelessOptimizer(groups, lr=0.1)
    with CommDebugMode() as mode:
        optimizer.step()
    return {str(operation).removeprefix("c10d."): count for operation, count in mode.get_comm_counts().items()}


def run_rounded():
    """Rank by rank, the bf16 weights of replicas and of shards after steps with stochastic rounding."""
    [p] = with_gradients([(8, 64)], HYBRID, torch.bfloat16)
    p.data.to_local().fill_(1.0)
    optimizer = StatelessOptimizer([{"params": [p], "algorithm": "multinorm", "lr_scale": 1.0, **SINKGD}], lr=2.0**-9)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return p.to_local().detach().clone()


def run_bounded(monkeypatch):
    """Steps with limits so small that squares are formed again in each iteration, and exchanges are cut."""
    from hf_stateless.ranks import sinkhorn as sharded_sinkhorn
    from hf_stateless.ranks import ways as distributed

    monkeypatch.setattr(sharded_sinkhorn, "_KEPT_BYTES", 300)
    monkeypatch.setattr(distributed, "EXCHANGE_BYTES", 300)
    results = {}
    for name, options in BOUNDED.items():
        params = with_gradients([UNEVEN] * 5)
        StatelessOptimizer([{"params": params, "algorithm": "multinorm", **options}], lr=0.1).step()
        results[name] = [p.full_tensor().detach() for p in params]
    return results


def worker(rank, folder):
    torch.set_num_threads(1)
    with joined(rank, folder, WORLD) as save:
        results = {"world": dist.get_world_size()}
        for case, (shape, placements, options) in CASES.items():
            for kind in (*GRADIENTS, "graded"):
                place = place_by(placements)
                assert isinstance(place(dense(*shape)), DTensor)
                results[case, kind] = take_steps(shape, place, options, kind)
        results["alone"] = {chain: take_steps(UNEVEN, place_by(SHARD0), CHAINS[chain], count=1) for chain in CHAINS}
        for chain, options in CHAINS.items():
            for placements in (SHARD0, SHARD1, HYBRID, TWO_CUTS):
                for value in (float("nan"), float("inf")):
                    results["spoiled", chain, str(placements), str(value)] = run_spoiled(placements, options, value)
        results["tables"] = {str(cut): step_tables(place_by(cut)) for cut in CUTS_OF_TABLES}
        results["moments"] = table_moments_runs.on_this_rank()
        results["refused"] = {str(cut): refused(cut) for cut in (SHARD1, TWO_CUTS)}
        results["refused"]["another cut"] = refused(SHARD0, SHARD1, MOMENTUM)
        results["counts"] = run_counts()
        results["rounded"] = run_rounded()
        with pytest.MonkeyPatch.context() as monkeypatch:
            results["bounded"] = run_bounded(monkeypatch)
        save(results)


@pytest.fixture(scope="module")
def results():
    """What each of four ranks got, from one start of four processes."""
    return on_ranks(worker, WORLD)


def on_one_process(shape, options, kind="plain", count=2):
    return take_steps(shape, lambda whole: whole, options, kind, count)


@pytest.mark.parametrize("kind", [*GRADIENTS, "graded"])
@pytest.mark.parametrize("case", CASES)
def test_every_cut_of_a_matrix_steps_as_on_one_process(case, kind, results):
    shape, _, options = CASES[case]
    expected = on_one_process(shape, options, kind)
    for of_rank in results:
        assert of_rank["world"] == WORLD
        torch.testing.assert_close(of_rank[case, kind], expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(expected[0], dense(*shape, seed=7)) == (kind == "zero")


@pytest.mark.parametrize("chain", CHAINS)
def test_a_matrix_whose_shape_no_other_has_steps_as_on_one_process(chain, results):
    for of_rank in results:
        expected = on_one_process(UNEVEN, CHAINS[chain], count=1)
        torch.testing.assert_close(of_rank["alone"][chain], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placements", CUTS_OF_TABLES, ids=str)
def test_tables_with_momentum_step_as_on_one_process_where_ranks_hold_no_row(placements, results):
    expected = step_tables(lambda whole: whole)
    for of_rank in results:
        torch.testing.assert_close(of_rank["tables"][str(placements)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", table_moments_runs.KEPT)
@pytest.mark.parametrize(("cut", "reduced"), [(cut, n) for cut, (_, n) in table_moments_runs.CUTS.items()])
def test_tables_with_second_moments_step_as_on_one_process(cut, reduced, rule, results):
    expected = table_moments_runs.step_tables(rule, lambda whole: whole)
    for of_rank in results:
        stepped, spoiled_is_left_alone, messages = of_rank["moments"][cut, rule]
        torch.testing.assert_close(stepped, expected, rtol=1e-5, atol=1e-5)
        assert spoiled_is_left_alone
        assert messages == ({"allreduce_": reduced} if reduced else {})


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("placements", [SHARD0, SHARD1, HYBRID, TWO_CUTS], ids=str)
@pytest.mark.parametrize("chain", CHAINS)
def test_what_is_not_finite_on_one_rank_leaves_the_matrix_unchanged_on_all(chain, placements, value, results):
    for of_rank in results:
        unchanged, steps = of_rank["spoiled", chain, str(placements), value]
        assert unchanged == [True, False]
        assert steps == [0, 1]


@pytest.mark.parametrize("placements", [SHARD1, TWO_CUTS], ids=str)
def test_momentum_in_8_bits_is_refused_where_rows_are_cut(placements, results):
    for of_rank in results:
        message = of_rank["refused"][str(placements)]
        assert "rows are cut over ranks" in message
        assert message.endswith("or type momentum_dtype=bfloat16.")
        assert "\n" not in message


def test_momentum_refuses_a_gradient_that_is_cut_in_another_way_than_its_weight(results):
    for of_rank in results:
        assert of_rank["refused"]["another cut"].endswith("redistribute them, or leave out momentum.")


@pytest.mark.parametrize("run", ["sinkgd 1", "sinkgd 3", "sinkgd experts", "sinkgd hybrid"])
def test_sinkgd_sends_one_all_reduce_per_iteration_whatever_the_number_of_matrices(run, results):
    assert all(of_rank["counts"][run] == {"allreduce_": SINKGD["num_iterations"]} for of_rank in results)


@pytest.mark.parametrize("count", [1, 3])
def test_operator_norms_add_two_all_reduces_whatever_the_number_of_matrices(count, results):
    expected = {"allreduce_": SINKGD["num_iterations"] + 2}
    assert all(of_rank["counts"][f"sinkgd by operator {count}"] == expected for of_rank in results)


def test_adamw_groups_add_one_all_reduce_of_flags_to_sinkgd(results):
    expected = {"allreduce_": SINKGD["num_iterations"] + 1}
    assert all(of_rank["counts"]["with adamw"] == expected for of_rank in results)


def test_swan_sends_two_all_to_alls_per_shape(results):
    assert all(of_rank["counts"]["swan 3"] == {"alltoall_base_": 2 * 3} for of_rank in results)


def test_swan_gathers_once_where_no_other_matrix_has_the_shape(results):
    for of_rank in results:
        assert of_rank["counts"]["swan 1"].pop("alltoall_base_") == 2 * 2
        assert list(of_rank["counts"]["swan 1"].values()) == [1]


def test_row_norms_send_one_small_all_reduce_per_shape(results):
    assert all(of_rank["counts"]["row norms"] == {"allreduce_": 3} for of_rank in results)


def test_rounding_noise_is_equal_on_replicas_and_differs_on_shards(results):
    # Ranks 0 and 2 replicate the upper rows, ranks 1 and 3 the lower ones; half of the entries are rounded down.
    weights = [of_rank["rounded"] for of_rank in results]
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(weights[1], weights[3])
    assert 0.3 < (weights[0] != weights[1]).float().mean() < 0.7


@pytest.mark.parametrize("name", BOUNDED)
def test_limits_of_memory_do_not_change_the_step(name, results):
    options = BOUNDED[name]
    params = [torch.nn.Parameter(dense(*UNEVEN, seed=seed)) for seed in range(5)]
    for seed, p in enumerate(params):
        p.grad = dense(*UNEVEN, seed=seed)
    StatelessOptimizer([{"params": params, "algorithm": "multinorm", **options}], lr=0.1).step()
    for of_rank in results:
        torch.testing.assert_close(of_rank["bounded"][name], [p.detach() for p in params], rtol=1e-5, atol=1e-5)

"""Updates in backward on two processes, DDP and FSDP2: as without hooks, and as in one process."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_models import (
    BLOCKS,
    STEPS,
    WORLD,
    Blocks,
    Tower,
    assert_close,
    built,
    step_once,
    tokens,
    trained_alone,
    weights_of,
)
from layerwise_ddp_runs import (
    REPLICATED,
    run_accumulated,
    run_by_hand,
    run_clipped,
    run_compiled,
    run_late,
    run_measured,
    run_partly_used,
    run_reentrant,
    run_refused,
    run_replicated,
    run_wrapped_twice,
)
from layerwise_fsdp2_runs import (
    COUNTED,
    SHARDED,
    run_broken_backward,
    run_counted,
    run_other_shapes,
    run_sharded,
    run_sharded_clipped,
    run_sharded_norm,
    run_used_in_part,
)
from rank_processes import on_ranks

from hf_stateless import StatelessOptimizer


pytestmark = pytest.mark.slow


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
        results |= {"other shapes": run_other_shapes(rank), "sharded, clipped by torch": run_sharded_clipped(rank)}
        torch.save(results, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    """What each of two ranks got, from one start of two processes."""
    return on_ranks(worker, WORLD)


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
        assert_close(layerwise, plain, 5e-6)  # clipping rounds the plain gradients of matrices once more
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
        assert_close(layerwise, plain, 5e-6)  # clipping rounds the plain gradients of matrices once more
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
        assert_close(layerwise, plain, 5e-6)  # clipping rounds the plain gradients of matrices once more


def test_an_error_in_backward_leaves_nothing_behind(results):
    for rank in range(WORLD):
        broken = results[rank]["broken"]
        assert broken["error"] == "backward failed"
        assert broken["unchanged"]
        assert_close(*broken["weights"], 1e-6)


def test_torch_clips_sharded_gradients_by_the_norm_of_all(results):
    layerwise, plain = results[0]["sharded, clipped by torch"]
    assert_close(layerwise, plain, 5e-6)  # clipping rounds the plain gradients of matrices once more


def test_sharded_state_of_another_shape_is_refused_by_name_before_anything_is_written(results):
    for of_rank in results:
        assert len(of_rank["other shapes"]) == 4 * 3 * 3
        for case, (message, unchanged) in of_rank["other shapes"].items():
            assert f"layers.0.w has {case.split(',')[0]} of shape" in str(message), case
            assert "expected (12, 8)" in message
            assert unchanged, case

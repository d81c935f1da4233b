"""`min_signal`: what is held back, what goes on, and that every process and every resumed run decides alike."""

import io
import json
import logging
import math
import subprocess
import sys

import pytest
import torch
from conftest import TINY_MODELS, dense
from documents import ROOT, page_with
from rank_processes import joined, on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_stateless import PRESETS, StatelessOptimizer, create_optimizer
from hf_stateless.optimizer.min_signal import measure_signal


WORLD, WARM_UP, FRACTION = 2, 16, 0.1
SHAPES = ((6, 9), (9, 6))
SCRIPT = ROOT / "recipes" / "benchmarks" / "zero_signal.py"


def build(place=lambda whole: whole, min_signal=FRACTION, name="sinkgd"):
    """Two groups of matrices, as layouts make them, and one of AdamW."""
    weights = [torch.nn.Parameter(place(dense(*shape, seed=i))) for i, shape in enumerate((*SHAPES, (7,)))]
    chain = {**PRESETS[name].group(), "min_signal": min_signal}
    groups = [{"params": [w], "algorithm": "multinorm", "weight_decay": 0.1, **chain} for w in weights[:2]]
    return weights, StatelessOptimizer([*groups, {"params": weights[2:], "algorithm": "adamw"}], lr=0.1)


def take_steps(weights, optimizer, scales, place=lambda whole: whole, first=0):
    """Step with gradients of given sizes; tell for each step which weights moved."""
    moved = []
    for step, scale in enumerate(scales, start=first):
        before = [whole(w) for w in weights]
        for i, w in enumerate(weights):
            w.grad = place(dense(*w.shape, seed=100 * step + i, scale=scale))
        optimizer.step()
        moved.append([not torch.equal(whole(w), b) for w, b in zip(weights, before, strict=True)])
    return moved


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def history(optimizer):
    """The norms that the optimizer remembers, the latest last."""
    norms = optimizer.state[optimizer.param_groups[0]["params"][0]].get("recent_norms", torch.zeros(0))
    return [norm for norm in norms.tolist() if norm]


def warmed_up(**options):
    weights, optimizer = build(**options)
    take_steps(weights, optimizer, [1.0] * WARM_UP)
    return weights, optimizer


# ---- What is held back


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("scale", "moves"), [(0.2, True), (0.05, False), (1e-30, False), (50.0, True)])
def test_a_weak_gradient_moves_the_adamw_part_only(name, scale, moves):
    weights, optimizer = warmed_up(name=name)
    assert take_steps(weights, optimizer, [scale], first=WARM_UP) == [[moves, moves, True]]


@pytest.mark.parametrize("min_signal", [0.0, FRACTION])
def test_without_the_option_and_before_enough_is_known_every_step_is_taken(min_signal):
    weights, optimizer = build(min_signal=min_signal)
    scales = [1.0] * (WARM_UP - 1) + [1e-3] + [1e-3] * (0 if min_signal else 3)
    assert all(all(moved) for moved in take_steps(weights, optimizer, scales))
    assert len(history(optimizer)) == (WARM_UP if min_signal else 0)


def test_the_norm_is_that_of_all_matrices_together():
    weights, optimizer = build()
    take_steps(weights, optimizer, [1.0])
    expected = math.hypot(*(w.grad.double().norm().item() for w in weights[:2]))
    assert history(optimizer) == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("min_signal", [0.0, FRACTION])
def test_exact_zero_changes_nothing_and_is_not_remembered(min_signal):
    weights, optimizer = warmed_up(min_signal=min_signal)
    before = history(optimizer)
    assert [moved[:2] for moved in take_steps(weights, optimizer, [0.0] * 3, first=WARM_UP)] == [[False, False]] * 3
    assert history(optimizer) == before
    assert optimizer.held_steps == 0


def test_four_of_five_empty_batches_are_held_back_and_the_others_are_taken():
    """A running median would be the norm of an empty batch here, and hold nothing back."""
    weights, optimizer = build()
    scales = [1.0 if step % 5 == 4 else 1e-3 for step in range(100)]
    moved = take_steps(weights, optimizer, scales)
    assert [m[0] for m in moved[WARM_UP:]] == [scale == 1.0 for scale in scales[WARM_UP:]]
    assert optimizer.held_steps == sum(not m[0] for m in moved)


def test_a_lower_level_of_all_gradients_is_accepted_in_the_end():
    weights, optimizer = warmed_up()
    take_steps(weights, optimizer, [1.0] * 64, first=WARM_UP)
    moved = [m[0] for m in take_steps(weights, optimizer, [1e-3] * 60, first=80)]
    assert moved == [False] * 58 + [True] * 2


def test_a_few_outliers_hold_nothing_back():
    weights, optimizer = build()
    scales = [1e4 if step % 16 == 3 else 1.0 for step in range(64)]
    assert all(m[0] for m in take_steps(weights, optimizer, scales))


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_gradient_that_is_not_finite_neither_holds_back_nor_counts(bad):
    weights, optimizer = warmed_up()
    before = history(optimizer)
    weights[0].grad, weights[1].grad = torch.full((6, 9), bad), dense(9, 6)
    start = [whole(w) for w in weights]
    optimizer.step()
    assert torch.equal(weights[0], start[0])
    assert not torch.equal(weights[1], start[1])
    assert history(optimizer) == before


def test_the_log_says_so_ever_more_rarely(caplog):
    weights, optimizer = warmed_up()
    with caplog.at_level(logging.WARNING):
        take_steps(weights, optimizer, [1e-3] * 9, first=WARM_UP)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split("(")[1].split(" so far")[0] for line in lines] == ["1", "2", "4", "8"]


def test_the_benchmark_holds_empty_steps_of_grpo_back_and_no_others(tmp_path):
    output = tmp_path / "results.json"
    words = ("--rows", "sinkgd, guarded", "--steps", "30", "--empty", "0.5", "--seeds", "0", "--samples", "1")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--learning_rates", "3e-3", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    alone, mixed = json.loads(output.read_text())["records"]
    assert (alone["steps"], alone["empty_steps"], alone["held_steps"]) == (15, 0, 0)
    # The first 16 steps are not judged; of the others every second one is empty.
    assert (mixed["steps"], mixed["empty_steps"], mixed["held_steps"]) == (30, 15, 7)


# ---- The option


def test_every_multi_normalized_group_of_a_model_is_guarded():
    options = {"min_signal": 0.25, "embeddings": "stateless"}
    groups = create_optimizer(TINY_MODELS["llama"](), "sinkgd", lr=1e-3, **options).param_groups
    assert len(groups) > 1
    assert all(group["min_signal"] == 0.25 for group in groups)


@pytest.mark.parametrize("name", PRESETS)
def test_layerwise_updates_refuse_it_with_the_fix(name):
    with pytest.raises(ValueError, match=rf"min_signal needs all gradients at once.*take optim='{name}'"):
        create_optimizer(TINY_MODELS["llama"](), f"{name}_layerwise", lr=1e-3, min_signal=0.1)
    group = {"params": [torch.nn.Parameter(dense(2, 2))], "algorithm": "multinorm", "min_signal": 0.1}
    with pytest.raises(ValueError, match="leave out min_signal, or release"):
        StatelessOptimizer([group], release="matrices")


# ---- Checkpoints


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("saved_after", [3, WARM_UP, 90])
def test_a_resumed_run_holds_the_same_steps_back(saved_after, caplog):
    scales = [1.0 if step % 3 else 0.09 + 0.01 * (step % 4) for step in range(110)]
    weights, straight = build()
    before = take_steps(weights, straight, scales[:saved_after])
    saved, halfway = through_file(straight.state_dict()), [whole(w) for w in weights]
    after = take_steps(weights, straight, scales[saved_after:], first=saved_after)
    assert 0 < straight.held_steps < 110 // 3
    resumed_weights, resumed = build()
    for w, value in zip(resumed_weights, halfway, strict=True):
        w.data.copy_(value)
    caplog.clear()
    resumed.load_state_dict(saved)
    assert caplog.records == []
    assert take_steps(resumed_weights, resumed, scales[saved_after:], first=saved_after) == after
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed_weights, strict=True))
    assert len(before) == saved_after


@pytest.mark.parametrize("saved_with", [0.0, FRACTION])
def test_the_guard_can_be_switched_on_and_off_on_resume(saved_with):
    _, optimizer = warmed_up(min_signal=saved_with)
    saved = through_file(optimizer.state_dict())
    other_weights, other = build(min_signal=FRACTION - saved_with)
    other.load_state_dict(saved)
    take_steps(other_weights, other, [1.0])
    assert len(history(other)) == (WARM_UP if saved_with else 1)


# ---- Several processes


def run(rank, folder):
    torch.set_num_threads(1)
    with joined(rank, folder, WORLD) as save:
        mesh = init_device_mesh("cpu", (WORLD,))
        results = {}
        for case, place in {
            "sharded": lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]),
            "replicated": lambda tensor: tensor,
        }.items():
            weights, optimizer = build(place)
            moved = take_steps(weights, optimizer, SCALES, place)
            results[case] = {"moved": moved, "norms": history(optimizer), "weights": [whole(w) for w in weights]}
        # Replicas whose norms lie on different sides of the threshold, as rounding errors of other hardware may do.
        grad = torch.tensor([1.0 + 1e-6 * (1 if rank else -1)])
        results["edge"] = measure_signal([grad], torch.full((64,), 10.0))
        save(results)


SCALES = [1.0] * WARM_UP + [1e-3, 1.0, 0.05, 0.2]


@pytest.fixture(scope="module")
def results():
    return on_ranks(run, WORLD)


@pytest.mark.parametrize("case", ["sharded", "replicated"])
def test_processes_decide_as_a_single_one(case, results):
    weights, optimizer = build()
    moved = take_steps(weights, optimizer, SCALES)
    assert [m[0] for m in moved[WARM_UP:]] == [False, True, False, True]
    for of_rank in results:
        assert of_rank[case]["moved"] == moved
        assert of_rank[case]["norms"] == pytest.approx(history(optimizer), rel=1e-6)
        torch.testing.assert_close(of_rank[case]["weights"], [whole(w) for w in weights], rtol=1e-5, atol=1e-5)


def test_processes_that_differ_by_a_rounding_error_decide_alike(results):
    assert results[0]["edge"] == results[1]["edge"] > FRACTION


def test_the_table_on_the_page_is_that_of_the_runs():
    records = json.loads((SCRIPT.parent / "results" / "zero-signal-cpu.json").read_text())["records"]
    runs = {
        "100 informative groups": ("sinkgd", 0),
        "with 400 empty groups in between": ("sinkgd", 400),
        "the same with `min_signal=0.1`": ("sinkgd, guarded", 400),
    }
    rows = []
    for title, (optimizer, empty) in runs.items():
        same = [
            r for r in records if (r["optimizer"], r["empty_steps"], r["learning_rate"]) == (optimizer, empty, 3e-3)
        ]
        ends = {r["seed"]: f"{r['after']:.2f}" for r in same}
        rows.append(f"| {title} | {ends[0]} | {ends[1]} |")
    assert page_with("\n".join(rows))


def test_the_table_of_learning_rates_of_grpo_is_that_of_the_runs():
    pytest.importorskip("trl")
    from zero_signal import rate_table

    records = json.loads((SCRIPT.parent / "results" / "grpo-rates-cpu.json").read_text())["records"]
    assert {r["empty_steps"] for r in records} == {0}
    assert page_with(rate_table(records))
    for optimizer in ("AdamW", "sinkgd", "swan"):
        ends = {}
        for r in records:
            if r["optimizer"] == optimizer:
                ends.setdefault(r["learning_rate"], []).append(r["after"])
        means = [sum(of_rate) / len(of_rate) for _, of_rate in sorted(ends.items())]
        assert 0 < means.index(max(means)) < len(means) - 1, "the best rate is an edge"

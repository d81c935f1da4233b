"""The Trainer's `deepspeed=` on two and four CPU processes; runs where DeepSpeed is installed."""

import importlib.util
from functools import partial

import pytest
import torch
from distributed_models import assert_close
from rank_processes import on_ranks
from zero_ranks import (
    CASES,
    LOADED,
    ON_FOUR,
    RECORDED,
    RESUMED,
    on_four,
    on_two,
    on_two_of_which_one_dies,
)
from zero_runs import IN_HALF, OVERFLOWS, SCALE, OneProcess, save_model, train


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a model is, and the checkpoints of all runs."""
    folder = tmp_path_factory.mktemp("zero")
    save_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def survivors(folder):
    """With what the runs ended of which a rank died in its fourth step."""
    dying = partial(on_two_of_which_one_dies, folder=folder)
    return {case: on_ranks(partial(dying, case=case), 2)[0] for case in RESUMED}


@pytest.fixture(scope="module")
def two(folder, survivors):
    return on_ranks(partial(on_two, folder=folder), 2)


@pytest.fixture(scope="module")
def four(folder, two):
    return on_ranks(partial(on_four, folder=folder), 4)


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_equals_one_process(case, two, tmp_path):
    optim, _, options = CASES[case]
    one = train(tmp_path, optim, batch_size=4, **options)
    for result in two:
        assert_close(result[case], one, 1e-5)


@pytest.mark.parametrize("case", LOADED)
def test_a_model_that_is_cut_while_it_is_loaded_equals_one_process(case, two, folder, tmp_path):
    optim, options = LOADED[case]
    one = train(tmp_path, optim, batch_size=4, loaded=folder / "model", **options)
    for result in two:
        assert_close(result[case], one, 1e-5)


@pytest.mark.parametrize("case", ON_FOUR)
def test_deepspeed_on_four_processes_equals_one(case, four, tmp_path):
    optim, _, options = ON_FOUR[case]
    one = train(tmp_path, optim, batch_size=8, **options)
    for result in four:
        assert_close(result[case], one, 1e-5)


@pytest.mark.parametrize("case", RECORDED)
def test_each_step_in_half_precision_equals_one_process_from_the_same_weights(case, two):
    optim, _, dtype = RECORDED[case]
    one, overflows = OneProcess(optim, dtype), None
    if dtype == torch.float16:
        one.scale, overflows = SCALE, OVERFLOWS
    (first, weights), (second, others) = (result[case] for result in two)
    assert len(weights) == IN_HALF + 1
    for step, of_ranks in enumerate(zip(first, second, strict=True)):
        before, after = weights[step : step + 2]
        assert_close(after, others[step + 1], 0.0)
        if step == overflows:  # nothing moves, and the next step shows that no average has
            one.scale /= 2
            assert_close(after, before, 0.0)
        else:
            assert_close(after, one.step(of_ranks, before), 1e-5)


@pytest.mark.parametrize("case", RESUMED)
def test_after_the_death_of_a_rank_the_other_ends_and_the_last_checkpoint_resumes_to_the_bit(case, survivors, two):
    assert survivors[case]["error"]
    for result in two:
        assert_close(result[f"{case}, resumed"], two[0][case], 0.0)


@pytest.mark.parametrize("case", RESUMED)
def test_deepspeed_refuses_to_resume_on_another_number_of_ranks(case, four):
    assert "used a DP world size of 2 but the current world size is 4" in four[0][f"{case}, resumed"]
    assert all(f"{case}, resumed" in result for result in four)

"""`StatelessOptimizer` as a torch optimizer: what a checkpoint keeps, schedules, closures, groups, copies."""

import copy
import io
import logging
import math
import pickle

import pytest
import torch
from conftest import dense
from optimizer_groups import assert_equal, each_algorithm, each_dtype, each_precision, group, parameter, take_steps

from hf_stateless import StatelessOptimizer, create_optimizer


STATES = {
    "multinorm": {"step"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "adamw_8bit": {"step", "exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax"},
    "sinkhorn_momentum": {"step", "momentum_buffer"},
    "row_moment": {"step", "row_moment", "row_weight"},
    "column_moment": {"step", "column_moment", "column_weight"},
    "factored": {"step", "row_moment", "row_weight", "column_moment", "column_weight", "table_moment"},
}


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- Checkpoints


@each_algorithm
@each_dtype
def test_a_resumed_run_is_equal_to_the_bit_and_keeps_dtypes(algorithm, dtype):
    def build():
        weights = [parameter(16, 24, dtype=dtype, seed=i) for i in range(2)]
        return StatelessOptimizer([group(*weights, algorithm=algorithm, weight_decay=0.1)], lr=0.01)

    straight, resumed = build(), build()
    halfway = take_steps(straight, range(3))
    saved = through_file(straight.state_dict())
    for p, value in zip(resumed.param_groups[0]["params"], halfway, strict=True):
        p.data.copy_(value)
    resumed.load_state_dict(saved)
    for p, entries in zip(resumed.param_groups[0]["params"], saved["state"].values(), strict=True):
        assert set(entries) == STATES[algorithm]
        assert {k: t.dtype for k, t in resumed.state[p].items()} == {k: t.dtype for k, t in entries.items()}
        assert resumed.state[p]["step"].dtype == torch.float32
    assert_equal(take_steps(resumed, range(3, 6)), take_steps(straight, range(3, 6)))


@each_algorithm
def test_state_is_made_by_the_first_step_and_is_no_larger_than_the_table_says(algorithm):
    weight = parameter(4, 512)
    optimizer = StatelessOptimizer([group(weight, algorithm=algorithm)], lr=0.01)
    assert not optimizer.state
    take_steps(optimizer, range(1))
    sizes = {name: t.numel() for name, t in optimizer.state[weight].items()}
    assert set(sizes) == STATES[algorithm]
    assert sizes.pop("step") == 1
    of_tables = algorithm in ("row_moment", "column_moment", "factored")
    known = {*weight.shape, 1} if of_tables else {weight.numel(), weight.numel() // 256}
    assert set(sizes.values()) <= known


def test_matrix_groups_hold_no_state_but_one_element():
    weights = [parameter(16, 32), parameter(3, 8, 8)]
    optimizer = StatelessOptimizer([group(*weights)], lr=0.01)
    take_steps(optimizer, range(2))
    assert [{k: tuple(t.shape) for k, t in optimizer.state[w].items()} for w in weights] == [{"step": (1,)}] * 2


def test_options_changed_at_resume_are_applied_with_a_warning(caplog):
    weight = parameter(8, 12)
    before = StatelessOptimizer([group(weight, num_iterations=5, weight_decay=0.1)], lr=0.01)
    take_steps(before, range(1))
    before.param_groups[0]["lr"] = 0.004
    after = StatelessOptimizer([group(weight, num_iterations=3, weight_decay=0.2, seed=7)], lr=0.01)
    with caplog.at_level(logging.WARNING):
        after.load_state_dict(through_file(before.state_dict()))
    options = {key: after.param_groups[0][key] for key in ("num_iterations", "weight_decay", "seed", "lr")}
    assert options == {"num_iterations": 3, "weight_decay": 0.2, "seed": 7, "lr": 0.004}
    (record,) = caplog.records
    saved, _, now = record.getMessage().removeprefix("The checkpoint was written with ").partition("; ")
    assert set(saved.split(", ")) == {"num_iterations=5", "seed=0", "weight_decay=0.1"}
    assert set(now.removeprefix("this run goes on with ")[:-1].split(", ")) == {
        "num_iterations=3",
        "seed=7",
        "weight_decay=0.2",
    }


@pytest.mark.parametrize(
    ("norms", "told"), [(("row_standardize", "spectral"), True), (("spectral",), True), (("row_l2", "col_l2"), False)]
)
def test_another_whitening_at_resume_is_told_where_the_chain_whitens(norms, told, caplog):
    weight = parameter(8, 12)
    saved = StatelessOptimizer([group(weight, norms=norms, whitening="newton_schulz", ns_dtype="float32")], lr=0.01)
    after = StatelessOptimizer([group(weight, norms=norms)], lr=0.01)
    with caplog.at_level(logging.WARNING):
        after.load_state_dict(through_file(saved.state_dict()))
    assert after.param_groups[0]["whitening"] == "polar_express"
    assert ["whitening='newton_schulz'" in line for line in caplog.messages] == ([True] if told else [])


CHANGES = [("sinkgd", "swan"), ("swan", "sinkgd"), ("sinkgd", "multinorm")]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_change_of_the_name_at_resume_is_one_warning(before, after, make_model, caplog):
    state = create_optimizer(make_model("llama"), before, lr=0.01).state_dict()
    resumed = create_optimizer(make_model("llama"), after, lr=0.01)
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(state)
    (record,) = caplog.records
    assert "norms=" in record.getMessage()


def test_an_unchanged_resume_warns_of_nothing(caplog):
    optimizer = StatelessOptimizer([group(parameter(8, 12)), group(parameter(8), algorithm="adamw")], lr=0.01)
    take_steps(optimizer, range(1))
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(through_file(optimizer.state_dict()))
    assert not caplog.records


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_a_rate_that_a_loaded_schedule_does_not_take_is_told(rate, caplog):
    def scheduled(lr):
        optimizer = StatelessOptimizer(
            [group(parameter(8, 12)), group(parameter(8), algorithm="adamw", lr=0.002)], lr=lr
        )
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    (before, schedule), (after, resumed) = scheduled(0.01), scheduled(rate)
    take_steps(before, range(1))
    schedule.step()
    with caplog.at_level(logging.WARNING):
        after.load_state_dict(through_file(before.state_dict()))
    resumed.load_state_dict(schedule.state_dict())
    resumed.step()
    assert after.param_groups[0]["lr"] == pytest.approx(0.01 / 3)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (rate != 0.01)
    assert all("asks for the learning rate 0.05 and the checkpoint was written with 0.01, " in line for line in told)


def test_the_state_of_another_optimizer_is_refused():
    weight = parameter(8, 12)
    optimizer = StatelessOptimizer([group(weight)], lr=0.01)
    with pytest.raises(ValueError, match=r"another optimizer than hf_stateless.*delete optimizer\.pt"):
        optimizer.load_state_dict(torch.optim.AdamW([weight]).state_dict())
    other = StatelessOptimizer([group(weight, algorithm="adamw")], lr=0.01)
    with pytest.raises(
        ValueError, match=r"groups .*'adamw', 1.*this run has .*'multinorm', 1.*same optim, embeddings"
    ):
        optimizer.load_state_dict(other.state_dict())


# ---- As a torch optimizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"needs algorithm=multinorm .*got None: type hf_stateless\.create_optimizer"),
        ({"algorithm": "sgd"}, r"needs algorithm=.*got 'sgd'"),
        ({"algorithm": "multinorm", "lr_scal": 1.0}, r"'lr_scal'"),
        ({"algorithm": "multinorm", "lr": -1.0}, r"finite number of at least 0, got -1"),
        ({"algorithm": "multinorm", "lr": math.inf}, r"finite number of at least 0, got inf"),
        ({"algorithm": "multinorm", "lr": math.nan}, r"finite number of at least 0, got nan"),
    ],
    ids=("bare parameters", "unknown algorithm", "unknown key", "negative lr", "infinite lr", "nan lr"),
)
def test_a_bad_group_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StatelessOptimizer([{"params": [parameter(2, 3)], **options}])


def test_a_list_of_parameters_is_refused():
    with pytest.raises(ValueError, match="needs algorithm="):
        StatelessOptimizer([parameter(2, 3)], lr=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 6, cycle_momentum=False),
        lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 4, cycle_momentum=False),
    ],
    ids=("LambdaLR", "LinearLR", "CosineAnnealingLR", "OneCycleLR", "CyclicLR"),
)
def test_each_step_takes_the_scheduled_learning_rate(make):
    weight = parameter(8, 12)
    optimizer = StatelessOptimizer([group(weight, lr_scale=0.5)], lr=0.1)
    scheduler = make(optimizer)
    rates = []
    for step in range(5):
        rates.append(scheduler.get_last_lr()[0])
        before = weight.detach().clone()
        take_steps(optimizer, [step])
        moved = (weight.detach() - before).square().mean().sqrt().item()
        assert moved == pytest.approx(rates[-1] * 0.5, rel=1e-4)
        scheduler.step()
    assert len(set(rates)) > 3 or len(set(rates[:4])) == 4


def test_schedules_that_cycle_a_momentum_are_refused_by_torch_with_the_word_to_type():
    optimizer = StatelessOptimizer([group(parameter(8, 12), momentum=0.9)], lr=0.1)
    for make in (torch.optim.lr_scheduler.OneCycleLR, torch.optim.lr_scheduler.CyclicLR):
        with pytest.raises(ValueError, match="cycle_momentum"):
            make(optimizer, 0.01, 6)


def test_a_closure_is_run_with_gradients_and_its_loss_returned():
    weight = parameter(8, 12)
    optimizer = StatelessOptimizer([group(weight)], lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.item() == pytest.approx(dense(8, 12).square().sum().item(), rel=1e-6)
    assert closure() < first
    optimizer.zero_grad()
    assert weight.grad is None


@each_algorithm
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=("copy", "pickle"))
def test_a_duplicate_goes_on_like_the_original(algorithm, duplicate):
    optimizer = StatelessOptimizer([group(parameter(16, 24), algorithm=algorithm)], lr=0.01)
    take_steps(optimizer, range(2))
    other = duplicate(optimizer)
    assert_equal(take_steps(other, range(2, 4)), take_steps(optimizer, range(2, 4)))


def test_a_group_that_is_added_later_is_trained():
    optimizer = StatelessOptimizer([group(parameter(8, 12))], lr=0.01)
    take_steps(optimizer, range(1))
    late = parameter(5, seed=3)
    optimizer.add_param_group(group(late, algorithm="adamw", lr=0.5))
    take_steps(optimizer, range(1, 2))
    torch.testing.assert_close((late.detach() - dense(5, seed=3)).abs(), torch.full((5,), 0.5), rtol=1e-4, atol=1e-6)


LATE = {
    "one tensor": lambda p: p,
    "a list": lambda p: [p],
    "a generator": lambda p: (q for q in [p]),
    "with its name": lambda p: [("late", p)],
}


@pytest.mark.parametrize("named", [True, False], ids=["among names", "without names"])
@pytest.mark.parametrize("form", LATE.values(), ids=LATE)
def test_a_late_group_needs_no_names_and_may_have_some(form, named):
    names = {"param_names": ["first"]} if named else {}
    optimizer = StatelessOptimizer([group(parameter(8, 12), **names)], lr=0.01)
    late = parameter(5, seed=3)
    optimizer.add_param_group({"params": form(late), "algorithm": "adamw"})
    assert optimizer.name_of(1) in ("parameter 1", "late")
    late.grad = torch.ones(5)
    optimizer.step()
    assert (late.detach() != dense(5, seed=3)).all()
    optimizer.load_state_dict(through_file(optimizer.state_dict()))


def test_a_late_group_without_a_rule_is_told_what_one_looks_like():
    optimizer = StatelessOptimizer([group(parameter(8, 12))], lr=0.01)
    with pytest.raises(ValueError, match=r"\{'params': \[...\], 'algorithm': 'adamw'\} for a group .* later"):
        optimizer.add_param_group({"params": [parameter(5)]})


@each_precision
def test_a_group_may_mix_dtypes(dtype):
    """A float32 norm before bfloat16 biases does not switch their stochastic rounding off."""
    first, second = torch.nn.Parameter(torch.ones(4, dtype=dtype)), torch.nn.Parameter(torch.ones(4096).bfloat16())
    optimizer = StatelessOptimizer([group(first, second, algorithm="adamw")], lr=2.0**-10)
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    optimizer.step()
    assert 1 - second.detach().float().mean().item() == pytest.approx(2.0**-10, rel=0.2)


def test_a_step_keeps_no_memory_but_its_state():
    import gc

    def held():
        gc.collect()
        return sum(t.nbytes for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))

    weights = [torch.nn.Parameter(torch.ones(2053, 500, dtype=torch.bfloat16)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = StatelessOptimizer([group(weights[0]), group(weights[1], algorithm="adamw")], lr=0.01)
    before = held()
    optimizer.step()
    state = sum(t.nbytes for entries in optimizer.state.values() for t in entries.values())
    assert held() - before <= state + 2**16


@pytest.mark.parametrize("options", [{}, {"layout": "conv"}, {"norms": ("row_l2", "spectral")}], ids=str)
def test_a_vector_among_matrices_is_refused_before_any_step(options):
    optimizer = StatelessOptimizer([group(parameter(4, 5))], lr=0.1)
    message = (
        r"^Parameter 1 of a group of 'multinorm' has shape \(4,\), .* algorithm='adamw', or with layout='vector'\.$"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group(parameter(4, 4), parameter(4), **options))
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group(group(parameter(4), layout="vector"))


def test_a_run_that_has_diverged_does_not_fill_its_log(caplog):
    params = [parameter(4, 5, seed=i) for i in range(8)]
    optimizer = StatelessOptimizer([group(*params)], lr=0.1)
    for _ in range(40):
        for p in params:
            p.grad = torch.full_like(p, float("nan"))
        optimizer.step()
    told = [record.getMessage() for record in caplog.records if "NaN or infinite" in record.getMessage()]
    assert optimizer.updates_not_finite == 320
    assert len(told) == 32 + 3  # and at 64, 128 and 256
    assert told[-1].endswith("256 updates were left out so far; the next line is at 512.")


def test_a_table_that_was_resized_under_a_live_optimizer_is_told_without_checkpoints():
    table = parameter(6, 4)
    optimizer = StatelessOptimizer([group(table, algorithm="adamw")], lr=0.1)
    take_steps(optimizer, [1])
    table.data, table.grad = torch.zeros(8, 4), None
    with pytest.raises(ValueError, match=r"such as resize_token_embeddings, make a new optimizer\.$"):
        take_steps(optimizer, [2])

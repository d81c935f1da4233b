"""Slices as ZeRO-3 leaves them, made here without DeepSpeed: what ranks update together equals one process."""

import contextlib
import sys
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_processes import joined, on_ranks
from test_zero_parts import CASES, STEPS, expected, gradients, model_of, spoiled

from hf_stateless.optimizer.partitioned import PartitionedOptimizer
from hf_stateless.ranks import slices
from hf_stateless.ranks.slices import SliceCut, shapes_shown, slice_cut
from hf_stateless.trainer.factory import optimizer_arguments


MOST_IN_A_PART = 3  # parameters, so that a group is in several parts


class Sliced:
    """A model of which DeepSpeed has taken the values: each rank holds slices of them."""

    def __init__(self, model, world, rank):
        self.values, self.world, self.rank = {}, world, rank
        for p in model.parameters():
            self.values[p] = p.data
            p.ds_shape, p.ds_numel = p.shape, p.numel()
            p.data = torch.empty(0)

    @contextlib.contextmanager
    def gathered(self, params):
        for p in params:
            p.data = self.values[p]
        try:
            yield
        finally:
            for p in params:
                p.data = torch.empty(0)

    def slices(self, tensors, rank):
        """What a rank holds of some tensors, filled up and one after the other."""
        cut = SliceCut(rank, self.world, tuple(t.numel() for t in tensors))
        whole = [torch.nn.functional.pad(t.flatten(), (0, -t.numel() % self.world)) for t in tensors]
        return torch.cat([t.view(self.world, cut.width(i))[rank] for i, t in enumerate(whole)])

    def take(self, params, part):
        """Put the slices of all ranks together as the values of some parameters."""
        parts = [torch.empty_like(part) for _ in range(self.world)]
        dist.all_gather(parts, part.detach()) if self.world > 1 else parts[0].copy_(part.detach())
        widths = [-(-p.ds_numel // self.world) for p in params]
        for p, pieces in zip(params, zip(*(of_rank.split(widths) for of_rank in parts), strict=True), strict=True):
            self.values[p].copy_(torch.cat(pieces)[: p.ds_numel].view(p.ds_shape))


def as_deepspeed(sliced):
    fake = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=sliced.gathered))
    return mock.patch.dict(sys.modules, deepspeed=fake)


def train_slices(case, world, rank, *, cut_before=False, bad=None):
    model, (_, name, options) = model_of(case), CASES[case]
    sliced = Sliced(model, world, rank) if cut_before else None
    with shapes_shown(model.parameters()):
        arguments = optimizer_arguments(model, name, options, lr=1e-2, weight_decay=0.1)
    for group in (group for group in arguments["params"] if group["algorithm"] == "multinorm"):
        group["split_whitening"] = True  # as the Trainer asks for
    optimizer = PartitionedOptimizer(**arguments)
    sliced = sliced or Sliced(model, world, rank)
    parts = []
    for group in optimizer.param_groups:
        whole, group["params"] = group["params"], []
        for first in range(0, len(whole), MOST_IN_A_PART):
            some = whole[first : first + MOST_IN_A_PART]
            parts.append((group, some, torch.nn.Parameter(sliced.slices([sliced.values[p] for p in some], rank))))
    for step in range(STEPS):
        grads = dict(zip(model.parameters(), shaped_gradients(model, step), strict=True))
        if step == bad:
            spoiled(grads.values())
        for group, some, part in parts:
            part.grad = sliced.slices([grads[p] for p in some], rank)
            group["params"] = [part]  # DeepSpeed shows one part after the other
            with as_deepspeed(sliced):
                optimizer.step()
            group["params"] = []
            sliced.take(some, part)
    return [sliced.values[p] for p in model.parameters()], [float(s["step"]) for s in optimizer.state.values()]


def shaped_gradients(model, step):
    with shapes_shown(model.parameters()):
        return gradients(model, step)


VARIED = [(case, False) for case in CASES] + [(case, True) for case in ("sinkgd", "swan")]
SPOILED = ("sinkgd", "swan", "momentum")


def worker(rank, folder, world):
    slices.GATHERED_BYTES = 4 * 2000  # several batches in a part
    with joined(rank, folder, world) as save:
        results = {(case, before): train_slices(case, world, rank, cut_before=before) for case, before in VARIED}
        save({**results, **{case: train_slices(case, world, rank, bad=1) for case in SPOILED}})


@pytest.fixture(scope="module", params=[2, 3])
def results(request):
    return on_ranks(partial(worker, world=request.param), request.param)


def apart(weights, one):
    return max(float((a - b).abs().max()) for a, b in zip(weights, one, strict=True))


@pytest.mark.parametrize(("case", "before"), VARIED)
def test_ranks_with_slices_equal_one_process(case, before, results):
    one = expected(case)
    for weights, steps in (result[case, before] for result in results):
        assert apart(weights, one) < 1e-6
        assert set(steps) == {STEPS}


@pytest.mark.parametrize("case", SPOILED)
def test_matrices_whose_gradient_is_not_finite_stay_on_all_ranks(case, results):
    matrices = [i for i, (name, _) in enumerate(model_of(case).named_parameters()) if "proj" in name]
    one = [expected(case, bad=1)[i] for i in matrices]
    assert apart(one, [expected(case)[i] for i in matrices]) > 1e-3
    for weights, _ in (result[case] for result in results):
        assert apart([weights[i] for i in matrices], one) < 1e-6


def test_on_one_rank_the_slices_are_whole():
    weights, _ = train_slices("sinkgd", 1, 0, cut_before=True)
    assert apart(weights, expected("sinkgd")) < 1e-6


def test_shapes_are_shown_for_a_while():
    model = model_of("sinkgd")
    shapes = [p.shape for p in model.parameters()]
    sliced = Sliced(model, 1, 0)
    with shapes_shown(model.parameters()):
        assert [p.shape for p in model.parameters()] == shapes
    assert {p.shape for p in model.parameters()} == {torch.Size([0])}
    with sliced.gathered(list(model.parameters())):
        assert apart(model.parameters(), model_of("sinkgd").parameters()) == 0


@pytest.mark.parametrize("wrong", ["values", "order", "length", "shape"])
def test_a_part_that_is_not_that_of_the_model_is_not_taken(wrong):
    params = [torch.nn.Parameter(torch.arange(6.0)), torch.nn.Parameter(torch.arange(5.0) + 10)]
    sliced = Sliced(torch.nn.ParameterList(params), 1, 0)
    part = sliced.slices(list(sliced.values.values()), 0)
    changed = {"values": part + 1, "order": part.flip(0), "length": part[:7], "shape": part.view(1, -1)}[wrong]
    with as_deepspeed(sliced):
        assert slice_cut(part, params).sizes == (6, 5)
        assert slice_cut(part[:6], params).sizes == (6,)
        assert slice_cut(changed, params) is None


@pytest.mark.parametrize(("rank", "places"), [(0, [(0, 3), (0, 1)]), (1, [(3, 6), (1, 2)]), (2, [(6, 7), (2, 2)])])
def test_a_rank_knows_which_slices_it_holds(rank, places):
    cut = SliceCut(rank, 3, (7, 2))
    assert [cut.place(i) for i in range(2)] == places
    assert [len(cut.piece(torch.arange(cut.size), i)) for i in range(2)] == [stop - start for start, stop in places]

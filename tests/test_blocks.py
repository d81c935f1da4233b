"""Several matrices in one parameter: each is its own, and one without gradient stays exactly where it is."""

import copy
import logging

import pytest
import torch
from conftest import dense, relative_error
from hypothesis import given
from hypothesis import strategies as st
from optimizer_groups import preset_group

from hf_stateless import PRESETS, StatelessOptimizer
from hf_stateless.optimizer.lora_product import Pair, update_pairs_
from hf_stateless.optimizer.rules import complete_group
from hf_stateless.update.layout import LAYOUTS, layout_at, layout_of, listed_layouts
from hf_stateless.update.width import WIDTH_RULES


# Where block e of a stored tensor is, written down without the layout.
PARTS = {
    "out_in*3": ((12, 5), lambda t, e: t[4 * e : 4 * e + 4]),
    "out_in/3": ((5, 12), lambda t, e: t[:, e::3]),
    "in_out*3": ((5, 12), lambda t, e: t[:, 4 * e : 4 * e + 4].mT),
    "in_out/3": ((12, 5), lambda t, e: t[e::3].mT),
    "conv*3": ((6, 3, 2, 2), lambda t, e: t[2 * e : 2 * e + 2].flatten(1)),
    "in_outs*3": ((5, 6, 2), lambda t, e: t[:, 2 * e : 2 * e + 2].flatten(1).mT),
}
each_layout = pytest.mark.parametrize("layout", PARTS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHAINS = {
    **{name: p.group() for name, p in PRESETS.items()},
    "eigh": {"norms": ("row_standardize", "spectral"), "num_iterations": 1, "whitening": "eigh"},
    "nsds": {"norms": ("spectral",), "num_iterations": 1, "whitening": "nsds"},
    "polar": {"norms": ("spectral",), "num_iterations": 1, "whitening": "polar_express"},
    "half": {"norms": ("spectral",), "num_iterations": 1, "whitening": "newton_schulz", "ns_dtype": "float16"},
    "sign": {"norms": ("sign",), "num_iterations": 1},
    "frobenius": {"norms": ("frobenius",), "num_iterations": 1},
    "rows": {"norms": ("row_l2",), "num_iterations": 1},
}
MOMENTA = {"none": {}, **{kind: {"momentum": 0.9, "momentum_dtype": kind} for kind in ("float32", "bfloat16", "int8")}}


def stepped(params, grads, chain="sinkgd", steps=1, **options):
    params = [torch.nn.Parameter(p.clone()) for p in params]
    group = {"params": params, "algorithm": "multinorm", "lr_scale": 0.5, **CHAINS[chain], **options}
    optimizer = StatelessOptimizer([group], lr=0.1)
    for _ in range(steps):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    return [p.detach() for p in params]


def without_gradient(grad, layout, blocks):
    for e in blocks:
        PARTS[layout][1](grad, e).zero_()
    return grad


@each_layout
def test_each_matrix_is_found_where_it_lies_and_put_back(layout):
    shape, part = PARTS[layout]
    whole, found = dense(*shape), layout_of(layout)
    matrices = found.as_matrix(whole)
    assert torch.equal(matrices, torch.stack([part(whole, e) for e in range(3)]))
    assert found.sizes(shape) == tuple(matrices.shape[1:])
    assert torch.equal(found.back(matrices, shape), whole)
    assert torch.equal(found.as_matrix(found.spread(torch.arange(3), shape))[:, 0, 0], torch.arange(3))
    torch.testing.assert_close(found.norms(whole), torch.stack([part(whole, e).norm() for e in range(3)]))


def test_a_weight_with_a_dimension_for_heads_is_one_matrix():
    """XLNet's q, k, v (in, heads, size), by what its einsum does."""
    weight, x = dense(6, 2, 4), dense(3, 6, seed=1)
    matrix = LAYOUTS["in_outs"].as_matrix(weight)
    torch.testing.assert_close(x @ matrix.mT, torch.einsum("bh,hnd->bnd", x, weight).flatten(1))
    assert LAYOUTS["in_outs"].sizes(weight.shape) == (8, 6)
    (stepped_one,) = stepped([weight], [dense(6, 2, 4, seed=2)], "swan", layout="in_outs")
    (expected,) = stepped([matrix], [LAYOUTS["in_outs"].as_matrix(dense(6, 2, 4, seed=2))], "swan")
    torch.testing.assert_close(LAYOUTS["in_outs"].as_matrix(stepped_one), expected)


@given(
    layout=st.sampled_from(list(PARTS)),
    chain=st.sampled_from(list(CHAINS)),
    dtype=st.sampled_from(DTYPES),
    width_rule=st.sampled_from(WIDTH_RULES),
    momentum=st.sampled_from([{}, MOMENTA["float32"]]),
    empty=st.sets(st.integers(0, 2), max_size=2),
    seed=st.integers(0, 1000),
)
def test_each_matrix_moves_as_a_parameter_of_its_own(layout, chain, dtype, width_rule, momentum, empty, seed):
    shape, part = PARTS[layout]
    weight, grad = dense(*shape, dtype=dtype, seed=seed), dense(*shape, dtype=dtype, seed=seed + 1)
    without_gradient(grad, layout, empty)
    options = {"width_rule": width_rule, "weight_decay": 0.1, "stochastic_rounding": False, **momentum}
    (whole,) = stepped([weight], [grad], chain, layout=layout, **options)
    alone = stepped([part(weight, e) for e in range(3)], [part(grad, e) for e in range(3)], chain, **options)
    # Sums in another order differ in the last digit, which whitening amplifies up to 990 times.
    least, atol = (1e-3, 2e-4) if "spectral" in CHAINS[chain]["norms"] else (1e-5, 1e-5)
    coarse = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}.get(dtype, least)
    for e in range(3):
        torch.testing.assert_close(part(whole, e), alone[e], rtol=coarse, atol=atol)
        assert torch.equal(part(whole, e), part(weight, e)) == (e in empty)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("chain", ["sinkgd", "swan", "sign"])
@each_layout
def test_a_matrix_without_gradient_keeps_every_bit_whatever_the_others_do(layout, chain, momentum):
    shape, part = PARTS[layout]
    for dtype in (torch.float32, torch.bfloat16):
        weight = dense(*shape, dtype=dtype)
        grads = [without_gradient(dense(*shape, dtype=dtype, seed=1), layout, [1])]
        (moved,) = stepped([weight], grads, chain, steps=3, layout=layout, weight_decay=0.1, **MOMENTA[momentum])
        assert torch.equal(part(moved, 1), part(weight, 1))
        assert all((part(moved, e) != part(weight, e)).float().mean() > 0.5 for e in (0, 2))


@pytest.mark.parametrize("momentum", ["float32", "int8"])
def test_what_an_average_holds_of_a_matrix_waits_for_its_next_gradient(momentum):
    shape, part = PARTS["out_in/3"]
    weight = torch.nn.Parameter(dense(*shape))
    group = {"params": [weight], "algorithm": "multinorm", "layout": "out_in/3", **MOMENTA[momentum]}
    optimizer = StatelessOptimizer([group], lr=0.1)
    averages = []
    for seed, empty in ((1, []), (2, [1]), (3, [1])):
        weight.grad = without_gradient(dense(*shape, seed=seed), "out_in/3", empty)
        before = part(weight.detach(), 1).clone()
        optimizer.step()
        averages.append(part(optimizer.state[weight]["momentum_buffer"].float(), 1).clone())
        assert torch.equal(part(weight.detach(), 1), before) == bool(empty)
    if momentum == "float32":
        torch.testing.assert_close(averages[2], averages[0], rtol=0, atol=0)
    assert averages[2].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_entry_in_one_matrix_holds_the_parameter_back(bad):
    weight, grad = dense(12, 5), dense(12, 5, seed=1)
    grad[1, 1] = bad
    assert torch.equal(stepped([weight], [grad], layout="out_in*3")[0], weight)


def test_stochastic_rounding_is_that_of_the_position():
    """A step of half the spacing from equal weights: matrices that drew equal noise would move alike."""
    ones = torch.ones(96, 64, dtype=torch.bfloat16)
    (moved,) = stepped([ones], [torch.ones_like(ones)], "sign", layout="out_in*3", lr_scale=10 * 2.0**-9)
    first, second, _ = moved.chunk(3)
    assert abs((first != second).float().mean().item() - 0.5) < 0.05


@pytest.mark.parametrize("release", [None, "matrices"])
def test_one_group_holds_weights_of_several_layouts(release):
    names = ["out_in", "out_in*3", "out_in/3", "out_in*4"]
    shapes = [(6, 5), (12, 5), (5, 12), (12, 5)]

    def optimized(groups, params):
        optimizer = StatelessOptimizer(groups, lr=0.1, release=release, order=[str(i) for i in range(4)])
        sum((p * dense(*p.shape, seed=i)).sum() for i, p in enumerate(params)).backward()
        optimizer.step()
        return [p.detach() for p in params]

    together = [torch.nn.Parameter(dense(*shape)) for shape in shapes]
    apart = copy.deepcopy(together)
    listed, numbers = {"layouts": listed_layouts(names)}, [str(i) for i in range(4)]
    one = optimized([preset_group("swan", *together, param_names=numbers, **listed)], together)
    each = zip(apart, names, numbers, strict=True)
    several = optimized([preset_group("swan", p, layout=name, param_names=[i]) for p, name, i in each], apart)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))
    assert [layout_at({"layout": "out_in", **listed}, i).name for i in range(4)] == names


def test_a_checkpoint_from_before_goes_on_without_a_word(caplog):
    weight = torch.nn.Parameter(dense(12, 5))
    old = StatelessOptimizer([preset_group("swan", weight)], lr=0.1)
    weight.grad = dense(12, 5, seed=1)
    old.step()
    saved = old.state_dict()
    del saved["param_groups"][0]["layouts"]
    new = StatelessOptimizer([preset_group("swan", weight, layouts="0=out_in*3")], lr=0.1)
    with caplog.at_level(logging.WARNING):
        new.load_state_dict(saved)
    assert caplog.messages == []
    assert new.param_groups[0]["layouts"] == "0=out_in*3"
    assert new.state[weight]["step"].item() == 1


@pytest.mark.parametrize(
    ("layout", "shape", "told"),
    [
        ("out_in*5", (12, 4), "divides the 12 output features of a weight of shape (12, 4) among 5 matrices"),
        ("out_in/5", (4, 12), "divides the 12 input features"),
        ("in_out*7", (4, 12), "type layout='in_out' for one matrix"),
        ("out_in*", (12, 4), "Unknown layout 'out_in*'"),
        ("out_in*0", (12, 4), "Unknown layout"),
        ("out_in*-3", (12, 4), "Unknown layout"),
        ("vector*3", (12,), "Unknown layout"),
        ("rows", (12, 4), "expected out_in, in_out, conv, in_outs, vector"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(layout, shape, told):
    with pytest.raises(ValueError, match="layout") as error:
        complete_group({"params": [torch.zeros(shape)], "algorithm": "multinorm", "layout": layout}, lr=0.1)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", [("spectral",), ("row_l2", "col_l2"), ("sign",)], ids=str)
def test_pairs_of_experts_move_as_pairs_of_their_own(norms, dtype):
    experts, r, m, n = 3, 2, 6, 5
    A, B = dense(experts * r, n, dtype=dtype), dense(m, r * experts, dtype=dtype, seed=1)
    A.grad, B.grad = (dense(*p.shape, dtype=dtype, seed=2) for p in (A, B))
    of_A, of_B = (lambda t, e: t[r * e : r * e + r]), (lambda t, e: t[:, e::experts])
    of_A(A.grad, 1).zero_(), of_B(B.grad, 1).zero_(), of_A(A.grad, 2).zero_()
    group = complete_group({"params": [], "algorithm": "lora_product", "norms": norms, "weight_decay": 0.1}, lr=0.1)
    group["lr"] = 0.1
    alone = []
    for e in range(experts):
        a, b = of_A(A, e).clone(), of_B(B, e).clone()
        a.grad, b.grad = of_A(A.grad, e), of_B(B.grad, e)
        assert update_pairs_([Pair((a, b))], group) == [True]
        alone.append((a, b))
    start = A.clone(), B.clone()
    layouts = layout_of(f"out_in*{experts}"), layout_of(f"out_in/{experts}")
    assert update_pairs_([Pair((A, B), layouts=layouts)], group) == [True]
    coarse = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}.get(dtype, 1e-4)
    for e, (a, b) in enumerate(alone):
        torch.testing.assert_close(of_A(A, e), a, rtol=coarse, atol=1e-5)
        torch.testing.assert_close(of_B(B, e), b, rtol=coarse, atol=1e-5)
        assert torch.equal(of_A(A, e), of_A(start[0], e)) == (e in (1, 2))
        assert torch.equal(of_B(B, e), of_B(start[1], e)) == (e == 1)


def test_a_whitening_is_that_of_each_matrix():
    """Three of rank one: whitened together they would mix."""
    grad = torch.cat([torch.outer(dense(4, seed=e), dense(5, seed=9 + e)) for e in range(3)])
    (moved,) = stepped([torch.zeros(12, 5)], [grad], "eigh", layout="out_in*3", norms=("spectral",))
    for e in range(3):
        part = -moved[4 * e : 4 * e + 4] / 0.05
        assert relative_error(part, grad[4 * e : 4 * e + 4] / grad[4 * e : 4 * e + 4].square().mean().sqrt()) < 1e-4

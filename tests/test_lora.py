"""`lora=product`: the step in the geometry of B A, its scale, which pairs are found, runs that resume to the bit."""

import math
import tempfile
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from conftest import VOCAB_SIZE, dense, relative_error, tiny_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_stateless
from hf_stateless import StatelessOptimizer, create_lora_optimizer, create_optimizer, lora, multi_normalize
from hf_stateless.optimizer.lora_product import Pair, product_chain, product_steps, update_pairs_
from hf_stateless.trainer.adapters import lora_pairs


# PEFT 0.21 reads a name that transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

M, N, R = 24, 40, 4
SINKHORN = {"norms": ("row_l2", "col_l2"), "num_iterations": 5}
GROUP = {"norms": ("spectral",), "num_iterations": 1, "lr_scale": 1.0, "scaling": 2.0, "layout": "out_in"}


def polar(x):
    """U V^T of the singular value decomposition."""
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def symmetric_power(gram, exponent):
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def example(m=M, n=N, r=R, *, b=1.0, scaling=2.0, seed=0, dtype=torch.float64):
    """Factors A and B (entries about `b`), and their gradients for a random gradient of the weight."""
    A, B, G = dense(r, n, seed=seed), dense(m, r, seed=seed + 1) * b, dense(m, n, seed=seed + 2)
    A, B, G = (x.to(dtype) for x in (A, B, G))
    return A, B, scaling * B.T @ G, scaling * G @ A.T


def changes(A, B, step_a, step_b, scaling):
    """What each step takes from s B A, to first order."""
    return scaling * B @ step_a, scaling * step_b @ A


# ---- The step of one pair


@pytest.mark.parametrize(("m", "n", "r"), [(24, 40, 4), (40, 24, 4), (6, 5, 5), (9, 7, 1)])
def test_steps_are_the_polar_factors_in_the_metric_of_the_product(m, n, r):
    size, scaling = 1e-5, 0.5
    A, B, grad_a, grad_b = example(m, n, r, scaling=scaling)
    step_a, step_b = product_steps(A, B, grad_a, grad_b, size=size, scaling=scaling)
    P_A, P_B = symmetric_power(A @ A.T, -0.5), symmetric_power(B.T @ B, -0.5)
    assert relative_error(step_b, size / scaling * polar(grad_b @ P_A) @ P_A) < 1e-6
    # In the frame where A has orthonormal rows, B is B (A A^T)^{1/2}: its polar factor spans the same columns.
    assert relative_error(scaling * B @ step_a, size * B @ P_B @ polar(P_B @ grad_a)) < 1e-6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("b", [1.0, 1e-3])
def test_the_change_of_the_product_is_the_same_for_every_basis(b, seed):
    scaling, size = 2.0, 0.02
    A, B, grad_a, grad_b = example(b=b, seed=seed)
    expected = changes(A, B, *product_steps(A, B, grad_a, grad_b, size=size, scaling=scaling), scaling)
    # Any invertible matrix: one that turns, and one that stretches too, up to a condition number of about 20.
    orthogonal = torch.linalg.qr(dense(R, R, seed=seed + 9).double())[0]
    for basis in (orthogonal, orthogonal @ torch.diag(torch.tensor([0.3, 1.0, 2.0, 6.0]).double())):
        inverse = torch.linalg.inv(basis)
        A2, B2 = basis @ A, B @ inverse
        steps = product_steps(A2, B2, inverse.T @ grad_a, grad_b @ basis.T, size=size, scaling=scaling)
        for actual, wanted in zip(changes(A2, B2, *steps, scaling), expected, strict=True):
            assert relative_error(actual, wanted) < 1e-5


def test_the_sinkhorn_chain_does_not_depend_on_scale_order_or_signs_of_the_basis():
    A, B, grad_a, grad_b = example()
    options = {"size": 0.02, "scaling": 2.0, **SINKHORN}
    expected = changes(A, B, *product_steps(A, B, grad_a, grad_b, **options), 2.0)
    basis = 3 * torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]).double())[torch.tensor([2, 0, 3, 1])]
    inverse = torch.linalg.inv(basis)
    steps = product_steps(basis @ A, B @ inverse, inverse.T @ grad_a, grad_b @ basis.T, **options)
    for actual, wanted in zip(changes(basis @ A, B @ inverse, *steps, 2.0), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-6


@given(
    st.integers(1, 6),
    st.integers(18, 40),
    st.integers(18, 40),
    st.floats(0.01, 100),
    st.floats(-6, 6),
    st.sampled_from(["spectral", "row_l2+col_l2"]),
)
def test_the_size_of_the_change_does_not_depend_on_rank_alpha_or_the_factors(r, m, n, scaling, exponent, chain):
    size = 1e-4
    A, B, grad_a, grad_b = example(m, n, r, scaling=scaling)
    A, B = A * 10**exponent, B * 10**-exponent * 100 / scaling
    norms = {"norms": tuple(chain.split("+")), "num_iterations": 5}
    steps = product_steps(A, B, grad_a / 10**exponent, grad_b * 10**exponent, size=size, scaling=scaling, **norms)
    for change in changes(A, B, *steps, scaling):
        singular = torch.linalg.svdvals(change)[:r]
        # The step of A is shorter where B is not large against the step.
        assert singular.square().mean().sqrt() == pytest.approx(size, rel=5e-3)
        if chain == "spectral":
            assert singular.min() == pytest.approx(size, rel=2e-2)


@given(st.integers(-14, 1), st.integers(0, 1000), st.sampled_from(["spectral", "row_l2+col_l2"]))
def test_near_zero_factors_move_the_product_by_no_more_than_the_bound(exponent, seed, chain):
    """Exactly, the second-order term included, however small B is: nothing explodes after B = 0."""
    size, scaling = 0.05, 2.0
    A, B, grad_a, grad_b = example(b=10.0**exponent, seed=seed)
    norms = {"norms": tuple(chain.split("+")), "num_iterations": 5}
    step_a, step_b = product_steps(A, B, grad_a, grad_b, size=size, scaling=scaling, **norms)
    moved = scaling * ((B - step_b) @ (A - step_a) - B @ A)
    # A matrix of r singular values of root mean square 1 has none above sqrt(r).
    top = 1 if chain == "spectral" else math.sqrt(R)
    assert torch.linalg.matrix_norm(moved, 2) <= size * top * (2 + top / lora._STIFFNESS) * (1 + 1e-6)
    turn = torch.linalg.matrix_norm(symmetric_power(A @ A.T, -0.5) @ step_a, 2)
    assert turn <= top / lora._STIFFNESS * (1 + 1e-6)


@pytest.mark.parametrize("warmup", [1, 20])
def test_early_training_from_zero_is_bounded_step_by_step_and_learns(warmup):
    """W -> 0.5 |W - target|^2 from B = 0, with the learning rate of a warm-up: each step moves s B A by its size."""
    scaling, steps = 4.0, 60
    A, B = dense(R, N, seed=1).double() / N**0.5, torch.zeros(M, R).double()
    target = (dense(M, 2, seed=2) @ dense(2, N, seed=3)).double() / 10
    before = target.norm()
    for t in range(steps):
        size = 0.2 * min(1, (t + 1) / warmup) * (1 - t / steps)
        G = scaling * B @ A - target
        step_a, step_b = product_steps(A, B, scaling * B.T @ G, scaling * G @ A.T, size=size, scaling=scaling)
        new_A, new_B = A - step_a, B - step_b
        assert torch.equal(new_A, A) == (t == 0)
        moved = torch.linalg.matrix_norm(scaling * (new_B @ new_A - B @ A), 2)
        assert moved <= size * (2 + 1 / lora._STIFFNESS) * (1 + 1e-6)
        A, B = new_A, new_B
    assert (scaling * B @ A - target).norm() < 0.2 * before


def test_while_b_is_zero_a_is_left_alone_and_b_takes_a_full_step():
    A, B, grad_a, grad_b = example(b=0.0)
    step_a, step_b = product_steps(A, B, grad_a, grad_b, size=0.1, scaling=2.0)
    assert not step_a.any()
    singular = torch.linalg.svdvals(2.0 * step_b @ A)[:R]
    torch.testing.assert_close(singular, torch.full_like(singular, 0.1))


def test_while_a_is_zero_b_is_left_alone_and_a_takes_a_full_step():
    A, B, grad_a, grad_b = example()
    step_a, step_b = product_steps(0 * A, B, grad_a, 0 * grad_b, size=1e-3, scaling=2.0)
    assert not step_b.any()
    singular = torch.linalg.svdvals(2.0 * B @ step_a)[:R]
    torch.testing.assert_close(singular, torch.full_like(singular, 1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("chain", [{}, SINKHORN], ids=["spectral", "sinkhorn"])
def test_the_scale_of_the_gradient_does_not_count(scale, chain):
    A, B, grad_a, grad_b = example(dtype=torch.float32)
    expected = product_steps(A, B, grad_a, grad_b, size=0.1, scaling=2.0, **chain)
    actual = product_steps(A, B, grad_a * scale, grad_b * scale, size=0.1, scaling=2.0, **chain)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chain", [{}, SINKHORN], ids=["spectral", "sinkhorn"])
def test_stacked_pairs_are_independent(chain):
    pairs = [example(seed=seed) for seed in (0, 5, 11)]
    stacked = product_steps(*(torch.stack(t) for t in zip(*pairs, strict=True)), size=0.1, scaling=2.0, **chain)
    for i, pair in enumerate(pairs):
        alone = product_steps(*pair, size=0.1, scaling=2.0, **chain)
        torch.testing.assert_close((stacked[0][i], stacked[1][i]), alone, rtol=1e-9, atol=1e-12)


def test_factors_of_lower_rank_give_finite_steps_within_the_bound():
    """As PEFT's `orthogonal` initialisation makes them: B A = 0 though neither is zero."""
    basis = torch.linalg.qr(dense(R, R).double())[0]
    A, B = basis[:, :2] @ dense(2, N).double(), dense(M, 2).double() @ basis[:, 2:].T
    G = dense(M, N, seed=4).double()
    steps = product_steps(A, B, 2.0 * B.T @ G, 2.0 * G @ A.T, size=0.1, scaling=2.0)
    for change in changes(A, B, *steps, 2.0):
        assert 0 < torch.linalg.matrix_norm(change, 2) <= 0.1 * (1 + 1e-6)


# ---- In place


def pair_of(A, B, grad_a, grad_b, dtype=torch.float32):
    a, b = nn.Parameter(A.to(dtype, copy=True)), nn.Parameter(B.to(dtype, copy=True))
    a.grad, b.grad = grad_a.to(dtype, copy=True), grad_b.to(dtype, copy=True)
    return a, b


def optimizer_of(*factors, lr=0.1, **options):
    group = {"params": list(factors), "algorithm": "lora_product", **GROUP, **options}
    return StatelessOptimizer([group], lr=lr)


@pytest.mark.parametrize("chain", [{}, SINKHORN], ids=["spectral", "sinkhorn"])
@pytest.mark.parametrize(("m", "n", "r", "scaling"), [(24, 40, 4, 2.0), (60, 20, 1, 0.1), (20, 20, 8, 16.0)])
def test_one_learning_rate_means_the_same_for_every_pair_as_for_a_whole_matrix(m, n, r, scaling, chain):
    """The entries of the change of s B A have root mean square lr lr_scale."""
    lr, lr_scale = 1e-3, 0.5
    whole = lr * lr_scale * multi_normalize(dense(m, n))
    A, B, grad_a, grad_b = example(m, n, r, b=100.0 / scaling, scaling=scaling)
    a, b = pair_of(A, B, grad_a, grad_b, torch.float64)
    optimizer_of(a, b, lr=lr, lr_scale=lr_scale, scaling=scaling, **chain).step()
    for change in changes(A, B, A - a.detach(), B - b.detach(), scaling):
        assert change.square().mean().sqrt() == pytest.approx(whole.square().mean().sqrt().item(), rel=1e-2)


def test_weight_decay_is_decoupled_and_a_zero_gradient_or_rate_changes_nothing():
    A, B, grad_a, grad_b = example(dtype=torch.float32)
    plain, decayed = pair_of(A, B, grad_a, grad_b), pair_of(A, B, grad_a, grad_b)
    optimizer_of(*plain).step()
    optimizer_of(*decayed, weight_decay=0.5).step()
    for p, q, w in zip(plain, decayed, (A, B), strict=True):
        torch.testing.assert_close(q, p - 0.1 * 0.5 * w, rtol=1e-5, atol=1e-6)
    for lr, factor in ((0.1, 0.0), (0.0, 1.0)):
        a, b = pair_of(A, B, factor * grad_a, factor * grad_b)
        optimizer_of(a, b, lr=lr, weight_decay=0.5).step()
        assert torch.equal(a, A)
        assert torch.equal(b, B)


@pytest.mark.parametrize("spoiled", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_its_pair_alone_with_a_warning(spoiled, value, caplog):
    pairs = [pair_of(*example(seed=seed, dtype=torch.float32)) for seed in (0, 5, 11)]
    pairs[1][spoiled].grad.view(-1)[3] = value
    before = [[p.detach().clone() for p in pair] for pair in pairs]
    optimizer = optimizer_of(*(p for pair in pairs for p in pair))
    optimizer.step()
    unchanged = [[torch.equal(p, w) for p, w in zip(*both, strict=True)] for both in zip(pairs, before, strict=True)]
    assert unchanged == [[False, False], [True, True], [False, False]]
    assert [optimizer.state[p]["step"].item() for pair in pairs for p in pair] == [1, 1, 0, 0, 1, 1]
    assert "parameter 2" in caplog.text
    assert "NaN or infinite" in caplog.text


def test_a_factor_without_a_gradient_is_left_and_its_partner_steps_as_in_a_pair():
    A, B, grad_a, grad_b = example(dtype=torch.float32)
    both, alone = pair_of(A, B, grad_a, grad_b), pair_of(A, B, grad_a, grad_b)
    alone[0].grad = None
    optimizer_of(*both).step()
    optimizer_of(*alone).step()
    assert torch.equal(alone[0], A)
    torch.testing.assert_close(alone[1], both[1])


def test_an_odd_number_of_factors_is_refused():
    a, b = pair_of(*example(dtype=torch.float32))
    with pytest.raises(ValueError, match=r"A_0, B_0, A_1, B_1, \.\.\., got 3"):
        optimizer_of(a, b, nn.Parameter(torch.ones(2, 2)))


def test_bf16_factors_take_steps_below_their_precision_on_average():
    torch.manual_seed(0)
    A, B = torch.randn(8, 600).sign(), torch.randn(600, 8).sign()
    grads = torch.randn(8, 600), torch.randn(600, 8)
    exact, rounded = pair_of(A, B, *grads), pair_of(A, B, *grads, dtype=torch.bfloat16)
    rate = {"lr": 1e-3, "scaling": 1.0}
    optimizer_of(*exact, **rate).step()
    optimizer_of(*rounded, **rate).step()
    optimizer_of(*(nearest := pair_of(A, B, *grads, dtype=torch.bfloat16)), **rate, stochastic_rounding=False).step()
    assert torch.equal(nearest[0], A.bfloat16())
    assert torch.equal(nearest[1], B.bfloat16())
    for p, q, w in zip(exact, rounded, (A, B), strict=True):
        wanted, got = p - w, q.float() - w
        share = (got * wanted).sum() / (wanted * wanted).sum()
        assert share.item() == pytest.approx(1, abs=0.25)
        again = pair_of(A, B, *grads, dtype=torch.bfloat16)
        optimizer_of(*again, **rate).step()
        assert torch.equal(again[0], rounded[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_embedding_is_the_transposed_pair(dtype):
    A, B, grad_a, grad_b = example(dtype=torch.float32)
    linear, embedding = pair_of(A, B, grad_a, grad_b, dtype), pair_of(B.T, A.T, grad_b.T, grad_a.T, dtype)
    options = {"stochastic_rounding": False}
    optimizer_of(*linear, **options).step()
    optimizer_of(*embedding, layout="in_out", **options).step()
    assert not torch.equal(linear[0], A.to(dtype))
    torch.testing.assert_close(embedding[1].T, linear[0])
    torch.testing.assert_close(embedding[0].T, linear[1])


def test_convolutions_step_as_their_matrices():
    A, B, grad_a, grad_b = example(m=6, n=27, r=2, dtype=torch.float32)
    flat = pair_of(A, B, grad_a, grad_b)
    shapes = ((2, 3, 3, 3), (6, 2, 1, 1))
    kernels = pair_of(A.view(shapes[0]), B.view(shapes[1]), grad_a.view(shapes[0]), grad_b.view(shapes[1]))
    optimizer_of(*flat).step()
    optimizer_of(*kernels).step()
    torch.testing.assert_close(kernels[0].flatten(1), flat[0])
    torch.testing.assert_close(kernels[1].flatten(1), flat[1])


def test_batches_are_bounded_and_change_nothing(monkeypatch):
    together = [pair_of(*example(seed=seed, dtype=torch.float32)) for seed in (0, 5, 11)]
    apart = [pair_of(*example(seed=seed, dtype=torch.float32)) for seed in (0, 5, 11)]
    group = {**GROUP, "lr": 0.1, "weight_decay": 0.0}
    with torch.no_grad():
        update_pairs_([Pair(pair) for pair in together], group)
        monkeypatch.setattr(lora, "BATCH_BYTES", 0)
        update_pairs_([Pair(pair) for pair in apart], group)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)


# ---- Which pairs are found


def adapted(make_model, name="llama", **options):
    torch.manual_seed(0)
    return peft.get_peft_model(make_model(name), peft.LoraConfig(r=4, lora_alpha=8, **options))


def grouped(model, name="swan", **options):
    """(algorithm, scaling, names) of the groups of adapters; product by default."""
    optimizer = create_optimizer(model, name, lr=1e-2, **{"lora": "product", **options})
    groups = [g for g in optimizer.param_groups if g["algorithm"] in ("lora_product", "multinorm")]
    return [(g["algorithm"], g.get("scaling"), g["param_names"]) for g in groups]


def assert_paired(names):
    assert names
    assert len(names) % 2 == 0
    for a, b in zip(names[::2], names[1::2], strict=True):
        assert a != b
        assert a.replace("_A.", "_B.") == b


# Options of LoraConfig, and the scaling that its layers have.
PAIRED = {
    "plain": ({"target_modules": "all-linear"}, 2.0),
    "rslora": ({"target_modules": ["q_proj"], "use_rslora": True}, 4.0),
    "dora": ({"target_modules": ["q_proj", "down_proj"], "use_dora": True}, 2.0),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, 2.0),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 2.0),
    "bias": ({"target_modules": ["q_proj"], "lora_bias": True}, 2.0),
}


@pytest.mark.parametrize("case", PAIRED)
def test_the_factors_of_each_layer_are_a_pair(case, make_model):
    options, scaling = PAIRED[case]
    [(algorithm, found, names)] = grouped(adapted(make_model, **options))
    assert (algorithm, found) == ("lora_product", scaling)
    assert_paired(names)


@pytest.mark.parametrize("name", ["swan", "sinkgd", "multinorm", "swan_layerwise"])
def test_every_name_takes_the_option_with_its_own_chain(name, make_model):
    model = adapted(make_model, target_modules=["q_proj"])
    optimizer = create_lora_optimizer(model, name, lr=1e-2, lora="product")
    [group] = optimizer.param_groups
    expected = ("row_l2", "col_l2") if name == "sinkgd" else ("spectral",)
    assert (group["algorithm"], group["norms"], group["num_iterations"]) == (
        "lora_product",
        expected,
        product_chain(expected, 5)[1],
    )


def test_separate_is_the_default_and_leaves_each_factor_on_its_own(make_model):
    model = adapted(make_model, target_modules="all-linear")
    optimizer = create_optimizer(model, "swan", lr=1e-2)
    [(algorithm, scaling, names)] = grouped(model, lora="separate")
    assert (algorithm, scaling) == ("multinorm", None)
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.param_groups[0]["algorithm"] == "multinorm"


def test_several_adapters_are_paired_by_name_and_grouped_by_scaling(make_model):
    model = adapted(make_model, target_modules=["q_proj", "v_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    found = {scaling: names for _, scaling, names in grouped(model)}
    assert found.keys() == {2.0, 3.0}
    for adapter, names in (("default", found[2.0]), ("other", found[3.0])):
        assert_paired(names)
        assert all(f".{adapter}." in name for name in names)
    model.base_model.set_adapter("other")
    assert [scaling for _, scaling, _ in grouped(model)] == [3.0]


def test_alpha_patterns_give_groups_of_their_own(make_model):
    model = adapted(make_model, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 16})
    groups = grouped(model)
    assert sorted(scaling for _, scaling, _ in groups) == [2.0, 4.0]
    for _, _, names in groups:
        assert_paired(names)


def test_gpt2_layers_that_are_stored_transposed_have_ordinary_pairs(make_model):
    model = adapted(make_model, "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    [(algorithm, _, names)] = grouped(model)
    assert algorithm == "lora_product"
    assert_paired(names)


def test_an_embedding_is_paired_only_where_nothing_may_hold_state(make_model):
    model = adapted(make_model, target_modules=["q_proj", "embed_tokens"])
    [(_, _, names)] = grouped(model)
    assert not any("embedding" in name for name in names)
    groups = create_optimizer(model, "swan", lr=1e-2, lora="product", embeddings="stateless").param_groups
    table = next(g for g in groups if g["role"] == "embedding")
    assert (table["algorithm"], table["layout"]) == ("lora_product", "in_out")
    assert_paired(table["param_names"])
    apart = create_optimizer(model, "swan", lr=1e-2, embeddings="stateless").param_groups
    layouts = {g["param_names"][0].split(".")[-2]: g["layout"] for g in apart if g["role"] == "embedding"}
    assert layouts == {"lora_embedding_A": "in_out", "lora_embedding_B": "out_in"}


def test_kernels_are_paired_where_they_are_asked_for_and_grouped_convolutions_are_not():
    for groups, algorithm in ((1, "lora_product"), (2, "multinorm")):
        model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.Flatten(), nn.Linear(8, 2))
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
        found = grouped(model, target_modules=["lora_A", "lora_B"])
        assert {a for a, _, _ in found} == {algorithm}


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}


def frozen(model, letter):
    for name, p in model.named_parameters():
        if f"lora_{letter}" in name:
            p.requires_grad_(False)
    return model


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_factor_whose_partner_is_frozen_is_normalised_alone_with_one_line(letter, make_model, caplog):
    model = frozen(adapted(make_model, target_modules=["q_proj"]), letter)
    assert [algorithm for algorithm, _, _ in grouped(model)] == ["multinorm"]
    assert caplog.text.count("normalised on their own, as by lora=separate") == 1


def test_adapters_of_experts_are_normalised_alone_and_the_others_in_pairs(make_model, caplog):
    groups = grouped(adapted(make_model, "qwen3_moe", **EXPERTS))
    by_algorithm = {algorithm: names for algorithm, _, names in groups}
    assert all("q_proj" in name for name in by_algorithm["lora_product"])
    assert all("experts" in name for name in by_algorithm["multinorm"])
    assert caplog.text.count("normalised on their own") == 1


def test_a_factor_that_two_layers_share_is_in_no_pair(make_model):
    model = adapted(make_model, target_modules=["q_proj"])
    first, second = (layer.self_attn.q_proj for layer in model.base_model.model.model.layers)
    assert len(list(lora_pairs(model))) == 2
    second.lora_A["default"].weight = first.lora_A["default"].weight
    assert list(lora_pairs(model)) == []
    assert [algorithm for algorithm, _, _ in grouped(model)] == ["multinorm"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adalora_is_refused_in_one_line(make_model):
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"])
    model = peft.get_peft_model(make_model("llama"), config)
    with pytest.raises(ValueError, match="ADALORA") as error:
        create_optimizer(model, "swan", lr=1e-2, lora="product")
    assert "\n" not in str(error.value)


def test_a_model_without_adapters_is_refused_by_the_factory_for_them(make_model):
    with pytest.raises(ValueError, match=r"get_peft_model.*create_optimizer") as error:
        create_lora_optimizer(make_model("llama"), lr=1e-2)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"lora='both' is not separate \| product"):
        create_optimizer(make_model("llama"), "swan", lr=1e-2, lora="both")


# ---- Runs


@pytest.fixture(scope="module")
def rows():
    tokens = torch.randint(3, VOCAB_SIZE, (24, 10), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def trained(make_model, rows, folder, *, resume=None, stop=None, lora_options=None, **options):
    model = adapted(make_model, **{"target_modules": ["q_proj", "up_proj"], **(lora_options or {})})
    defaults = {"optim": "swan", "optim_args": "lora=product", "max_steps": 6, "learning_rate": 2e-2}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_steps": 3, "weight_decay": 0.1}
    args = TrainingArguments(
        output_dir=str(folder), warmup_steps=2, per_device_train_batch_size=2, **quiet, **{**defaults, **options}
    )
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[StopAt(stop)] if stop else None)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def factors_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora_options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_resumed_run_ends_with_the_same_bits_and_keeps_only_counters(lora_options, make_model, rows, tmp_path):
    whole = trained(make_model, rows, tmp_path / "whole", lora_options=lora_options)
    trained(make_model, rows, tmp_path / "half", stop=3, lora_options=lora_options)
    resumed = trained(make_model, rows, tmp_path / "half", resume=True, lora_options=lora_options)
    torch.testing.assert_close(factors_of(resumed.model), factors_of(whole.model), rtol=0, atol=0)
    optimizer = resumed.optimizer.optimizer
    pairs = [p for g in optimizer.param_groups if g["algorithm"] == "lora_product" for p in g["params"]]
    assert len(pairs) == 8
    # The first step of the warm-up has lr = 0 and does not count.
    assert all(list(optimizer.state[p]) == ["step"] and optimizer.state[p]["step"].item() == 5 for p in pairs)


def test_bf16_factors_resume_from_a_state_dict_to_the_bit(tmp_path):
    """PEFT loads adapters in float32, so a Trainer cannot resume in bf16; the optimizer can."""

    def steps(pair, optimizer, numbers):
        for number in numbers:
            for k, p in enumerate(pair):
                p.grad = dense(*p.shape, seed=10 * number + k, dtype=torch.bfloat16)
            optimizer.step()

    whole, half = (pair_of(*example(), torch.bfloat16) for _ in range(2))
    steps(whole, optimizer_of(*whole), range(6))
    stopped = optimizer_of(*half)
    steps(half, stopped, range(3))
    torch.save(stopped.state_dict(), tmp_path / "optimizer.pt")
    resumed = optimizer_of(*half)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(half, resumed, range(3, 6))
    torch.testing.assert_close(half, whole, rtol=0, atol=0)
    assert half[0].dtype == torch.bfloat16


def test_a_checkpoint_of_the_other_treatment_goes_on_with_a_warning(make_model, rows, tmp_path, caplog):
    for first, second in (("separate", "product"), ("product", "separate")):
        folder = tmp_path / first
        trained(make_model, rows, folder, stop=3, optim_args=f"lora={first}")
        caplog.clear()
        resumed = trained(make_model, rows, folder, resume=True, optim_args=f"lora={second}")
        assert resumed.state.global_step == 6
        assert "The checkpoint was written with algorithm=" in caplog.text
        algorithms = {g["algorithm"] for g in resumed.optimizer.optimizer.param_groups}
        assert algorithms == {"lora_product" if second == "product" else "multinorm"}


def batch(model, optimizer):
    loss = model(**tiny_inputs("llama")).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("release", ["matrices", "all"])
def test_layerwise_names_hold_the_gradients_of_a_pair_and_step_alike(release, make_model):
    runs = []
    for name, options in (("swan", {}), ("swan_layerwise", {"release": release})):
        model = adapted(make_model, target_modules="all-linear", modules_to_save=["lm_head"])
        optimizer = create_lora_optimizer(model, name, lr=1e-2, lora="product", **options)
        losses = [batch(model, optimizer) for _ in range(4)]
        assert losses[-1] < losses[0]
        runs.append(factors_of(model))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-7)


def test_every_trained_factor_moves_but_a_in_the_first_step(make_model):
    model = adapted(make_model, target_modules="all-linear", use_dora=True)
    optimizer = create_lora_optimizer(model, lr=1e-2, lora="product")
    before = factors_of(model)
    batch(model, optimizer)
    moved = {name for name, p in factors_of(model).items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_A" not in name}
    batch(model, optimizer)
    assert all(not torch.equal(p, before[name]) for name, p in factors_of(model).items())


# ---- Several processes


WORLD = 2


def sharded_steps(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        results = {}
        for placement in (Shard(0), Replicate()):
            mesh = init_device_mesh("cpu", (WORLD,))
            results[str(placement)] = stepped(lambda whole, p=placement, m=mesh: distribute_tensor(whole, m, [p]))
        torch.save(results, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def stepped(place, steps=3):
    """Some steps of pairs of odd sizes, one of rank 1, that `place` distributes; returned whole."""
    pairs = []
    for seed, (m, n, r) in enumerate([(9, 14, 3), (9, 14, 3), (7, 5, 1)]):
        A, B, _, _ = example(m, n, r, b=0.0, seed=seed, dtype=torch.float32)
        pairs.append((nn.Parameter(place(A)), nn.Parameter(place(B))))
    optimizer = optimizer_of(*(p for pair in pairs for p in pair), weight_decay=0.1)
    for step in range(steps):
        for i, pair in enumerate(pairs):
            for k, p in enumerate(pair):
                p.grad = place(dense(*p.shape, seed=100 * step + 10 * i + k))
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for pair in pairs for p in pair]


def test_sharded_pairs_step_as_on_one_process():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(sharded_steps, (folder,), nprocs=WORLD)
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    expected = stepped(lambda whole: whole)
    for of_rank in results:
        for placed in of_rank.values():
            torch.testing.assert_close([p.detach() for p in placed], expected, rtol=1e-5, atol=1e-6)


def test_the_option_is_public_where_the_documents_say():
    assert "create_lora_optimizer" in hf_stateless.__all__
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert create_lora_optimizer(model, "swan", lr=1e-2, lora="product").param_groups[0]["scaling"] == 4.0

"""`lora=product`: the step in the geometry of B A and its scale."""

import math

import pytest
import torch
from conftest import dense, relative_error
from hypothesis import given
from hypothesis import strategies as st
from lora_pairs import SINKHORN, M, N, R, changes, example, polar, symmetric_power

from hf_stateless.optimizer import lora_product
from hf_stateless.optimizer.lora_product import product_steps


# PEFT 0.21 reads a name that transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


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
    assert torch.linalg.matrix_norm(moved, 2) <= size * top * (2 + top / lora_product._STIFFNESS) * (1 + 1e-6)
    turn = torch.linalg.matrix_norm(symmetric_power(A @ A.T, -0.5) @ step_a, 2)
    assert turn <= top / lora_product._STIFFNESS * (1 + 1e-6)


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
        assert moved <= size * (2 + 1 / lora_product._STIFFNESS) * (1 + 1e-6)
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

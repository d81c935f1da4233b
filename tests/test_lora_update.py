"""`lora=product`: the step of the optimizer over pairs, in place."""

import pytest
import torch
from conftest import dense
from lora_pairs import GROUP, SINKHORN, changes, example, optimizer_of, pair_of
from torch import nn

from hf_stateless import multi_normalize
from hf_stateless.optimizer import lora_product
from hf_stateless.optimizer.lora_product import Pair, update_pairs_


# PEFT 0.21 reads a name that transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


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
        monkeypatch.setattr(lora_product, "BATCH_BYTES", 0)
        update_pairs_([Pair(pair) for pair in apart], group)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)

"""What whitenings share: symmetric products, whole or in blocks, and what a step of Polar Express takes of them."""

import pytest
import torch
from conftest import dense, relative_error
from torch.utils.flop_counter import FlopCounterMode

from hf_stateless.norms import gram
from hf_stateless.norms.gram import symmetric_product
from hf_stateless.norms.polar_express import polar_express


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (127, 20), (128, 20), (129, 300), (513, 40), (3, 200, 30), (2, 2, 140, 9)])
def test_a_symmetric_product_is_the_product(shape, dtype):
    x = dense(*shape, dtype=dtype)
    product = symmetric_product(x, x)
    assert relative_error(product, product.mT) <= 1e-3
    assert relative_error(product, x.double() @ x.double().mT) <= (4e-3 if dtype == torch.bfloat16 else 1e-5)
    square = symmetric_product(product, product)
    assert relative_error(square, product.double() @ product.double()) <= (4e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("amx", [True, False])
def test_symmetric_products_are_in_blocks_unless_these_cost_more_than_they_save(amx, dtype, monkeypatch):
    monkeypatch.setattr(gram, "cpu_has", lambda *names: amx)
    whole, in_blocks = (flops_of(lambda m=m: symmetric_product(*[dense(m, 40, dtype=dtype)] * 2)) for m in (256, 512))
    assert whole == 2 * 256 * 256 * 40
    share = in_blocks / (2 * 512 * 512 * 40)
    assert share == (1 if amx and dtype == torch.bfloat16 else 0.625)


@pytest.mark.parametrize(("shape", "share"), [((512, 512), 0.76), ((512, 1376), 0.83), ((1376, 512), 0.83)])
@pytest.mark.parametrize("amx", [True, False])
def test_a_polar_express_step_on_a_cpu_has_no_more_products_than_a_step_of_muon(shape, share, amx, monkeypatch):
    """Counted: Muon takes two products with X, and one of the size of its Gram matrix."""
    monkeypatch.setattr(gram, "cpu_has", lambda *names: amx)
    m, n = min(shape), max(shape)
    flops = flops_of(lambda: polar_express(dense(*shape), ns_steps=1, ns_dtype="bfloat16"))
    assert flops <= (1 if amx else share) * 2 * (2 * m * m * n + m**3)


def flops_of(act):
    with FlopCounterMode(display=False) as counter:
        act()
    return counter.get_total_flops()

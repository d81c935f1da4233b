"""The Triton kernels for 8-bit weights against their torch twins: on a CUDA device, or in Triton's interpreter."""

import pytest
import torch
from conftest import dense
from kernel_runs import DEVICE, kernels, key_of, random, twin_, update_  # noqa: F401

from hf_stateless.update.write import write_update_
from hf_stateless.weights.int8.codes import quantize_matrix
from hf_stateless.weights.int8.sharded import Int8Shard, Place
from hf_stateless.weights.int8.weight import Int8Weight


pytest.importorskip("triton")


def int8_weight(rows, columns, group_size, seed=0):
    weight = Int8Weight(*quantize_matrix(dense(rows, columns, scale=0.02, seed=seed), group_size))
    weight.move_(lambda t: t.to(DEVICE))
    weight.scale.data = weight.scale.data.to(DEVICE)
    return weight


GROUPS = [(5, 256, 64), (3, 254, 127), (4, 131, 128), (7, 300, None), (1, 1, None)]


@pytest.mark.parametrize(("rows", "columns", "group_size"), GROUPS)
@pytest.mark.parametrize("stochastic", [True, False])
def test_an_8_bit_update_writes_the_bytes_of_the_twin(monkeypatch, rows, columns, group_size, stochastic):
    """The products are exact, so that a multiply-add of the twin's processor rounds as a product and a sum do."""
    kernel, twin = (int8_weight(rows, columns, group_size) for _ in range(2))
    start, key = kernel.codes.clone(), key_of() if stochastic else None
    update = random(rows, columns, seed=1)
    write_update_(kernel, update.clone(), 2.0**-9, 1.0, key)
    with monkeypatch.context() as patch:
        patch.setenv("HF_STATELESS_KERNELS", "torch")
        write_update_(twin, update.clone(), 2.0**-9, 1.0, key)
    assert torch.equal(kernel.codes, twin.codes)
    assert torch.equal(kernel.scale, twin.scale)
    assert columns == 1 or not torch.equal(kernel.codes, start)


@pytest.mark.parametrize(("first", "last"), [(0, 3), (3, 7), (6, 7)])
def test_rows_of_an_8_bit_weight_are_rounded_as_in_the_whole_matrix(first, last):
    whole, update = int8_weight(7, 256, 64), random(7, 256, seed=1)
    place = Place(first=first, scale=whole.scale.data[first:last].clone())
    shard = Int8Shard(whole.codes[first:last].clone(), place, whole.dtype)
    assert shard.kernel == "int8"
    write_update_(whole, update.clone(), 2.0**-9, 1.0, key_of())
    write_update_(shard, update[first:last].clone(), 2.0**-9, 1.0, key_of())
    assert torch.equal(shard.codes, whole.codes[first:last])
    assert torch.equal(place.scale, whole.scale[first:last])


def test_sinkgd_on_8_bit_weights_differs_from_the_twin_by_roundings_only(monkeypatch):
    kernel, twin = ([int8_weight(40, 254, 127, seed=i) for i in range(2)] for _ in range(2))
    grads, keys = [random(40, 254, dtype=torch.bfloat16, seed=i) for i in range(2)], [key_of(0), key_of(1)]
    options = {"lr": 1e-3, "weight_decay": 0.1}
    assert update_(kernel, grads, keys, **options) == [True, True]
    twin_(monkeypatch, twin, grads, keys, **options)
    for ours, theirs in zip(kernel, twin, strict=True):
        assert (ours.codes != theirs.codes).sum() <= 100e-6 * ours.numel() + 1
        assert (ours.codes.int() - theirs.codes.int()).abs().max() <= 1
        assert torch.equal(ours.scale, theirs.scale)


def test_an_update_of_zero_keeps_every_8_bit_byte():
    weight = int8_weight(6, 254, 127)
    codes, scale = weight.codes.clone(), weight.scale.clone()
    write_update_(weight, torch.zeros(6, 254, device=DEVICE), 0.1, 1.0, key_of())
    update_([weight], [torch.zeros(6, 254, device=DEVICE)], [key_of()], weight_decay=0.5)
    assert torch.equal(weight.codes, codes)
    assert torch.equal(weight.scale, scale)


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("rate", ["number", "tensor"])
@pytest.mark.parametrize("choice", ["triton", "torch"])
def test_a_flag_on_the_device_keeps_every_byte_whatever_the_update_holds(value, rate, choice, monkeypatch):
    """With codes that no scale of ours would have, which a write of zero would change."""
    monkeypatch.setenv("HF_STATELESS_KERNELS", choice)
    factors = (0.1, 0.5) if rate == "number" else torch.tensor([0.1, 0.5], device=DEVICE).unbind()
    for usable in (torch.tensor(False, device=DEVICE), torch.tensor(True, device=DEVICE)):
        weights = [int8_weight(6, 254, 127), torch.nn.Parameter(random(6, 254, dtype=torch.bfloat16))]
        weights[0].codes //= 2
        for weight in weights:
            before = [t.clone() for t in getattr(weight, "stored", (weight.detach(),))]
            with torch.no_grad():
                write_update_(weight, torch.full((6, 254), value, device=DEVICE), *factors, key_of(), usable)
            after = getattr(weight, "stored", (weight.detach(),))
            assert torch.equal(after[0], before[0]) == (not usable)
            assert usable or torch.equal(after[-1], before[-1])

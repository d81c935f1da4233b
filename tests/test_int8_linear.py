"""8-bit layers as modules: products, gradients, memory, and how they are moved, copied and saved."""

import copy
import io

import pytest
import torch
from conftest import dense
from torch import nn

from hf_stateless import StatelessOptimizer
from hf_stateless.weights.int8.linear import Int8Linear
from hf_stateless.weights.int8.weight import Int8Weight


def layer(bias=False, dtype=torch.float32, group_size=16):
    linear = nn.Linear(48, 20, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(dense(20, 48, scale=0.1))
    return Int8Linear.from_float(linear, group_size)


def as_float(module):
    return module.to_float(module.weight.dtype)


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_the_dequantised_layer(shape, dtype, bias):
    ours = layer(bias, dtype)
    theirs = as_float(ours)
    results = []
    for module in (ours, theirs):
        x = dense(1, *shape, dtype=dtype)[0].requires_grad_()
        y = module(x)
        y.backward(dense(1, *y.shape, dtype=dtype, seed=1)[0])
        results.append([y.detach(), x.grad, *(p.grad for p in (module.weight, module.bias) if p is not None)])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_autocast_computes_in_its_dtype_and_leaves_a_gradient_of_the_weights():
    module = layer()
    with torch.autocast("cpu", torch.bfloat16):
        output = module(torch.randn(3, 48))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert module.weight.grad.dtype == torch.float32


def test_nothing_of_the_size_of_the_weight_is_kept_for_backward():
    module = layer(group_size=48)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(torch.randn(3, 48))
    assert {t.dtype for t in saved if t.numel() >= module.weight.numel()} == {torch.int8}
    assert module.weight.untyped_storage().nbytes() == 4 * module.out_features  # one NaN for each row


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_what_is_put_in_the_place_of_its_data_says_the_dtype(dtype):
    """As accelerate does for mixed precision, and FSDP2 where it moves a parameter to its device."""
    weight = layer().weight
    codes = weight.codes.clone()
    weight.data = weight.data.to(dtype)
    assert weight.dtype == weight.dequantize().dtype == dtype
    assert torch.equal(weight.codes, codes)
    assert weight.untyped_storage().nbytes() == dtype.itemsize * len(weight)
    assert weight.isnan().all()


def test_a_frozen_weight_gets_no_gradient_but_passes_one_on():
    module = layer()
    module.weight.requires_grad_(False)
    x = torch.randn(3, 48, requires_grad=True)
    module(x).sum().backward()
    assert module.weight.grad is None
    assert x.grad.abs().sum() > 0


def test_unfreezing_a_module_leaves_the_scales_frozen():
    """As training the last layers alone does; DDP would wait for the gradient of a scale that asks for one."""
    module = nn.Sequential(layer(), layer()).requires_grad_(False)
    for part in (module, copy.deepcopy(module)):
        part[1].requires_grad_(True)
        assert [name for name, p in part.named_parameters() if p.requires_grad] == ["1.weight"]


def test_what_takes_the_parameter_for_float_values_gets_nan_or_an_error():
    module = layer()
    assert module.weight.norm().isnan()
    with pytest.raises(RuntimeError, match="single memory location"):
        torch.optim.SGD([module.weight], lr=0.1).param_groups[0]["params"][0].data.mul_(2)


def assert_same(module, other):
    assert type(other.weight) is Int8Weight
    assert other.weight.scale is other.weight_scale
    assert other.weight.dtype == module.weight.dtype
    for name, tensor in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert [name for name, _ in other.named_parameters()] == ["weight", "bias", "weight_scale"]
    x = torch.randn(3, 48)
    assert torch.equal(module(x), other(x))


def test_a_copy_a_pickle_and_a_loaded_state_dict_are_the_same_layer_in_memory_of_their_own():
    module = layer(bias=True)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = layer(bias=True)
    loaded.weight.codes.zero_()
    assert not loaded.load_state_dict(module.state_dict()).missing_keys
    for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False), loaded):
        assert_same(module, other)
        assert other.weight.codes.data_ptr() != module.weight.codes.data_ptr()
        assert other.weight.untyped_storage().nbytes() == 4 * 20


def test_a_cast_changes_the_dtype_of_gradients_and_no_byte_of_the_weight():
    module = layer(bias=True)
    before, parameter = {k: v.clone() for k, v in module.state_dict().items()}, module.weight
    module.to(torch.bfloat16)
    assert module.weight is parameter
    assert (module.weight.dtype, module.bias.dtype, module.weight_scale.dtype) == (torch.bfloat16,) * 3
    module.double()
    assert (module.weight.dtype, module.weight_scale.dtype) == (torch.float64, torch.bfloat16)
    assert torch.equal(module.weight.codes, before["weight"].flatten(1))
    assert torch.equal(module.weight_scale, before["weight_scale"])
    assert module.weight.untyped_storage().nbytes() == 8 * 20
    module(torch.randn(2, 48, dtype=torch.float64)).sum().backward()
    assert module.weight.grad.dtype == torch.float64


def test_a_layer_without_memory_is_filled_by_a_state_dict():
    module = layer(bias=True)
    empty = Int8Linear(48, 20, True, 16, device="meta").to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    assert_same(module, empty)


def test_a_float_state_dict_is_quantised_as_it_is_loaded():
    linear, other = nn.Linear(48, 20), layer(bias=True)
    other.load_state_dict(linear.state_dict())
    assert_same(Int8Linear.from_float(linear, 16), other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, "Missing key"),
        ({"weight_scale": None}, "Missing key"),
        ({"weight": torch.full((20, 48), float("nan"))}, "NaN or infinite"),
        ({"weight_scale": torch.ones(20, 1, dtype=torch.bfloat16)}, "group_size"),
        ({"extra": torch.ones(1)}, "Unexpected key"),
    ],
    ids=str,
)
def test_a_state_dict_that_does_not_fit_is_refused(change, message):
    module = layer(bias=True)
    state = {name: t for name, t in {**module.state_dict(), **change}.items() if t is not None}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)


def test_a_parameter_that_a_wrapper_put_in_its_place_is_refused():
    module = layer()
    module.weight = nn.Parameter(torch.zeros(20, 48))
    with pytest.raises(RuntimeError, match="Wrappers other than DDP and FSDP2"):
        module(torch.randn(1, 48))


@pytest.mark.parametrize("norms", [("row_l2", "col_l2"), ("row_standardize", "spectral"), ("sign",)])
def test_a_zero_gradient_and_a_zero_rate_keep_every_byte_and_a_nan_is_skipped(norms):
    module = layer()
    group = {"params": [module.weight], "algorithm": "multinorm", "norms": norms, "weight_decay": 0.1}
    optimizer = StatelessOptimizer([group], lr=0.1)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    for lr, grad in ((0.1, 0.0), (0.0, 1.0), (0.1, float("nan"))):
        optimizer.param_groups[0]["lr"] = lr
        module.weight.grad = dense(20, 48) * grad
        optimizer.step()
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


@pytest.mark.parametrize("norms", [("row_l2", "col_l2"), ("row_standardize", "spectral"), ("sign",)])
def test_a_step_is_that_of_a_float_weight_up_to_one_code(norms):
    group = {"algorithm": "multinorm", "norms": norms, "weight_decay": 0.1}
    ours, theirs = layer(), as_float(layer())
    for module in (ours, theirs):
        module.weight.grad = dense(20, 48, seed=3)
        StatelessOptimizer([{"params": [module.weight], **group}], lr=0.01).step()
    quantum = ours.weight_scale.float().repeat_interleave(16, dim=1)
    apart = (ours.weight.dequantize(torch.float32) - theirs.weight.detach()) / quantum
    assert apart.abs().max() <= 1 + 1e-3
    assert apart.mean().abs() < 5 * 0.5 / apart.numel() ** 0.5
    assert not torch.equal(ours.weight.codes, layer().weight.codes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_writes_the_bytes_of_a_cpu():
    group = {"algorithm": "multinorm", "norms": ("sign",), "num_iterations": 1, "weight_decay": 0.1}
    modules = layer(), layer().to("cuda")
    for module in modules:
        optimizer = StatelessOptimizer([{"params": [module.weight], **group}], lr=0.01)
        for seed in range(3):
            module.weight.grad = dense(20, 48, seed=seed).to(module.weight.device)
            optimizer.step()
    assert modules[1].weight.device.type == "cuda"
    for name, tensor in modules[0].state_dict().items():
        assert torch.equal(modules[1].state_dict()[name].cpu(), tensor)

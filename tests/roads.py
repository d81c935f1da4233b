"""Steps on the road of a GPU, taken by CPU tensors, with everything forbidden that would wait for the device."""

import contextlib
import sys

import pytest
import torch
from conftest import dense
from torch.optim.adamw import adamw as torch_adamw
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stateless import StatelessOptimizer
from hf_stateless.optimizer import adamw
from hf_stateless.update import reads
from hf_stateless.weights.int8.linear import Int8Linear


READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2")
METHODS = ("tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
# What is done for tensors on CPU alone, by their device: tensors of a GPU without contents show the other side.
ON_CPU_ONLY = {
    ("sinkhorn.py", "_squares_"),
    ("noise.py", "_key_value"),
    ("adamw.py", "_codebook"),
    ("adamw.py", "adamw_state"),
    ("optimizer.py", "_get_value"),  # of torch, where its counters of steps are on CPU
}
# Where what has arrived on the host is read.
ARRIVED = {("reads.py", "read")}
SINKGD = {"norms": ("row_l2", "col_l2"), "num_iterations": 5}
SWAN = {"norms": ("row_standardize", "spectral"), "num_iterations": 1}
ROW = {"norms": ("row_l2",), "num_iterations": 1}
DECAY = {"weight_decay": 0.1}
BF16 = torch.bfloat16


def called_from(places):
    """Tell whether one of some functions, each a file and a name, is running."""
    frame = sys._getframe(2)
    while frame:
        if (frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name) in places:
            return True
        frame = frame.f_back
    return False


class _Operations(TorchDispatchMode):
    def __init__(self, allowed):
        super().__init__()
        self.allowed = allowed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        masks = [i for i in (args[1] if name in ("index", "index_put_") else ()) if i is not None]
        reading = name in READS or any(mask.dtype in (torch.bool, torch.uint8) for mask in masks)
        if (reading or _between_devices(name, args, kwargs)) and not called_from(self.allowed):
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **kwargs)


def _between_devices(name, args, kwargs):
    """Tell a copy from or to the host; one number may be handed to a kernel."""
    if name == "_to_copy":
        return kwargs.get("device") is not None and torch.device(kwargs["device"]).type != args[0].device.type
    return name == "copy_" and args[0].device.type != args[1].device.type and not kwargs.get("non_blocking")


class _Methods(TorchFunctionMode):
    def __init__(self, allowed):
        super().__init__()
        self.allowed = allowed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in METHODS and not called_from(self.allowed):
            raise AssertionError(f"Tensor.{func.__name__} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def nothing_waits(allowed=ARRIVED):
    """Forbid what reads a tensor on the host, or copies it there."""
    with _Operations(allowed), _Methods(allowed):
        yield


@contextlib.contextmanager
def of_gpus():
    """Take the road of a GPU with CPU tensors."""
    with pytest.MonkeyPatch.context() as patch, nothing_waits(ARRIVED | ON_CPU_ONLY):
        patch.setattr(reads, "_READ_AT_ONCE", ())
        patch.setattr(adamw, "adamw", not_capturable)
        yield


def not_capturable(*args, fused, capturable, **kwargs):
    """AdamW of torch, which is capturable on GPUs alone, and has to be where it is not fused."""
    assert fused or capturable
    return torch_adamw(*args, fused=fused, **kwargs)


of_cpus = contextlib.nullcontext


def numbers(shape, dtype, seed):
    """Random numbers of any shape, that of a single number too."""
    return dense(*(shape or (1,)), dtype=dtype, seed=seed).view(shape)


def floats(*shapes, dtype=torch.float32, **options):
    """A case: what makes a group of weights of some shapes."""

    def make():
        params = [torch.nn.Parameter(numbers(shape, dtype, i)) for i, shape in enumerate(shapes)]
        return {"params": params, "algorithm": "multinorm", **options}

    return make


def in_int8(*shapes, **options):
    def make():
        layers = [torch.nn.Linear(n, m, bias=False) for m, n in shapes]
        for i, layer in enumerate(layers):
            layer.weight.data = dense(*layer.weight.shape, seed=i)
        weights = [Int8Linear.from_float(layer, 8).weight for layer in layers]
        return {"params": weights, "algorithm": "multinorm", **options}

    return make


ODD = ((6, 9), (9, 6), (6, 9))
MOMENTUM = {"momentum": 0.9, "momentum_dtype": "int8"}
TABLE = ((12, 8), (5, 8))
OF_MATRICES = {
    "sinkgd": floats(*ODD, **SINKGD, **DECAY),
    "sinkgd bf16": floats(*ODD, dtype=BF16, **SINKGD, **DECAY),
    "sinkgd float16": floats(*ODD, dtype=torch.float16, **SINKGD, **DECAY),
    "sinkgd float64": floats(*ODD, dtype=torch.float64, **SINKGD, **DECAY),
    "sinkgd one matrix": floats((6, 9), **SINKGD, **DECAY),
    "sinkgd one matrix bf16, to nearest": floats((6, 9), dtype=BF16, stochastic_rounding=False, **SINKGD),
    "sinkgd experts": floats((3, 6, 9), layout="in_out", **SINKGD, **DECAY),
    "swan": floats(*ODD, **SWAN, **DECAY),
    "swan bf16": floats(*ODD, dtype=BF16, **SWAN, **DECAY),
    "swan, no decay": floats((1, 7), (7, 1), (1, 1), **SWAN),
    "convolution": floats((6, 4, 3, 3), layout="conv", **SWAN, **DECAY),
    "vectors": floats((7,), (5,), (7,), norms=("frobenius",), num_iterations=1, layout="vector", **DECAY),
    "three in one": floats((12, 5), layout="out_in", layouts="0=out_in*3", **SINKGD, **DECAY),
    "three in one bf16 momentum": floats((12, 5), dtype=BF16, layouts="0=out_in*3", **SWAN, **DECAY, **MOMENTUM),
    "width rule": floats(*ODD, width_rule="spectral", **ROW),
    "momentum int8": floats(*ODD, **SINKGD, **DECAY, **MOMENTUM),
    "momentum bf16": floats(*ODD, dtype=BF16, momentum=0.9, momentum_dtype="bfloat16", **SWAN, **DECAY),
    "momentum float32": floats(*ODD, momentum=0.9, momentum_dtype="float32", **SWAN, **DECAY),
    "int8 sinkgd": in_int8((6, 16), (6, 16), **SINKGD, **DECAY),
    "int8 swan": in_int8((6, 16), (9, 24), **SWAN, **DECAY),
    "int8 momentum": in_int8((6, 16), **SINKGD, **DECAY, **MOMENTUM),
}
OF_THE_REST = {
    "adamw": floats((12, 8), (8,), (8,), (3,), algorithm="adamw", **DECAY),
    "adamw bf16": floats((12, 8), (8,), (8,), (3,), dtype=BF16, algorithm="adamw", **DECAY),
    "adamw bf16, one vector": floats((8,), dtype=BF16, algorithm="adamw", **DECAY),
    "adamw float16 and a number": floats((8,), (), dtype=torch.float16, algorithm="adamw"),
    "adamw complex": floats((4, 3), dtype=torch.complex64, algorithm="adamw", **DECAY),
    "adamw 8 bits": floats((4, 600), (8,), algorithm="adamw_8bit", **DECAY),
    "sinkhorn_momentum": floats(*TABLE, algorithm="sinkhorn_momentum", **DECAY),
    "sinkhorn_momentum bf16": floats(*TABLE, dtype=BF16, algorithm="sinkhorn_momentum", **DECAY),
    "row_moment": floats(*TABLE, algorithm="row_moment", **DECAY),
    "column_moment": floats(*TABLE, algorithm="column_moment", **DECAY),
    "factored bf16": floats(*TABLE, dtype=BF16, algorithm="factored", **DECAY),
}
LORA = {
    "lora_product": floats((2, 9), (6, 2), (2, 9), (6, 2), algorithm="lora_product", **DECAY),
    "lora_product bf16": floats((2, 9), (6, 2), dtype=BF16, algorithm="lora_product", **DECAY),
    "lora_product sinkgd": floats((2, 9), (6, 2), algorithm="lora_product", **SINKGD),
    "lora_product experts": floats(
        (4, 9), (6, 4), algorithm="lora_product", layouts="0=out_in*2 1=out_in/2", **SINKGD, **DECAY
    ),
}
GUARDED = {
    "min_signal": floats(*ODD, min_signal=0.5, **SINKGD, **DECAY),
    "min_signal momentum": floats(*ODD, dtype=BF16, min_signal=0.5, **SWAN, **DECAY, **MOMENTUM),
    "min_signal lora_product": floats((2, 9), (6, 2), algorithm="lora_product", min_signal=0.5, **DECAY),
}
CASES = {**OF_MATRICES, **OF_THE_REST, **LORA, **GUARDED}


def spoil(grad, kind):
    """A gradient of a kind: as it is, with one bad entry, zero, zero in its first third, or weak."""
    if kind in ("nan", "inf", "-inf"):
        grad.view(-1)[-1] = float(kind)
    elif kind == "zero":
        grad.zero_()
    elif kind == "third":
        grad[: max(1, len(grad) // 3) if grad.ndim else None] = 0
    return grad.mul_(1e-4) if kind == "weak" else grad


def steps_of(make, kinds, road, lr=0.05):
    """Step a group with gradients of some kinds on a road; return the optimizer, and weights and states as a list."""
    optimizer = StatelessOptimizer([make()], lr=lr)
    params = optimizer.param_groups[0]["params"]
    for step, kind in enumerate(kinds):
        for i, p in enumerate(params):
            grad = numbers(p.shape, p.dtype, 100 * step + i + 1)
            # What is spoiled is every second parameter; a weak step is weak altogether.
            p.grad = spoil(grad, kind) if kind == "weak" or i % 2 == step % 2 or len(params) == 1 else grad
        with road():
            optimizer.step()
    held = {f"{i} {name}": t for i, p in enumerate(params) for name, t in optimizer.state[p].items()}
    stored = [t.detach() for p in params for t in getattr(p, "stored", (p,))]
    return optimizer, [t.clone() for t in (*stored, *(held[name] for name in sorted(held)))]

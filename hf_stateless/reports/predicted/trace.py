"""What forward and backward hold, found by running the model's own code where tensors have shapes and no contents.

On the meta device a step of a 7B model takes about a second and no memory, so the whole model is run rather than one
layer of it, and nothing is assumed about how its layers repeat.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class Peak:
    """The most bytes that were alive, of the storages that were made while somebody counted."""

    total: int = 0
    """Everything together."""
    gradients_then: int = 0
    """The finished gradients at that moment."""
    activations: int = 0
    """Everything but finished gradients, at its own maximum."""
    gradients: int = 0
    """The finished gradients, at their own maximum."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that were made inside it and are still alive: each once, views not at all.

    Works on tensors with and without contents; a number that is read from one without contents is 1.

    Example:
        >>> import torch
        >>> from hf_stateless.reports.predicted.trace import LiveBytes
        >>> with LiveBytes() as live:
        ...     x = torch.zeros(10)
        ...     y = (x + 1).sum()
        >>> live.now, live.peak.total
        (44, 84)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = Peak()
        self._gradients = 0
        self._alive: dict[int, int] = {}
        self._finished: set[int] = set()

    def restart(self) -> None:
        """Forget the peak so far; what is alive stays counted."""
        self.peak = Peak()
        self._record()

    def finish_gradient(self, grad: Tensor) -> None:
        """Count a tensor as a finished gradient from now on."""
        key = grad.untyped_storage()._cdata
        if key in self._alive and key not in self._finished:
            self._finished.add(key)
            self._gradients += self._alive[key]
            self._record()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count the storages of its results."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and _has_no_contents(args[0]):
            return args[0].dtype == torch.bool or 1
        self._see((args, kwargs), made_here=False)
        out = func(*args, **kwargs)
        self._see(out, made_here=True)
        self._record()
        return out

    def _see(self, tensors: Any, made_here: bool) -> None:
        for tensor in tree_iter(tensors):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._alive:
                    self._alive[key] = storage.nbytes() if made_here else 0
                    self.now += self._alive[key]
                    weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        size = self._alive.pop(key)
        self.now -= size
        if key in self._finished:
            self._finished.remove(key)
            self._gradients -= size

    def _record(self) -> None:
        old, now, gradients = self.peak, self.now, self._gradients
        if now > old.total or now - gradients > old.activations or gradients > old.gradients:
            self.peak = Peak(
                total=max(old.total, now),
                gradients_then=gradients if now > old.total else old.gradients_then,
                activations=max(old.activations, now - gradients),
                gradients=max(old.gradients, gradients),
            )


def _has_no_contents(tensor: Tensor) -> bool:
    return tensor.device.type == "meta" or isinstance(tensor, FakeTensor)


class _GroupedProduct(torch.autograd.Function):
    """Products of groups of rows with a matrix each, in shapes only."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor) -> Tensor:
        ctx.save_for_backward(rows, matrices)
        return rows.new_empty(rows.shape[0], matrices.shape[-1])

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor]:
        rows, matrices = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(matrices)


@contextlib.contextmanager
def fused_kernels(device: str) -> Iterator[None]:
    """Let attention and the products of experts take the memory on the meta device that real devices need.

    The meta device itself would form all attention scores, and knows grouped products in bf16 only. CPUs do form the
    scores where there is dropout or heads of different sizes, and every device where the mask has a gradient. The
    functions are replaced for the time of the context: a mode for torch functions would not reach what activation
    checkpointing runs again in backward.

    Args:
        device: `cuda` or `cpu`, where the model would run.

    Example:
        >>> import torch
        >>> from hf_stateless.reports.predicted.trace import LiveBytes, fused_kernels
        >>> q = torch.empty(1, 1, 1024, 8, device="meta")
        >>> with fused_kernels("cuda"), LiveBytes() as live:
        ...     _ = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> live.peak.total < 1024 * 1024
        True
    """
    original = F.scaled_dot_product_attention
    original_grouped: Any = getattr(F, "grouped_mm", None)  # torch 2.9 has none
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        learned_mask = attn_mask is not None and attn_mask.requires_grad
        missing = query.shape[-1] - value.shape[-1]
        if query.device.type != "meta" or learned_mask or (device == "cpu" and (dropout_p > 0 or missing)):
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        padded = F.pad(value, (0, missing)) if missing else value
        out: Tensor = flash(query, key, padded, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return out[..., : value.shape[-1]]

    def grouped_mm(rows: Tensor, matrices: Tensor, **options: Any) -> Any:
        if rows.device.type == "meta":
            return _GroupedProduct.apply(rows, matrices)  # type: ignore[no-untyped-call]
        return original_grouped(rows, matrices, **options)

    replaced = {"scaled_dot_product_attention": (original, attend), "grouped_mm": (original_grouped, grouped_mm)}
    replaced = {name: pair for name, pair in replaced.items() if pair[0] is not None}
    for name, (_, new) in replaced.items():
        setattr(F, name, new)
    try:
        yield
    finally:
        for name, (old, _) in replaced.items():
            setattr(F, name, old)


Settle = Callable[[Tensor], "tuple[int, int] | None"]
"""What becomes of the gradient of a parameter once it is complete: the bytes that are kept in its place and the bytes
that are needed for a moment, or None where it stays."""


def trace_training(
    model: nn.Module, inputs: Mapping[str, Any], settle: Settle = lambda p: None, device: str = "cuda"
) -> Peak:
    """Predict what forward and backward hold on top of weights and inputs.

    Args:
        model: on the meta device.
        inputs: keyword arguments of its forward on the meta device, labels included.
        settle: what becomes of each gradient; by default it stays.
        device: `cuda` or `cpu`, where the model would run.

    Example:
        >>> from transformers import LlamaConfig
        >>> from hf_stateless.reports.predicted import Settings, build_model
        >>> from hf_stateless.reports.predicted.model import example_inputs
        >>> from hf_stateless.reports.predicted.trace import trace_training
        >>> settings = Settings(batch=1, seq=16)
        >>> model = build_model(LlamaConfig(num_hidden_layers=2, architectures=["LlamaForCausalLM"]), settings)
        >>> peak = trace_training(model, example_inputs(model, settings))
        >>> peak.gradients == sum(2 * p.numel() for p in model.parameters())
        True
    """
    live, kept = LiveBytes(), []

    def settle_gradient(p: Tensor) -> None:
        live.finish_gradient(p.grad)  # type: ignore[arg-type]
        outcome = settle(p)
        if outcome is not None:
            stays, moment = (torch.empty(size, dtype=torch.uint8, device="meta") for size in outcome)
            live.finish_gradient(stays)
            kept.append(stays)
            p.grad = None
            del moment

    with contextlib.ExitStack() as cleanup:
        cleanup.callback(model.zero_grad)
        for p in model.parameters():
            if p.requires_grad:
                handle = p.register_post_accumulate_grad_hook(settle_gradient)  # type: ignore[no-untyped-call]
                cleanup.callback(handle.remove)
        with torch.device("meta"), fused_kernels(device), live:
            model(**inputs).loss.backward()
    return live.peak

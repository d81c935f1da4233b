"""AdamW for what is no matrix (embeddings, heads, norms, biases): torch's kernel, in the dtypes that memory allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..ranks.placement import local_shard
from ..update.batches import alike
from ..update.rate import learning_rate
from ..update.reads import reads_at_once
from ..weights.noise import RoundingKey, TensorCache
from ..weights.rounding import places, round_vectors, write_rounded_
from .options import OPTIONS
from .rule import Entry, Host, Rule, keys_of


# Elements that AdamW works on at once, in whole rows, where it needs float32 copies: bounds each to 64 MiB.
_CHUNK = 1 << 24
_BLOCK = 256
# Vectors up to this length are updated together.
_SMALL = 1 << 16

_FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")


def adamw_state(param: Tensor, *, bits: int = 32) -> dict[str, Tensor]:
    """Return the moments of AdamW at zero: in the parameter's dtype, or as 8-bit codes, a maximum per 256 of a row.

    Args:
        param: the parameter, whose shape, dtype and device the state takes.
        bits: 8 for blockwise 8-bit codes, anything else for the parameter's dtype.

    Raises:
        ImportError: 8 bits without bitsandbytes.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.adamw import adamw_state
        >>> {name: tuple(t.shape) for name, t in adamw_state(torch.ones(2, 300)).items()}
        {'step': (), 'exp_avg': (2, 300), 'exp_avg_sq': (2, 300)}
    """
    step = torch.zeros((), dtype=torch.float32, device=param.device)
    if bits != 8:
        names = ("exp_avg", "exp_avg_sq")
        return {"step": step, **{k: torch.zeros_like(param, memory_format=torch.contiguous_format) for k in names}}
    state = {"step": step}
    # Blocks end with the row, so that the maxima are sharded over ranks as the rows are.
    blocks = -(-param.shape[-1] // _BLOCK)
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        zero_code = int(_codebook(signed, torch.device("cpu")).abs().argmin())
        state[name] = torch.full_like(param, zero_code, dtype=torch.uint8, memory_format=torch.contiguous_format)
        state[f"{name}_absmax"] = torch.zeros_like(
            param.narrow(-1, 0, blocks), dtype=torch.float32, memory_format=torch.contiguous_format
        )
    return state


def adamw_update_(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    keys: Sequence[RoundingKey | None],
    cache: TensorCache | None = None,
    usable: Sequence[Tensor | None] | None = None,
    **hyper: float,
) -> None:
    r"""AdamW by torch's own fused kernel; bf16 weights with rounding keys and 8-bit moments go through float32 chunks.

    M <- beta1 M + (1 - beta1) G; V <- beta2 V + (1 - beta2) G^2; W <- (1 - lr wd) W - lr M^ / (sqrt(V^) + eps). With
    keys, the weight and the second moment are rounded stochastically: to nearest, a bf16 second moment with beta2 =
    0.999 would never change, since a step of 0.1 % is below half its spacing. State kept: see `adamw_state`.

    Args:
        params: any shapes, updated in place.
        grads: their gradients.
        states: of `adamw_state`, updated in place.
        keys: a rounding key for each parameter, or None for those that are rounded to nearest.
        cache: of the optimizer, for the values of 8-bit codes; a new one when None.
        usable: for each a flag on the device, where parameter and state stay as they are unless it is set, or None.
        hyper: `lr`, `beta1`, `beta2`, `eps`, `weight_decay`.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.adamw import adamw_state, adamw_update_
        >>> p = torch.ones(2)
        >>> adamw_update_([p], [torch.ones(2)], [adamw_state(p)], [None], lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8,
        ...               weight_decay=0.0)
        >>> p
        tensor([0.9000, 0.9000])

    References:
        AdamW, https://huggingface.co/papers/1711.05101, Algorithm 2; 8-bit moments,
        https://huggingface.co/papers/2110.02861, section 2.
    """
    cache, flags = cache or TensorCache(), usable or [None] * len(params)
    tight = [grad.contiguous() for grad in grads]
    every = [_One(*one) for one in zip(params, tight, states, keys, flags, strict=True)]
    for same in alike(every, _One.together_with):
        if same[0].is_small_vector:
            _adamw_vectors_(same, cache, hyper)
        elif same[0].in_chunks:
            _adamw_in_chunks_(same[0], cache, hyper)
        else:
            means, squares, steps = ([one.state[name] for one in same] for name in ("exp_avg", "exp_avg_sq", "step"))
            weights, of_weights = [one.param for one in same], [one.grad for one in same]
            _torch_adamw(weights, of_weights, means, squares, steps, hyper, same[0].usable)


@dataclass
class _One:
    """A parameter, with what its update needs."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    key: RoundingKey | None
    usable: Tensor | None

    @property
    def in_chunks(self) -> bool:
        """Whether some rows are taken at a time: what is rounded, and what the kernel of CPUs would misread."""
        rounded = self.key is not None and self.param.dtype == torch.bfloat16
        # That kernel reads memory in order whatever the strides say.
        return "exp_avg_absmax" in self.state or rounded or not self.param.is_contiguous()

    @property
    def is_small_vector(self) -> bool:
        """Whether it is copied beside others: into float32, or to hold some of them back."""
        p, copied = self.param, self.in_chunks or self.usable is not None
        fits = p.is_floating_point() and p.is_contiguous() and p.ndim == 1 and 0 < p.numel() <= _SMALL
        return copied and fits and "exp_avg_absmax" not in self.state

    def together_with(self) -> tuple[Any, ...]:
        """Return what parameters have to share to be updated by one call."""
        if self.is_small_vector:
            return self.param.device, self.param.dtype, self.key is None, self.usable is None
        return () if not self.in_chunks and self.usable is None else (id(self),)


def _adamw_vectors_(same: Sequence[_One], cache: TensorCache, hyper: Mapping[str, float]) -> None:
    """Update vectors (norms and biases) side by side: a launch for each would cost more than its work."""
    params, steps = [one.param for one in same], [one.state["step"] for one in same]
    sizes, keys = [p.numel() for p in params], [one.key for one in same if one.key is not None]
    stored = [params, *([one.state[name] for one in same] for name in ("exp_avg", "exp_avg_sq"))]
    rounded = bool(keys) and params[0].dtype == torch.bfloat16
    wide = torch.float32 if rounded else params[0].dtype
    weight, mean, square, grad = (torch.cat(tensors).to(wide) for tensors in (*stored, [one.grad for one in same]))
    parts = [list(torch.split(flat, sizes)) for flat in (weight, grad, mean, square)]
    _torch_adamw(parts[0], parts[1], parts[2], parts[3], steps, hyper)
    if rounded:
        weight, square = round_vectors(weight, sizes, keys), round_vectors(square, sizes, keys, offset=1)
    new = [weight, mean.to(params[0].dtype), square]
    flags = [one.usable for one in same if one.usable is not None]
    if flags:
        usable = torch.stack(flags)
        of_entries = usable[cache.get(places, tuple(sizes), weight.device)[0]]
        new = [torch.where(of_entries, now, torch.cat(old)) for now, old in zip(new, stored, strict=True)]
        torch._foreach_sub_(steps, list((~usable).to(steps[0].dtype).unbind()))
    for old, now in zip(stored, new, strict=True):
        torch._foreach_copy_(old, torch.split(now, sizes))


def _torch_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    hyper: Mapping[str, float],
    usable: Tensor | None = None,
) -> None:
    """Call torch's kernel; nothing moves unless the flag is set, if there is one."""
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in params) or None
    found = {"found_inf": (~usable).to(torch.float32)} if fused and usable is not None else {}
    every = [*params, *exp_avgs, *exp_avg_sqs, *steps]
    before = [tensor.clone() for tensor in every] if usable is not None and not fused else []
    # What is not fused reads the counters of steps, unless it is told not to.
    capturable = not fused and not reads_at_once(steps[0].device)
    adamw(params, grads, exp_avgs, exp_avg_sqs, [], steps, fused=fused, capturable=capturable, amsgrad=False,
          maximize=False, **found, **hyper)  # type: ignore[arg-type]  # fmt: skip
    for tensor, old in zip(every, before, strict=False):
        tensor.copy_(torch.where(usable, tensor, old))  # type: ignore[arg-type]


def _adamw_in_chunks_(one: _One, cache: TensorCache, hyper: Mapping[str, float]) -> None:
    param, grad, state, key, usable = one.param, one.grad, one.state, one.key, one.usable
    if param.numel() == 0:  # a rank's shard may be empty, and its counter is as good as that of any other in a file
        state["step"].add_(1)
        return
    width = param.shape[-1] if param.ndim > 1 else param.numel()
    count = param.numel() // width
    tensors = {"param": param, "grad": grad, **{name: t for name, t in state.items() if name != "step"}}
    rows = {name: t.contiguous().view(count, -1) for name, t in tensors.items()}
    wide = torch.promote_types(param.dtype, torch.float32)
    start_step = state["step"].clone()
    chunk = max(1, _CHUNK // width)
    for index, start in enumerate(range(0, count, chunk)):
        part = {name: t[start : start + chunk] for name, t in rows.items()}
        exact, exact_grad = part["param"].to(wide), part["grad"].to(wide)
        moments = {name: _load_moment(part, name, cache).to(wide).contiguous() for name in ("exp_avg", "exp_avg_sq")}
        state["step"].copy_(start_step)
        _torch_adamw(
            [exact], [exact_grad], [moments["exp_avg"]], [moments["exp_avg_sq"]], [state["step"]], hyper, usable
        )
        write_rounded_(part["param"], exact, None if key is None else key + 2 * index)
        # The first moment moves by a tenth each step, which rounding to nearest follows.
        _store_moment_(part, "exp_avg", moments["exp_avg"], None, cache, usable)
        square_key = None if key is None else key + (2 * index + 1)
        _store_moment_(part, "exp_avg_sq", moments["exp_avg_sq"], square_key, cache, usable)
    if not param.is_contiguous():  # then its rows were a copy
        param.copy_(rows["param"].view(param.shape))


def _load_moment(part: Mapping[str, Tensor], name: str, cache: TensorCache) -> Tensor:
    if f"{name}_absmax" not in part:
        return part[name]
    from bitsandbytes.functional import dequantize_blockwise

    codes, code = _whole_blocks(part[name]), cache.get(_codebook, name == "exp_avg", part[name].device)
    absmax = part[f"{name}_absmax"].reshape(-1)
    value: Tensor = dequantize_blockwise(codes.view(-1), absmax=absmax, code=code, blocksize=_BLOCK)
    return value.view(codes.shape)[:, : part[name].shape[1]]


def _store_moment_(
    part: Mapping[str, Tensor],
    name: str,
    value: Tensor,
    key: RoundingKey | None,
    cache: TensorCache,
    usable: Tensor | None,
) -> None:
    """Store a moment; one that did not change has its bits in a float dtype, but maybe other 8-bit codes."""
    if f"{name}_absmax" not in part:
        write_rounded_(part[name], value, key)
        return
    from bitsandbytes.functional import quantize_blockwise

    padded, code = _whole_blocks(value.float()), cache.get(_codebook, name == "exp_avg", value.device)
    codes, quant = quantize_blockwise(padded.view(-1), code=code, blocksize=_BLOCK)
    absmax = part[f"{name}_absmax"]
    for old, now in (
        (part[name], codes.view(padded.shape)[:, : value.shape[1]]),
        (absmax, quant.absmax.view_as(absmax)),
    ):
        old.copy_(now if usable is None else torch.where(usable, now, old))


def _whole_blocks(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % _BLOCK))


def _codebook(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 values of bitsandbytes' dynamic 8-bit type."""
    try:
        from bitsandbytes.functional import create_dynamic_map
    except ImportError as error:
        raise ImportError(
            "embeddings=adamw_8bit stores its moments with bitsandbytes, which is not installed: "
            'type pip install "hf_stateless[bnb]"'
        ) from error
    values: Tensor = create_dynamic_map(signed=signed)
    return values.to(device)


def _update(entries: list[Entry], host: Host) -> None:
    for same in alike(entries, lambda entry: (id(entry.group), entry.usable is None)):
        group = same[0].group
        beta1, beta2 = group["betas"]
        adamw_update_(
            [local_shard(entry.param) for entry in same],
            [local_shard(entry.grad) for entry in same],
            [{name: local_shard(t) for name, t in entry.state.items()} for entry in same],
            keys_of(same, host.cache),
            host.cache,
            None if same[0].usable is None else [entry.usable for entry in same],
            lr=learning_rate(group),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


def _bytes(shape: Sequence[int], dtype: torch.dtype, group: Mapping[str, Any]) -> int:
    return 4 + 2 * math.prod(shape) * dtype.itemsize


def _bytes_8bit(shape: Sequence[int], dtype: torch.dtype, group: Mapping[str, Any]) -> int:
    return 4 + 2 * (math.prod(shape) + 4 * math.prod(shape[:-1]) * -(-shape[-1] // _BLOCK))


_OPTIONS = {
    "betas": (OPTIONS["adamw_beta1"].default, OPTIONS["adamw_beta2"].default),
    "eps": OPTIONS["adamw_eps"].default,
}
ADAMW = Rule(_update, lambda param, group: adamw_state(param), _bytes, _OPTIONS, takes_complex=True, for_tables=True)
ADAMW_8BIT = Rule(
    _update,
    lambda param, group: adamw_state(param, bits=8),
    _bytes_8bit,
    _OPTIONS,
    for_tables=True,
)

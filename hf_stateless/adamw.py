"""AdamW for what is no matrix (embeddings, heads, norms, biases): torch's kernel, in the dtypes that memory allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .rounding import write_rounded_


# Elements that AdamW works on at once where it needs float32 copies: bounds its temporaries to 64 MiB each. A multiple
# of the block of the 8-bit moments.
_CHUNK = 1 << 24
_BLOCK = 256

_FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")


def adamw_state(param: Tensor, *, bits: int = 32) -> dict[str, Tensor]:
    """Return the moments of AdamW at zero: in the parameter's dtype, or as 8-bit codes with a maximum per 256.

    Args:
        param: the parameter, whose shape, dtype and device the state takes.
        bits: 8 for blockwise 8-bit codes, anything else for the parameter's dtype.

    Raises:
        ImportError: 8 bits without bitsandbytes.

    Example:
        >>> import torch
        >>> from hf_stateless.adamw import adamw_state
        >>> {name: tuple(t.shape) for name, t in adamw_state(torch.ones(2, 300)).items()}
        {'step': (), 'exp_avg': (2, 300), 'exp_avg_sq': (2, 300)}
    """
    step = torch.zeros((), dtype=torch.float32, device=param.device)
    if bits != 8:
        return {"step": step, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
    state = {"step": step}
    blocks = -(-param.numel() // _BLOCK)
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        zero_code = int(_codebook(signed, torch.device("cpu")).abs().argmin())
        state[name] = torch.full_like(param, zero_code, dtype=torch.uint8)
        state[f"{name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
    return state


def adamw_update_(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    keys: Sequence[Tensor] | None,
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
        keys: one rounding key per parameter, or None.
        hyper: `lr`, `beta1`, `beta2`, `eps`, `weight_decay`.

    Example:
        >>> import torch
        >>> from hf_stateless.adamw import adamw_state, adamw_update_
        >>> p = torch.ones(2)
        >>> adamw_update_([p], [torch.ones(2)], [adamw_state(p)], None, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8,
        ...               weight_decay=0.0)
        >>> p
        tensor([0.9000, 0.9000])

    References:
        AdamW, https://huggingface.co/papers/1711.05101, Algorithm 2; 8-bit moments,
        https://huggingface.co/papers/2110.02861, section 2.
    """
    in_chunks = [
        "exp_avg_absmax" in state or (keys is not None and p.dtype == torch.bfloat16)
        for p, state in zip(params, states, strict=True)
    ]
    whole = [i for i, chunked in enumerate(in_chunks) if not chunked]
    if whole:
        means, squares, steps = ([states[i][name] for i in whole] for name in ("exp_avg", "exp_avg_sq", "step"))
        _torch_adamw([params[i] for i in whole], [grads[i] for i in whole], means, squares, steps, hyper)
    for i, chunked in enumerate(in_chunks):
        if chunked:
            _adamw_in_chunks_(params[i], grads[i], states[i], None if keys is None else keys[i], hyper)


def _torch_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    hyper: Mapping[str, float],
) -> None:
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in params) or None
    adamw(params, grads, exp_avgs, exp_avg_sqs, [], steps, fused=fused, amsgrad=False, maximize=False, **hyper)  # type: ignore[arg-type]


def _adamw_in_chunks_(
    param: Tensor, grad: Tensor, state: dict[str, Tensor], key: Tensor | None, hyper: Mapping[str, float]
) -> None:
    flat = {name: t.reshape(-1) for name, t in {"param": param, "grad": grad, **state}.items()}
    start_step = state["step"].clone()
    for index, start in enumerate(range(0, param.numel(), _CHUNK)):
        part = slice(start, min(start + _CHUNK, param.numel()))
        blocks = slice(start // _BLOCK, -(-part.stop // _BLOCK))
        exact, grad32 = flat["param"][part].float(), flat["grad"][part].float()
        moments = {name: _load_moment(flat, name, part, blocks) for name in ("exp_avg", "exp_avg_sq")}
        state["step"].copy_(start_step)
        _torch_adamw([exact], [grad32], [moments["exp_avg"]], [moments["exp_avg_sq"]], [state["step"]], hyper)
        write_rounded_(flat["param"][part], exact, None if key is None else key + 2 * index)
        for name, moment in moments.items():
            _store_moment_(flat, name, part, blocks, moment, None if key is None else key + (2 * index + 1))
    if not param.is_contiguous():  # then the flat tensor was a copy
        param.copy_(flat["param"].view(param.shape))


def _load_moment(flat: Mapping[str, Tensor], name: str, part: slice, blocks: slice) -> Tensor:
    if f"{name}_absmax" not in flat:
        return flat[name][part].float()
    from bitsandbytes.functional import dequantize_blockwise

    code = _codebook(name == "exp_avg", flat[name].device)
    value: Tensor = dequantize_blockwise(
        flat[name][part], absmax=flat[f"{name}_absmax"][blocks], code=code, blocksize=_BLOCK
    )
    return value


def _store_moment_(
    flat: Mapping[str, Tensor], name: str, part: slice, blocks: slice, value: Tensor, key: Tensor | None
) -> None:
    if f"{name}_absmax" not in flat:
        # The first moment moves by a tenth each step, which rounding to nearest follows.
        write_rounded_(flat[name][part], value, key if name == "exp_avg_sq" else None)
        return
    from bitsandbytes.functional import quantize_blockwise

    codes, quant = quantize_blockwise(value, code=_codebook(name == "exp_avg", value.device), blocksize=_BLOCK)
    flat[name][part].copy_(codes)
    flat[f"{name}_absmax"][blocks].copy_(quant.absmax)


@cache
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

"""Tensor and expert parallelism of transformers: what one GPU holds of a model.

Both are read from the plans of the model itself. Tensor parallelism cuts matrices inside, expert parallelism cuts
stacks between experts; what no plan names is on every GPU. FSDP2 cuts what is left of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...weights.int8.weight import Int8Weight, Scale
from ...weights.plans import in_plan, style_of
from ..run_facts import base_of
from .state import refuse_unknown_in_parts
from .table import Settings


# The dimension along which a style cuts a parameter of two or more dimensions; a bias lies along rows.
ROWS = ("colwise", "packed_colwise", "colwise_rep", "colwise_gather_output")
COLUMNS = ("rowwise", "packed_rowwise", "rowwise_rep", "rowwise_split_input")
_DIMENSIONS = {**dict.fromkeys(ROWS, -2), **dict.fromkeys(COLUMNS, -1)}
_DIMENSIONS |= {"embedding_rowwise": 0, "embedding_colwise": 1, "grouped_gemm": 0}


def check_parallel(names: Sequence[str], settings: Settings) -> None:
    """Refuse what does not go together, or is not known under tensor and expert parallelism.

    Raises:
        ValueError: with what to type.

    Example:
        >>> from hf_stateless.reports.predicted import Settings
        >>> from hf_stateless.reports.predicted.parallel import check_parallel
        >>> check_parallel(["sinkgd"], Settings(ep=8))
        Traceback (most recent call last):
            ...
        ValueError: --ep 8: expected a multiple of --tp (1) that divides --fsdp x --tp (1): type --fsdp 8 beside it.
    """
    tp, ep = settings.tp, settings.ep
    if tp == ep == 1:
        return
    flag = f"--tp {tp}" if tp > 1 else f"--ep {ep}"
    others = {"--zero": settings.zero, "--lora": settings.lora}
    if beside := next((name for name, is_set in others.items() if is_set), None):
        raise ValueError(f"{flag}: got {beside} beside it, expected one of the two.")
    refuse_unknown_in_parts(names, flag)
    if ep > 1 and (ep % tp or settings.fsdp * tp % ep):
        raise ValueError(
            f"--ep {ep}: expected a multiple of --tp ({tp}) that divides --fsdp x --tp ({settings.fsdp * tp}): "
            f"type --fsdp {ep} beside it."
        )


def cut_by_plans(model: nn.Module, settings: Settings) -> None:
    """Put in the place of each parameter of a model on the meta device what one GPU holds of it.

    Under expert parallelism each stack keeps 1 / tp of its experts here. FSDP2 over `fsdp` GPUs then leaves what the
    GPUs of one expert leave, whatever `ep` is.

    Raises:
        ValueError: no plan for this model, or heads or experts that cannot be shared equally.
    """
    if settings.tp == settings.ep == 1:
        return
    base = base_of(model)
    plans = plans_of(base, settings)
    _check_heads(base, plans, settings.tp)
    cut: dict[int, nn.Parameter] = {}
    for path, module in base.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            style = None if isinstance(p, Scale) else style_of(f"{path}.{name}", plans)  # cut with their weights
            dimension = None if style is None else _dimension(style, name, p)
            if dimension is not None:
                if id(p) not in cut:
                    cut[id(p)] = _part(p, dimension, f"{path}.{name}", str(style), settings)
                    if isinstance(p, Int8Weight):
                        cut[id(p)] = _in_8_bits(p, cut[id(p)], f"{path}.{name}", settings)
                setattr(module, name, cut[id(p)])
            if isinstance(p, Int8Weight):
                beside = module.name_of_scale(name)  # type: ignore[operator]
                if beside in dict(module.named_parameters(recurse=False)):  # a tied head has none
                    setattr(module, beside, getattr(module, name).scale)
        if plans.get(in_plan(path)) == "colwise_gather_output":
            module.register_forward_hook(_gather(widths(module)[1], settings.tp))
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # it may lie in the part of another GPU


def whole_shape(p: Tensor) -> torch.Size:
    """Return the shape of a parameter before it was cut."""
    return getattr(p, "whole_shape", p.shape)


def whole_numel(p: Tensor) -> int:
    """Return the entries of a parameter before it was cut."""
    return whole_shape(p).numel()


def gathered_share(p: Tensor) -> float:
    """Return how much of what a GPU holds without FSDP2 it gathers: less of experts, and none that have one GPU."""
    return float(getattr(p, "gathered_share", 1.0))


def plans_of(base: Any, settings: Settings) -> dict[str, str]:
    """Return the plans of a model that hold; that for experts goes first."""
    dense = dict(getattr(base, "tp_plan", None) or {}) if settings.tp > 1 else {}
    experts = dict(getattr(base, "ep_plan", None) or {}) if settings.ep > 1 else {}
    kind = type(base).__name__
    if settings.tp > 1 and not dense:
        raise ValueError(f"--tp {settings.tp}: {kind} has no plan for tensor parallelism: type --fsdp {settings.tp}.")
    if settings.ep > 1 and not hasattr(base, "ep_plan"):
        newer = "type pip install -U 'transformers>=5.24'"
        raise ValueError(f"--ep {settings.ep}: this transformers has no plans for experts beside others: {newer}.")
    if settings.ep > 1 and not experts:
        raise ValueError(f"--ep {settings.ep}: {kind} has no plan for experts: leave out --ep.")
    return {**dense, **experts}


def _dimension(style: str, name: str, p: Tensor) -> int | None:
    """Return the dimension that a style cuts, or None where each GPU has all."""
    dimension = _DIMENSIONS.get(style)
    if dimension is None or (p.ndim == 1 and style in COLUMNS) or (name == "bias" and style in COLUMNS):
        return None
    return max(dimension + p.ndim, 0) if dimension < 0 else dimension


def _part(p: nn.Parameter, dimension: int, name: str, style: str, settings: Settings) -> nn.Parameter:
    """Return the largest part of a parameter; packed ones are two that are cut each."""
    is_expert, size, shape = style == "grouped_gemm", p.shape[dimension], list(p.shape)
    if is_expert and size % settings.ep:
        raise ValueError(f"--ep {settings.ep}: {name} has {size} experts, expected a multiple of {settings.ep}.")
    packed = 2 if style.startswith("packed") and p.ndim > 1 else 1
    shape[dimension] = packed * -(-size // (packed * settings.tp))
    part = nn.Parameter(torch.empty(shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
    part.whole_shape = p.shape  # type: ignore[attr-defined]
    if is_expert:
        alone = settings.ep == settings.fsdp * settings.tp
        part.gathered_share = 0.0 if alone else settings.tp / settings.ep  # type: ignore[attr-defined]
    return part


def _in_8_bits(weight: Int8Weight, part: nn.Parameter, name: str, settings: Settings) -> Int8Weight:
    """Return the part of a weight in 8 bits, of which the codes have the shape of a float part."""
    length, columns = weight.shape[-1] // weight.scale.shape[-1], part.shape[-1]
    if columns % length:
        raise ValueError(
            f"--tp {settings.tp}: of {name} a GPU would have {columns} of {weight.shape[-1]} columns, expected a "
            f"multiple of the {length} weights that share a scale: type another, or --fsdp."
        )
    scale = Scale(torch.empty(*part.shape[:-1], columns // length, dtype=weight.scale.dtype, device="meta"))
    codes = torch.empty(part.shape, dtype=torch.int8, device="meta")
    stored = Int8Weight(codes, scale, weight.dtype, weight.requires_grad)
    stored.__dict__.update(part.__dict__)
    return stored


def _check_heads(base: Any, plans: Mapping[str, str], tp: int) -> None:
    """Refuse attention heads that GPUs cannot share: a part of a head is none."""
    config = base.config.get_text_config()
    for key, projection in (("num_attention_heads", "q_proj"), ("num_key_value_heads", "k_proj")):
        heads = getattr(config, key, None)
        cut = any(name.endswith(f".{projection}") and style in ROWS for name, style in plans.items())
        if cut and isinstance(heads, int) and heads % tp:
            raise ValueError(f"--tp {tp}: {key} is {heads}, expected a multiple of {tp}: type another, or --fsdp.")


def _gather(width: int, parts: int) -> Any:
    def whole(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output] * parts, dim=-1)[..., :width]

    return whole


def widths(module: nn.Module) -> tuple[int, int]:
    """Return the width of the input and of the output of a module as a whole."""
    shapes = [whole_shape(p) for p in module.parameters(recurse=False) if not isinstance(p, Scale)]
    stacks = [set(shape[1:]) for shape in shapes if len(shape) == 3]
    if stacks:  # experts take and give the width of the model, which their stacks have in common
        width = max(set.intersection(*stacks) or stacks[0])
        return width, width
    matrix = next((shape for shape in shapes if len(shape) == 2), None)
    if matrix is None:
        return 0, 0
    return (0, matrix[1]) if isinstance(module, nn.Embedding) else (matrix[1], matrix[0])

"""Which weights are matrices by their use, and how each of them is stored."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..weights.int8.kinds import expert_stacks


# Expert stacks stored (experts, in, out) whose module does not say so by `is_transposed` (in every supported version).
_IN_OUT_EXPERTS = {"GptOssExperts", "Llama4TextExperts"}
# Weights that a module of transformers multiplies by itself, by the class that owns them.
_RAW = {
    "XLNetRelativeAttention": {"q": "in_outs", "k": "in_outs", "v": "in_outs", "r": "in_outs", "o": "conv"},
    "FunnelRelMultiheadAttention": {"r_kernel": "in_outs"},
    "Gemma3MultiModalProjector": {"mm_input_projection_weight": "in_out"},
    "T5Gemma2MultiModalProjector": {"mm_input_projection_weight": "in_out"},
    "XCLIPModel": {"prompts_visual_projection": "in_out"},
    "ZambaMambaMixer": {"x_proj_weight": "out_in", "dt_proj_weight": "out_in"},
    "QuantLinear": {"weight": "out_in"},
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, Conv1D, *CONVOLUTIONS)
"""Linear layers and convolutions, whose weight is called `weight`."""
# Classes that choose experts or mix streams; some hold a linear layer, some are one.
_ROUTER = re.compile(r"Router$|Mo[eE]\w*(Gate|Gating)$|AltUp$")
# Names of small networks and tables that give a bias for each distance of two positions, or coefficients.
_TABLE = re.compile(r"(^|_)(rel|relative|pos|position|cpb|rpb)_(\w+_)?(bias|mlp)\w*$|^cpb_|rel_pos|rpb_embed|coefs?$")
# What such a network has at most on its shorter side: coordinates, buckets or attention heads.
_MOST_POSITIONS = 64
_GATE = re.compile(r"^(gate|gating|switch|wg)$|router$|(expert|moe)\w*_gate$")


def matrix_weights(module: nn.Module, convolutions: bool = False) -> Iterator[tuple[Tensor, str]]:
    """Yield the weights of one module that are matrices, with their layout.

    Linear layers, GPT-2's `Conv1D`, stacks of experts, the projections of `nn.MultiheadAttention`, recurrent layers
    (a matrix for each gate), and weights that a module of transformers multiplies by itself.

    Args:
        module: is looked at without its children.
        convolutions: whether every convolution counts; otherwise none does, see `pointwise`.

    Example:
        >>> from torch import nn
        >>> from hf_stateless.trainer.matrices import matrix_weights
        >>> [(tuple(weight.shape), layout) for weight, layout in matrix_weights(nn.MultiheadAttention(8, 2))]
        [((24, 8), 'out_in*3')]
    """
    if isinstance(module, nn.Linear):
        # DeepSeek-V4 has one matrix for each group of inputs, as a convolution with groups has.
        groups = getattr(module, "n_groups", 1) if "GroupedLinear" in type(module).__name__ else 1
        yield from _own(module, {"weight": f"out_in*{groups}" if groups > 1 else "out_in"})
    elif isinstance(module, Conv1D):
        yield from _own(module, {"weight": "in_out"})
    elif isinstance(module, CONVOLUTIONS):
        if convolutions:
            # One output for each group would make matrices of one row.
            divided = 1 < module.groups < module.out_channels
            yield from _own(module, {"weight": f"conv*{module.groups}" if divided else "conv"})
    elif isinstance(module, nn.MultiheadAttention):
        names = {"in_proj_weight": "out_in*3", "q_proj_weight": "out_in", "k_proj_weight": "out_in"}
        yield from _own(module, {**names, "v_proj_weight": "out_in"})
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        yield from _recurrent(module)
    elif stacks := expert_stacks(module):
        # FSDP2 puts a subclass of its own in place of the class, so the table is looked up along the bases.
        in_table = any(base.__name__ in _IN_OUT_EXPERTS for base in type(module).__mro__)
        layout = "in_out" if getattr(module, "is_transposed", False) or in_table else "out_in"
        yield from _own(module, dict.fromkeys(stacks, layout))
    else:
        for base in type(module).__mro__:
            yield from _own(module, _RAW.get(base.__name__, {}))


def _own(module: nn.Module, layouts: dict[str, str]) -> Iterator[tuple[Tensor, str]]:
    """Yield parameters of a module by their names; a weight that is computed from others is none of them."""
    for name, p in module.named_parameters(recurse=False):
        if name in layouts:
            yield p, layouts[name]


def _recurrent(module: nn.RNNBase | nn.RNNCellBase) -> Iterator[tuple[Tensor, str]]:
    """Yield the weights of a recurrent layer: four gates of an LSTM lie one after the other, three of a GRU."""
    gates = 4 if "LSTM" in type(module).__name__ else 3 if "GRU" in type(module).__name__ else 1
    for name, p in module.named_parameters(recurse=False):
        if p.ndim == 2:
            yield p, "out_in" if gates == 1 or "weight_hr" in name else f"out_in*{gates}"


def pointwise(module: nn.Module) -> bool:
    """Tell whether a convolution has a kernel of one point: a linear layer, applied at every point.

    Beside other matrices it is one of them (SqueezeBERT is made of such); networks of convolutions alone are left out.
    """
    return isinstance(module, CONVOLUTIONS) and set(module.kernel_size) == {1}


def is_thin(sizes: tuple[int, int] | None) -> bool:
    """Tell whether a matrix has one row or one column: its norm projections would be no more than signs."""
    return sizes is not None and min(sizes) == 1


def chooses(name: str, module: nn.Module, parents: tuple[nn.Module, ...]) -> bool:
    """Tell whether a module chooses or mixes (routers of experts, gates, tables of biases) instead of computing.

    A layer named as a gate is one where it stands beside experts or has few outputs; `gate_proj` is a matrix.

    Args:
        name: of the module in the model.
        module: itself.
        parents: the modules around it, from the model inwards.
    """
    around = (*parents, module)
    if any(_ROUTER.search(base.__name__) for m in around for base in type(m).__mro__[:-2]):
        return True
    parts = name.split(".")
    sizes = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None
    if any(_TABLE.search(part) for part in parts[-2:]) and sizes and min(sizes) <= _MOST_POSITIONS:
        return True
    if any(_routes(part, parents[i]) for i, part in enumerate(parts) if i < len(parents)):
        return True
    # The layers of a sequence go by the name of the sequence.
    at = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    if not _GATE.search(parts[at]) or at >= len(parents) or any("expert" in part for part in parts[:at]):
        return False
    beside = [m for child, m in parents[at].named_children() if child != parts[at] and isinstance(m, nn.Linear)]
    # The gate of an MLP is as wide as what it is multiplied with.
    return bool(sizes and sizes[0] * 4 <= sizes[1]) and all(m.out_features != sizes[0] for m in beside if sizes)


def _routes(name: str, owner: nn.Module) -> bool:
    """Tell whether a part of a module scores the experts beside it: its last layer has an output for each."""
    children = dict(owner.named_children())
    experts = [m for child, m in children.items() if "expert" in child and child != name]
    if not experts or "expert" in name.replace("expert_", "") or name not in children:
        return False
    counts = {len(m) for m in experts if isinstance(m, nn.ModuleList)}
    counts |= {n for m in experts for n in [getattr(m, "num_experts", None)] if isinstance(n, int)}
    linears = [m for m in children[name].modules() if isinstance(m, nn.Linear)]
    return bool(linears) and (linears[-1].out_features in counts or _GATE.search(name) is not None)

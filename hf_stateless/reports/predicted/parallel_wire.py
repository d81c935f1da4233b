"""What GPUs send each other in a step where the plans of transformers cut a model: counted from shapes.

A ring sends 2 (N-1)/N of an all-reduce. Norms, flags and weights of a router are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ...norms.chain import Chain
from ...update.layout import layout_at
from ...weights.plans import in_plan
from ..run_facts import base_of
from .model import tensor_bytes
from .parallel import COLUMNS, ROWS, plans_of, whole_shape, widths
from .state import optimizer_groups
from .table import Settings
from .wire import Shape, exchanged_bytes, fsdp_bytes, sinkhorn_bytes


# All-reduces of a module's input in backward, and of its output in forward.
_INPUTS = (*ROWS, "moe_tp_experts")
_OUTPUTS = (*COLUMNS, "embedding_rowwise", "moe_tp_experts")


def sent_by_plans(model: nn.Module, settings: Settings) -> int:
    """Return what a GPU sends in forward and backward because of the plans: sums of activations, and routed tokens.

    With activation checkpointing the forward of the layers is done twice.
    Tokens are taken to be spread evenly over experts.
    """
    if settings.tp == settings.ep == 1:
        return 0
    base, tp = base_of(model), settings.tp
    plans = plans_of(base, settings)
    forwards = 2 if settings.checkpointing else 1
    tokens = settings.batch * settings.seq
    sent = 0.0
    for path, module in base.named_modules():
        style = plans.get(in_plan(path))
        inside = any(part.isdecimal() for part in path.split("."))
        times = forwards if inside else 1
        columns, rows = widths(module)
        if style in _INPUTS:
            sent += 2 * columns * (tp - 1) / tp
        if style in _OUTPUTS:
            sent += times * 2 * rows * (tp - 1) / tp
        if style == "colwise_gather_output":
            sent += rows * (tp - 1) / tp
        if style == "ep_dispatch_experts":
            config = getattr(module, "config", None) or base.config.get_text_config()
            chosen = getattr(config, "num_experts_per_tok", 1)
            each_way = columns * chosen * (settings.ep - 1) / settings.ep / tp
            sent += (times + 1) * (2 * each_way + columns * (tp - 1) / tp)
    itemsize = next(model.parameters()).dtype.itemsize
    return int(sent * tokens * itemsize)


def sent_by_fsdp(model: nn.Module, settings: Settings) -> int:
    """Return what FSDP2 sends: of experts only what those GPUs share that have the same ones."""
    same = settings.fsdp * settings.tp // settings.ep
    sent = 0
    for is_expert, ranks in ((False, settings.fsdp), (True, same)):
        some = [p for p in model.parameters() if hasattr(p, "gathered_share") == is_expert]
        # What these GPUs share of a stack: the part of each is 1 / (fsdp tp) of it.
        share = settings.tp / settings.ep if is_expert else 1
        weights = tensor_bytes(p.detach() for p in some)  # what is stored of them: of a weight in 8 bits its codes
        trained = tensor_bytes(p for p in some if p.requires_grad)
        sent += fsdp_bytes(int(weights * share), int(trained * share), ranks)
    return sent


def sent_by_optimizer(model: nn.Module, name: str, optim_args: Mapping[str, Any], settings: Settings) -> int | None:
    """Return what one of our optimizers sends, the GPU that sends most; None where no formula is here.

    A stack that is cut between its matrices needs nothing of other GPUs, and of both dimensions of a mesh each counts.
    """
    sent = 0.0
    for group in optimizer_groups(model, name, optim_args):
        if group["algorithm"] != "multinorm":
            continue
        chain = Chain.of(group)
        known = (chain.is_sinkhorn or chain.whitens) and chain.scale == "rms"
        shared = [p.ndim == 2 or any(_cut_inside(p)) for p in group["params"]]
        cut = [(p, layout_at(group, i)) for i, p in enumerate(group["params"]) if shared[i]]
        if cut and not (known and all(layout.name == "out_in" for _, layout in cut)):
            return None
        inside = Counter(shape for p, _ in cut for shape in _cut_inside(p))
        rows = Counter((int(p.shape[0]), int(p.shape[1])) for p, _ in cut if p.ndim == 2)
        itemsize = group["params"][0].dtype.itemsize
        for shapes, ranks in ((rows, settings.fsdp), (inside, settings.tp)):
            if ranks == 1 or not shapes:
                continue
            if chain.is_sinkhorn:
                # Sums of rows that are cut are sent in float64, and with them all others.
                of_a_sum = 8 if shapes is inside and any(_is_cut_in_columns(p) for p, _ in cut) else 4
                sent += sinkhorn_bytes(shapes, ranks, int(chain.num_iterations), of_a_sum)
            else:  # what has come together over FSDP2 is shared out before it comes together inside
                each = settings.fsdp if shapes is inside else 1
                fewer = {shape: -(-count // each) for shape, count in shapes.items()}
                sent += max(exchanged_bytes(fewer, ranks, itemsize))
    return int(sent)


def _is_cut_in_columns(p: Tensor) -> bool:
    return whole_shape(p)[-1] != p.shape[-1]


def _cut_inside(p: Tensor) -> Iterator[Shape]:
    """Yield the matrices of a parameter that tensor parallelism cuts, with what is cut first, or nothing."""
    whole = whole_shape(p)
    if whole == p.shape or hasattr(p, "gathered_share"):
        return
    rows, columns = int(whole[-2]), int(whole[-1])
    shape = (columns, rows) if _is_cut_in_columns(p) else (rows, columns)
    yield from [shape] * (whole[0] if p.ndim == 3 else 1)

r"""Steepest descent for the product of a LoRA pair: what a step does to B A counts, not what it does to A and to B.

A layer with an adapter computes with W + s B A, A in R^{r x n}, B in R^{m x r}, s = alpha / r (alpha / sqrt(r) for
rsLoRA). The pair (R A, B R^-1) is the same layer for every invertible R, but gradients that are normalised one by one
move it elsewhere, by an amount that depends on r, alpha and how large A and B are. Here both steps are measured by the
change of s B A that they make.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..norms.chain import Chain, multi_normalize
from ..norms.projections import power_of_two_inverse
from ..norms.scale import UPDATE_SCALES
from ..norms.whitening import eigh
from ..ranks.matrix_update import decay_of
from ..ranks.placement import local_shard, part_of
from ..update.batches import BATCH_BYTES, alike, bounded
from ..update.layout import LAYOUTS, Layout
from ..update.rate import learning_rate
from ..update.reads import both, reads_at_once
from ..update.write import judged, write_update_
from ..weights.cuts import whole_tensor
from ..weights.noise import RoundingKey
from .rule import Entry, Host, Rule, counter, keys_of


# Eigenvalues of A A^T, and of B^T B in the frame of A, below this part of the largest are raised to it.
_RELATIVE_FLOOR = 1e-4
# One step turns the row space of A by at most 1 / _STIFFNESS: near B = 0 the inverse of B would blow it up.
_STIFFNESS = 3.0


@dataclass
class Pair:
    """The factors of one adapter of one layer, or of a stack of experts, with what their updates need."""

    factors: tuple[Tensor, Tensor]
    """A and B as PEFT stores them."""
    keys: Sequence[RoundingKey | None] = (None, None)
    """Their rounding keys, of those that are bf16."""
    layouts: tuple[Layout, Layout] = (LAYOUTS["out_in"], LAYOUTS["out_in"])
    """How they lie: of experts as many matrices in A as in B, each of which makes a product with one of the other."""

    def shape_class(self) -> tuple[Any, ...]:
        """What pairs have to share to be computed as one batch."""
        return self.layouts, *((p.shape, p.dtype, p.device) for p in self.factors)

    def nbytes(self) -> int:
        """Return the size of both factors."""
        return sum(p.nbytes for p in self.factors)


def _update(entries: list[Entry], host: Host) -> None:
    """Update pairs of which at least one factor has a gradient; the params of a group are A_0, B_0, A_1, B_1, ..."""
    for same in alike(entries, lambda entry: id(entry.group)):
        position = {id(p): i for i, p in enumerate(same[0].group["params"])}
        firsts = dict.fromkeys(entry.index - position[id(entry.param)] % 2 for entry in same)
        pairs = [(host.entry(first), host.entry(first + 1)) for first in firsts]
        usable = same[0].usable  # of `min_signal`, which holds back a group as one
        verdicts = update_pairs_(
            [Pair((a.param, b.param), keys_of((a, b), host.cache), (a.layout, b.layout)) for a, b in pairs],
            same[0].group,
            usable,
        )
        for pair, finite in zip(pairs, verdicts, strict=True):
            for entry in pair:
                entry.usable = usable
            host.count(pair, (finite, finite))


def update_pairs_(
    pairs: Sequence[Pair], group: Mapping[str, Any], usable: Tensor | None = None
) -> list[bool | Tensor]:
    r"""Update pairs of LoRA factors by steepest descent in the change of s B A, see `product_steps`.

    A <- (1 - lr weight_decay) A - D_A, B <- (1 - lr weight_decay) B - D_B with size = lr lr_scale sqrt(m n / r). Each
    of D_A and D_B then changes s B A by a matrix whose entries have root mean square lr lr_scale (D_A: at most), like
    the update of a whole matrix: whatever the shape, r and s are, and however large A and B. A factor whose gradient
    is zero is left unchanged, decay included, also that of one expert, and both are if one gradient is not finite.
    Sharded factors are gathered: they are small. State kept: none.

    Args:
        pairs: factors with their gradients; under FSDP2 all ranks have to call this with the same ones.
        group: `lr`, `weight_decay` and the options that groups of this rule hold.
        usable: a flag on the device, where no factor moves unless it is set.

    Returns:
        For each pair, whether its gradients were finite; where reading would wait for the device, as a flag on it.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.lora_product import Pair, update_pairs_
        >>> A, B = torch.eye(1, 4), torch.zeros(4, 1)
        >>> A.grad, B.grad = torch.zeros(1, 4), torch.tensor([[3.0], [0.0], [-4.0], [0.0]])
        >>> from hf_stateless.optimizer.rules import complete_group
        >>> group = complete_group({"params": [], "algorithm": "lora_product", "lr_scale": 1.0}, lr=0.5)
        >>> update_pairs_([Pair((A, B))], {**group, "lr": 0.5})
        [True]
        >>> (B @ A).square().mean().sqrt()
        tensor(0.5000)
    """
    lr = learning_rate(group)
    if not pairs or ((not isinstance(lr, Tensor) or reads_at_once(lr.device)) and lr == 0):
        return [True for _ in pairs]
    finite: dict[int, bool | Tensor] = {}
    for same in alike(pairs, Pair.shape_class):
        for batch in bounded(same, Pair.nbytes, BATCH_BYTES):
            finite |= zip((id(pair) for pair in batch), _update_batch_(batch, group, usable), strict=True)
    return [finite[id(pair)] for pair in pairs]


def _update_batch_(batch: Sequence[Pair], group: Mapping[str, Any], usable: Tensor | None) -> list[bool | Tensor]:
    layouts = batch[0].layouts
    a, b = _stacked([tuple(whole_tensor(p) for p in pair.factors) for pair in batch], layouts)
    grads = _stacked([tuple(_whole_gradient(p) for p in pair.factors) for pair in batch], layouts)
    (rank, columns), rows = a.shape[-2:], b.shape[-2]
    lr = learning_rate(group)
    if isinstance(lr, Tensor) and not reads_at_once(lr.device):
        lr = lr.reshape(()).to(a.device)
    size = lr * group["lr_scale"] * math.sqrt(rows * columns / rank)
    options = {name: group[name] for name in ("scaling", "norms", "num_iterations")}
    steps = product_steps(a, b, *grads, size=size, scale=group.get("scale", UPDATE_SCALES[0]), **options)
    steps = (steps[1].mT, steps[0].mT) if _of_embedding(layouts) else steps
    blocks = layouts[0].blocks
    # For each pair, of each factor the norms of the blocks that it is made of.
    norms = torch.stack([torch.linalg.vector_norm(step.reshape(len(batch), blocks, -1), dim=2) for step in steps], 1)
    verdicts = judged(norms.flatten(0, 1), local_shard(batch[0].factors[0]).device)
    decay, finite = 1 - lr * group["weight_decay"], []
    for i, pair in enumerate(batch):
        of_pair = verdicts[2 * i : 2 * i + 2]
        good: Any = of_pair[0].finite & of_pair[1].finite  # type: ignore[operator]
        finite.append(good)
        for p, key, layout, step, verdict in zip(pair.factors, pair.keys, layouts, steps, of_pair, strict=True):
            may = good & verdict.usable
            if isinstance(may, Tensor) or may:
                stored = layout.back(step[i], p.shape) if blocks > 1 else step[i].reshape(p.shape)
                factor = decay_of(p, layout, decay, verdict.norms)
                flag = both(may, usable) if isinstance(may, Tensor) else None
                write_update_(local_shard(p), part_of(stored, p), 1.0, factor, key, flag)
    return finite


def _of_embedding(layouts: Sequence[Layout]) -> bool:
    """Tell whether W^T = s B A is stored, and looked up by columns of A: what is A there stands for B here."""
    return all(layout.turned for layout in layouts)


def _stacked(factors: Sequence[tuple[Tensor, ...]], layouts: Sequence[Layout]) -> tuple[Tensor, Tensor]:
    """Return the factors as two batches, A of (r, n) and B of (m, r) matrices, of experts as batches of stacks."""
    if layouts[0].blocks > 1:
        a, b = (
            torch.stack([layout.as_matrix(t) for t in stack])
            for layout, stack in zip(layouts, zip(*factors, strict=True), strict=True)
        )
        return a, b
    a, b = (torch.stack([t.flatten(1) for t in stack]) for stack in zip(*factors, strict=True))
    return (b.mT, a.mT) if _of_embedding(layouts) else (a, b)


def _whole_gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(whole_tensor(p)) if p.grad is None else whole_tensor(p.grad)


def product_chain(norms: Sequence[str], num_iterations: int) -> tuple[tuple[str, ...], int]:
    """Return the chain that a pair is normalised by, from that of whole matrices.

    A chain with `spectral` becomes the polar factor alone, which is exact and does not depend on the basis of the r
    dimensions; row norms taken over these would.

    Example:
        >>> from hf_stateless.optimizer.lora_product import product_chain
        >>> product_chain(("row_standardize", "spectral"), 1), product_chain(("row_l2", "col_l2"), 5)
        ((('spectral',), 1), (('row_l2', 'col_l2'), 5))
    """
    return (("spectral",), 1) if Chain(tuple(norms)).whitens else (tuple(norms), num_iterations)


def product_steps(
    a: Tensor,
    b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    *,
    size: float | Tensor,
    scaling: float,
    norms: Sequence[str] = ("spectral",),
    num_iterations: int = 1,
    scale: str = UPDATE_SCALES[0],
) -> tuple[Tensor, Tensor]:
    r"""Return the steps D_A in R^{r x n}, D_B in R^{m x r} of steepest descent in the change of s B A.

    With A = S Q, S = (A A^T)^{1/2} and Q of orthonormal rows, the layer is s C Q with C = B S. In this frame

        D_B = (size / s) N(G_B S^-1) S^-1,   D_A = (size / s) S P N(P S G_A),   P = (C^T C + (k size / s)^2 I)^{-1/2}

    where N normalises a matrix (features x r) so that its r singular values have root mean square 1; for the chain
    `spectral` it is the polar factor, all are 1, and without the second term of P the formulas are
    polar(G_B P_A) P_A and P_B polar(P_B G_A). Each step then changes s B A by a matrix of rank r whose singular
    values have root mean square `size` (D_A: at most), whatever r, s and the norms of A and B are. The second term
    bounds the turn of Q to 1/k a step, k = 3, where B is zero or small: D_B D_A adds at most size / k.
    State kept: none.

    Args:
        a: (..., r, n) factor A; where it is zero, S = I.
        b: (..., m, r) factor B; where it is zero, D_A is zero, since G_A is.
        grad_a: gradient of the loss with respect to A.
        grad_b: gradient with respect to B.
        size: root mean square of the singular values of the change of s B A by each step.
        scaling: s, which multiplies B A in the layer.
        norms: chain of norm projections; for `spectral` the steps of B A are the same for all (R A, B R^-1).
        num_iterations: how often the chain runs.
        scale: with `operator` N makes the largest singular value about 1, instead of their root mean square.

    Returns:
        D_A and D_B, in at least float32, to be subtracted.

    Example:
        >>> import torch
        >>> from hf_stateless.optimizer.lora_product import product_steps
        >>> A, B = torch.eye(2, 3), torch.zeros(2, 2)
        >>> D_A, D_B = product_steps(A, B, torch.zeros(2, 3), torch.tensor([[5.0, 0.0], [0.0, -2.0]]), size=0.1,
        ...                          scaling=2.0)
        >>> 2.0 * D_B @ A
        tensor([[ 0.1000,  0.0000,  0.0000],
                [ 0.0000, -0.1000,  0.0000]])
        >>> bool(D_A.any())
        False

    References:
        Steepest descent in a norm: https://huggingface.co/papers/2409.20325; the metric of low-rank products:
        https://huggingface.co/papers/2402.02347.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b, grad_a, grad_b = (t.to(dtype) for t in (a, b, grad_a, grad_b))
    reach = size / scaling
    values, vectors = _spectrum(a @ a.mT)
    values = torch.where(values[..., -1:] > 0, values, 1)
    root, inverse = _power(values, vectors, 0.5).to(dtype), _power(values, vectors, -0.5).to(dtype)
    frame_b = b @ root
    values, vectors = _spectrum(frame_b.mT @ frame_b)
    # A rate of 0 that nobody has read leaves no bound where B is zero, and no step that would need one.
    bound = torch.where(reach == 0, 1, reach) if isinstance(reach, Tensor) else reach
    damped = _power(values + (_STIFFNESS * bound) ** 2, vectors, -0.5).to(dtype)
    normalize = partial(_normalize, norms=norms, num_iterations=num_iterations, scale=scale)
    step_b = normalize(grad_b @ inverse) @ inverse
    step_a = root @ (damped @ normalize((damped @ (root @ grad_a)).mT).mT)
    return reach * step_a, reach * step_b


def _normalize(x: Tensor, norms: Sequence[str], num_iterations: int, scale: str) -> Tensor:
    """Give the singular values of a matrix (features x r) root mean square or maximum 1: all are 1 for `spectral`."""
    if Chain(tuple(norms)).whitens:
        return eigh(x * power_of_two_inverse(x.abs().amax((-2, -1), keepdim=True)))
    return multi_normalize(x, norms, num_iterations, scale=scale) / math.sqrt(max(x.shape[-2:]))


def _spectrum(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, none below the floor, and eigenvectors; of the identity where the matrix is not finite."""
    gram = gram.double()
    finite = gram.isfinite().all(dim=-1).all(dim=-1)[..., None, None]
    values, vectors = torch.linalg.eigh(
        torch.where(finite, gram, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    )
    return values.maximum(_RELATIVE_FLOOR * values[..., -1:]).clamp_min(0), vectors


def _power(values: Tensor, vectors: Tensor, exponent: float) -> Tensor:
    return torch.matmul(vectors * values.pow(exponent).unsqueeze(-2), vectors.mT)


LORA_PRODUCT = Rule(
    _update,
    state=lambda param, group: {"step": counter(param)},
    state_bytes=lambda shape, dtype, group: 4,
    options={"scaling": 1.0, "layout": "out_in", "layouts": ""},
    # The factors of a pair are complete at different times, and small: they are updated in `step()`.
    released="never",
    has_moments=lambda group: False,
)

"""Which layers are heads: the last ones, which write tokens, classes, boxes or values.

A transformers model says where its backbone ends. Everywhere else a head is known by what it writes (an output for
each token or label), by its name, or by standing behind the last layer. Transformer layers are never heads, wherever
they stand: the decoder of a masked autoencoder lies outside the backbone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .adapters import lora_linears
from .matrices import LAYERS


_OUTPUT = r"class(es)?|cls|b?box(es)?|obj(ect)?|mask|label|score|logits?|token|value|reward|vocab"
# A name of a layer, or of a module around it, that says that it writes what the model is asked for.
_HEAD = re.compile(
    r"(^|_)heads?\d*(_|$)|[a-z]head$|classif(y|ier)s?\d*$|logits?(_\w+)?$|"
    rf"(^|_)({_OUTPUT})_?(predict(or|ion)s?|out(put)?)s?$|"
    r"(^|_)pred(ict(ion|or)s?)?$|^predict_|^(cls|scores?|qa_outputs)$"
)
# Names that say it of what no layer follows; in transformers those of detectors say it anywhere, and `fc` nothing.
_LAST = re.compile(r"^(final_layer|generator)$")
_OF_DETECTORS = re.compile(rf"(^|_)({_OUTPUT})_embeds?$")
_LAST_ELSEWHERE = re.compile(rf"^fc$|{_OF_DETECTORS.pattern}")
# A name that a layer of somebody's own has only if it is the last one, wherever it is declared.
_OUT = re.compile(r"(^|\.)((fc|lin|linear)_)?out(put)?s?$")
# Modules that read rather than write, though they may be called heads: attention has heads, and pools.
_READS = re.compile(r"Atten|Attn|MultiHead|Pool")
# Names of what makes inputs for a backbone, wherever it is declared.
_READS_INPUT = re.compile(r"^embed_|^(in|input|pre)_proj(ection)?s?$")
# Names of what leads from one part of a model into another.
_BRIDGE = re.compile(r"proj(ect(ion|or)s?)?(_|\d|$)|adapter|connector|merger|resampl|bridge|align|pool|embed")
_LAYERS = (GradientCheckpointingLayer, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass
class Heads:
    """The modules that are heads, by identity, and what was assumed where it could not be known."""

    modules: set[int]
    assumed: list[str]
    """Names of linear layers that are heads only because of where they stand."""
    undecided: list[str]
    """Names of linear layers of which nothing tells whether they are heads, the last one the likeliest."""


@dataclass
class _Place:
    """A module with its place in the model, in the order in which modules were entered."""

    name: str
    module: nn.Module
    parents: tuple[nn.Module, ...]
    in_layer: bool
    in_transformer: bool
    """Whether the layer is one of a transformer: it has attention, or is checkpointed as one."""
    reads: bool


def find_heads(model: nn.Module) -> Heads:
    """Return the heads of a model; the factors of LoRA and what lies inside of a transformer layer are none.

    Example:
        >>> from torch import nn
        >>> from hf_stateless.trainer.heads import find_heads
        >>> model = nn.Sequential()
        >>> model.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
        >>> model.out = nn.Linear(8, 3)
        >>> find_heads(model).assumed
        ['out']
    """
    places = list(_places(model))
    by_id = {id(place.module): i for i, place in enumerate(places)}
    outermost = list(_outermost_transformers(model))
    named = set(_named(places))
    heads = {i for inner in outermost for i in _outside_backbone(inner, places, by_id)} | named
    # A table that is looked up is an input, whatever its name and its place; tied to a head it is found below.
    heads = {i for i in heads if not isinstance(places[i].module, nn.Embedding)}
    heads |= {i for i, place in enumerate(places) if _is_labelled(place)}
    for inner in (place.module for place in places if isinstance(place.module, PreTrainedModel)):
        # A model may be made of others that have a head of their own (BLIP-2, encoder-decoder pairs).
        output = inner.get_output_embeddings()
        heads |= {by_id[id(m)] for m in output.modules() if id(m) in by_id} if output is not None else set()
    heads |= set(_as_large_as_vocabulary(places))
    assumed, undecided = _by_place(places, heads, outermost)
    adapters = {id(m) for place in places for m in lora_linears(place.module)}
    found = {id(places[i].module) for i in heads | set(assumed)} - adapters
    assumed += [i for i in heads - named if _is_own_addition(places[i])]
    names = [places[i].name for i in sorted(assumed) if id(places[i].module) in found]
    return Heads(found, names, [places[i].name for i in undecided])


def _places(model: nn.Module) -> Iterator[_Place]:
    """Yield every module once, with the modules around it."""
    seen: set[int] = set()

    def walk(name: str, module: nn.Module, around: _Place | None) -> Iterator[_Place]:
        if id(module) in seen:
            return
        seen.add(id(module))
        parents = (*around.parents, around.module) if around else ()
        in_transformer = bool(around and around.in_transformer) or _is_transformer_layer(module, parents)
        in_layer = in_transformer or bool(around and around.in_layer) or _is_block(name, module, parents)
        reads = around is not None and (around.reads or _is_attention(module))
        place = _Place(name, module, parents, in_layer, in_transformer, reads)
        yield place
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child, place)

    yield from walk("", model, None)


def _is_attention(module: nn.Module) -> bool:
    """Tell attention and pooling by their class, or by projections to queries and keys."""
    names = {name.partition("_")[0].partition("proj")[0] for name, _ in module.named_children()}
    return bool(_READS.search(type(module).__name__)) or {"q", "k"} <= names or {"query", "key"} <= names


def _is_transformer_layer(module: nn.Module, parents: tuple[nn.Module, ...]) -> bool:
    """Tell whether a module is a layer of a transformer or a recurrent one, or a numbered module with attention."""
    if isinstance(module, (*_LAYERS, nn.RNNBase, nn.RNNCellBase)):
        return True
    kinds = [type(m).__name__ for m in module.modules() if m is not module] if _is_numbered(module, parents) else []
    return any(_READS.search(kind) and "Pool" not in kind for kind in kinds)


def _is_block(name: str, module: nn.Module, parents: tuple[nn.Module, ...]) -> bool:
    """Tell whether a module is one of several alike, with a norm or some weights, in a container that is no head."""
    container = re.sub(r"(\.\d+)+$", "", name).rpartition(".")[2]
    if not _is_numbered(module, parents) or type(module) is nn.Sequential:
        return False
    if _HEAD.search(container) or _OF_DETECTORS.search(container):
        return False
    alike = sum(type(m) is type(module) for m in parents[-1].children())
    normed = any("Norm" in type(m).__name__ for m in module.modules() if m is not module)
    weights = sum(1 for _ in _weights(module))
    return (alike > 1 and weights > 1) or (weights > 0 and normed and isinstance(parents[-1], nn.ModuleList))


def _is_numbered(module: nn.Module, parents: tuple[nn.Module, ...]) -> bool:
    inside = bool(parents) and isinstance(parents[-1], nn.ModuleList | nn.Sequential)
    return inside and not isinstance(module, PreTrainedModel)


def _weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of the linear layers and convolutions of a module."""
    layers = (m for m in module.modules() if isinstance(m, LAYERS))
    yield from (p for m in layers for p in m.parameters(recurse=False) if p.ndim > 1)


def _outermost_transformers(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the transformers models inside PEFT, DDP, `torch.compile` and other wrappers, not the models in those."""
    if isinstance(module, PreTrainedModel):
        yield module
    else:
        for child in module.children():
            yield from _outermost_transformers(child)


def _outside_backbone(inner: PreTrainedModel, places: list[_Place], by_id: dict[int, int]) -> Iterator[int]:
    """Yield what lies behind the backbone of a transformers model, and behind the layers that lie outside it too."""
    backbone = inner.base_model
    if backbone is inner:
        return
    children = [child for name, child in inner.named_children() if not _READS_INPUT.search(name)]
    # A norm alone ends the backbone, and a whole model beside it, such as a codec, has its own heads.
    children = [child for child in children if not isinstance(child, PreTrainedModel)]
    children = [child for child in children if next(_weights(child), None) is not None]
    inside = {id(m) for m in backbone.modules()}
    around = {id(m) for child in children for m in child.modules()} - inside
    outside = [by_id[key] for key in around if key in by_id]
    last = max([by_id[id(backbone)], *(i for i in outside if places[i].in_transformer)])
    yield from (i for i in outside if i > last)


def _is_labelled(place: _Place) -> bool:
    """Tell a classifier by its outputs, for models that do not name their backbone (CLIP, Whisper)."""
    owner = next((m for m in reversed(place.parents) if isinstance(m, PreTrainedModel)), None)
    direct = owner is not None and len(place.parents) - place.parents.index(owner) <= 2  # PEFT may wrap it
    labels = getattr(owner.config, "num_labels", None) if owner is not None and direct else None
    return isinstance(place.module, nn.Linear) and place.module.out_features == labels


def _named(places: list[_Place]) -> Iterator[int]:
    """Yield what is a head by a name on its way, behind the layers that this module holds."""
    last = max((i for i, place in enumerate(places) if place.in_layer), default=-1)
    for i, place in enumerate(places):
        part = place.name.rpartition(".")[2]
        theirs = any(_is_of_transformers(m) for m in place.parents)
        at_end = i > last and (_LAST.search(part) or (not theirs and _LAST_ELSEWHERE.search(part)))
        named = _HEAD.search(part) or at_end or (theirs and _OF_DETECTORS.search(part))
        if not named or place.in_layer or place.reads or isinstance(place.module, PreTrainedModel):
            continue
        if "prompt_encoder." in place.name:  # what reads the prompts of SAM is called as what writes masks
            continue
        inside = [i, *(j for j in range(i + 1, len(places)) if places[j].name.startswith(f"{place.name}."))]
        behind = max((j for j in inside if places[j].in_layer), default=i - 1)
        yield from (j for j in inside if j > behind and not places[j].reads)


def _as_large_as_vocabulary(places: list[_Place]) -> Iterator[int]:
    """Yield the linear layers that have an output for each row of the largest embedding, and its width as inputs."""
    tables = [place.module for place in places if isinstance(place.module, nn.Embedding)]
    if not tables:
        return
    largest = max(tables, key=lambda table: table.num_embeddings)
    vocabulary = (largest.num_embeddings, largest.embedding_dim)
    for i, place in enumerate(places):
        m, free = place.module, not (place.in_layer or place.reads)
        sizes = (m.out_features, m.in_features) if isinstance(m, nn.Linear) and free else None
        if sizes == vocabulary and sizes[0] > sizes[1]:
            yield i


def _by_place(places: list[_Place], heads: set[int], outermost: list[PreTrainedModel]) -> tuple[list[int], list[int]]:
    """Find heads behind the last layer of a module that is no class of transformers, and what remains a question."""
    known = {id(m) for place in places if _is_of_transformers(place.module) for m in place.module.modules()}
    last = max((i for i, place in enumerate(places) if place.in_layer or id(place.module) in known), default=-1)
    linears = [
        i
        for i, place in enumerate(places)
        if isinstance(place.module, nn.Linear)
        and id(place.module) not in known
        and not (place.in_layer or place.reads)
    ]
    if last < 0:
        return [], linears if len(linears) > 1 and not heads.intersection(linears) else []
    hidden = {m.config.hidden_size for m in outermost if hasattr(m.config, "hidden_size")}
    # Behind a whole model of transformers a projection may lead into another one; behind layers it is the last.
    bridges = {i for i in linears if id(places[last].module) in known and _is_bridge(places[i])}
    apart = {i for i in linears if _writes(places[i].module, hidden) or _OUT.search(places[i].name)}
    behind = [i for i in linears if i not in heads and (i > last or i in apart)]
    return [i for i in behind if i not in bridges], [i for i in behind if i in bridges]


def _is_of_transformers(module: nn.Module) -> bool:
    """Tell whether a model says itself where its head is: a class of transformers, or one with a backbone."""
    if not isinstance(module, PreTrainedModel):
        return False
    return module.base_model is not module or _kind(module).startswith("transformers.")


def _is_own_addition(place: _Place) -> bool:
    """Tell whether a linear layer was added by somebody's own class to a backbone of transformers."""
    owner = next((m for m in reversed(place.parents) if isinstance(m, PreTrainedModel)), None)
    return isinstance(place.module, nn.Linear) and owner is not None and not _kind(owner).startswith("transformers.")


def _kind(module: nn.Module) -> str:
    """Return where a class is from; FSDP2 puts a subclass of its own in place of it."""
    return next(base for base in type(module).__mro__ if not base.__name__.startswith("FSDP")).__module__


def _writes(module: nn.Module, hidden: set[int]) -> bool:
    """Tell whether a layer beside a transformers model reads its hidden states and makes something else of them."""
    return isinstance(module, nn.Linear) and module.in_features in hidden and module.out_features not in hidden


def _is_bridge(place: _Place) -> bool:
    return any(_BRIDGE.search(part) for part in place.name.split(".")[-2:])

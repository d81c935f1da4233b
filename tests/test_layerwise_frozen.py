"""Updates in backward while parameters are frozen and thawed, and after a backward that failed."""

import pytest
import torch
from layerwise_runs import assert_same, each_release, loss_of, make

from hf_stateless import create_optimizer


FROZEN = {
    "one layer": lambda name: ".layers.0." in name,
    "one projection": lambda name: name.endswith("layers.1.mlp.up_proj.weight"),
    "the embeddings": lambda name: "embed" in name or "lm_head" in name,
    "all matrices of attention": lambda name: "self_attn" in name,
}


def set_trained(model, is_frozen):
    for name, p in model.named_parameters():
        p.requires_grad_(not is_frozen(name))


def steps(model, optimizer, count=2, seed=0):
    for i in range(count):
        optimizer.train()
        loss_of(model, seed=seed + i).backward()
        optimizer.step()
        optimizer.zero_grad()


def both(release, play):
    """The models that an optimizer with and without `_layerwise` has trained by the same play."""
    models = []
    for suffix, options in (("_layerwise", {"release": release}), ("", {})):
        model = make("llama")
        play(model, create_optimizer(model, f"sinkgd{suffix}", lr=1e-2, **options))
        models.append(model)
    return models


@each_release
@pytest.mark.parametrize("what", FROZEN)
def test_what_is_frozen_before_the_first_forward_stays_and_the_rest_trains(what, release):
    def play(model, optimizer):
        set_trained(model, FROZEN[what])
        steps(model, optimizer)

    released, plain = both(release, play)
    assert_same(released, plain)
    start = make("llama")
    moved = {name: not torch.equal(p, start.get_parameter(name)) for name, p in released.named_parameters()}
    assert moved == {name: not FROZEN[what](name) for name in moved}


@each_release
@pytest.mark.parametrize("what", FROZEN)
def test_freezing_and_thawing_between_steps_trains_as_the_plain_name_does(what, release):
    def play(model, optimizer):
        steps(model, optimizer)
        set_trained(model, FROZEN[what])
        steps(model, optimizer, seed=2)
        set_trained(model, lambda name: False)
        steps(model, optimizer, seed=4)

    assert_same(*both(release, play))


@each_release
@pytest.mark.parametrize("layer", [0, 1])
def test_after_an_error_in_backward_zero_grad_starts_the_step_anew(layer, release):
    model = make("llama")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2, release=release)
    optimizer.train()

    def out_of_memory(grad):
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.model.layers[layer].self_attn.q_proj.weight.register_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        loss_of(model).backward()
    handle.remove()
    optimizer.zero_grad()
    assert optimizer.released_norm() is None
    before = [p.detach().clone() for p in model.parameters()]
    steps(model, optimizer)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

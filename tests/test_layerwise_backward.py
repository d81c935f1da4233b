"""Updates in backward under backward passes of every kind: checkpointed, shared, compiled, offloaded."""

from itertools import accumulate

import pytest
import torch
from conftest import VOCAB_SIZE
from layerwise_runs import assert_same, batch_for, both, each_name, each_release, loss_of, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_stateless import create_optimizer


# transformers renames gradient checkpointing to activation checkpointing; both names work, and PEFT uses the old one.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")


# ---- Backward passes of every kind


class Blocks(nn.Module):
    """Linear blocks, checkpointed if asked for, the first of them used twice if it is shared."""

    def __init__(self, use_reentrant=None, shared=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB_SIZE, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.use_reentrant, self.shared = use_reentrant, shared

    def forward(self, input_ids, labels=None):
        hidden = self.embed(input_ids)
        for block in [*self.blocks, *([self.blocks[0]] if self.shared else [])]:
            run = block if self.use_reentrant is None else self.checkpointed(block)
            hidden = torch.tanh(run(hidden))
        return hidden.square().mean()

    def checkpointed(self, block):
        return lambda hidden: checkpoint(block, hidden, use_reentrant=self.use_reentrant)


def blocks_trained(name, steps=3, **options):
    model = Blocks(**options)
    optimizer = create_optimizer(model, name, lr=1e-2)
    for step in range(steps):
        model(**batch_for("llama", step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks_are_updated_as_without_hooks(use_reentrant):
    plain = blocks_trained("sinkgd", use_reentrant=use_reentrant)
    assert_same(blocks_trained("sinkgd_layerwise", use_reentrant=use_reentrant), plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("key", ["llama", "gpt2", "qwen3_moe"])
def test_transformers_gradient_checkpointing_changes_nothing(key, use_reentrant):
    def prepare(model):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    assert_same(*both("sinkgd", key, prepare=prepare))


@pytest.mark.parametrize("use_reentrant", [None, False])
def test_a_module_that_is_used_twice_is_updated_once_with_the_sum(use_reentrant):
    plain = blocks_trained("sinkgd", use_reentrant=use_reentrant, shared=True)
    assert_same(blocks_trained("sinkgd_layerwise", use_reentrant=use_reentrant, shared=True), plain)


def test_a_shared_module_under_reentrant_checkpointing_is_refused_with_the_fix():
    with pytest.raises(RuntimeError, match=r"blocks\.0\.weight got a second gradient .*use_reentrant=False"):
        blocks_trained("sinkgd_layerwise", use_reentrant=True, shared=True)


def test_two_modules_that_share_a_weight_are_updated_once():
    def prepare(model):
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight

    assert_same(*both("sinkgd", prepare=prepare))


def offloaded(model, key, seed):
    with torch.autograd.graph.save_on_cpu():
        return loss_of(model, key, seed)


def autocast(model, key, seed):
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of(model, key, seed)


def partly_used(model, key, seed):
    """Leave the last layer out of every second step."""
    return loss_of(model, key, seed) if seed % 2 else model.model.embed_tokens.weight.square().mean()


@pytest.mark.parametrize("forward", [offloaded, autocast, partly_used])
@each_release
def test_forward_passes_of_every_kind_give_the_steps_of_the_plain_optimizer(forward, release):
    assert_same(*both("sinkgd", forward=forward, release=release))


def compiled(model, key, seed):
    """The loss of a compiled model, which is not a graph of single operations."""
    loss = loss_of(model, key, seed)
    assert "Compiled" in type(loss.grad_fn).__name__
    return loss


@each_name
def test_a_compiled_model_takes_the_steps_of_the_plain_optimizer(name):
    assert_same(*both(name, prepare=lambda model: model.compile(backend="aot_eager"), forward=compiled))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(8))

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64, bias=False)

    def forward(self, hidden):
        return torch.tanh(self.linear(hidden))


def bytes_of_backward(pieces):
    """The most that a backward pass has allocated at a time, in gradients of one layer."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Deep()
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2)
    for module in pieces(model):
        module.compile(backend="aot_eager")
    for _ in range(2):
        loss = model(torch.randn(2, 64)).sum()
        with torch.profiler.profile(profile_memory=True) as profile:
            loss.backward()
        optimizer.step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(sizes)) / (64 * 64 * 4)


def test_compiling_layer_by_layer_keeps_the_memory_and_in_one_piece_loses_it():
    """A compiled graph hands over all its gradients at its end."""
    assert bytes_of_backward(lambda model: []) < 4
    assert bytes_of_backward(lambda model: model.layers) < 4
    assert bytes_of_backward(lambda model: [model]) > 8


@pytest.mark.slow
def test_a_model_compiled_by_inductor_takes_the_steps_of_the_plain_optimizer():
    assert_same(*both("sinkgd", prepare=lambda model: model.compile(), forward=compiled), rtol=1e-5, atol=1e-6)


@each_release
def test_held_backward_passes_are_summed_into_one_update(release):
    model, plain = make("llama"), make("llama")
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2, release=release)
    reference = create_optimizer(plain, "sinkgd", lr=1e-2)
    for step in range(3):
        with optimizer.hold(), optimizer.hold():
            loss_of(model, seed=2 * step).backward()
            assert all(p.grad is not None for p in model.parameters())
        loss_of(model, seed=2 * step + 1).backward()
        loss_of(plain, seed=2 * step).backward()
        loss_of(plain, seed=2 * step + 1).backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    assert_same(model, plain)

"""Small models with known parts, and a step over them, for tests with several processes."""

import torch
from conftest import TINY_MODELS
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_stateless import create_optimizer


WORLD, STEPS, DEPTH, BLOCKS = 2, 3, 8, 3


class Tower(nn.Module):
    """Two kinds of layers in turn, which makes two groups of matrices; some can be left out of a forward."""

    def __init__(self):
        super().__init__()
        self.spare = nn.LayerNorm(16)
        self.embed = nn.Embedding(31, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) if i % 2 else Conv1D(16, 16) for i in range(DEPTH))
        self.norm = nn.LayerNorm(16)

    def forward(self, tokens, without=()):
        hidden = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            hidden = hidden if i in without else torch.tanh(block(hidden))
        return (self.norm(hidden) - 1).pow(4).mean()


class Tied(nn.Module):
    """A matrix that two modules share, an embedding that is also the head, and a weight of the model's own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 31, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, tokens):
        hidden = self.second(torch.tanh(self.first(self.embed(tokens)))) * self.scale
        return self.head(hidden).square().mean()


class Reentrant(Tower):
    """Checkpointed blocks, with a norm behind them that is not checkpointed."""

    def forward(self, tokens):
        hidden = self.spare(self.embed(tokens))
        for block in self.blocks:
            hidden = torch.tanh(checkpoint(block, hidden, use_reentrant=True))
        return (self.norm(hidden) - 1).pow(4).mean()


class Block(nn.Module):
    """Four matrices: two of one shape that two ranks cut unevenly, and one of a single row, which one rank has."""

    def __init__(self):
        super().__init__()
        self.up, self.side, self.down = nn.Linear(16, 9), nn.Linear(16, 9), nn.Linear(9, 16)
        self.gate = nn.Linear(16, 1)

    def forward(self, hidden, in_part=False):
        if in_part:
            return self.down(self.up(hidden))
        inner = torch.tanh(self.up(hidden)) * self.side(hidden)
        return hidden + torch.sigmoid(self.gate(hidden)) * self.down(inner)


# Of `Blocks`, the one row and the one outside included, which nothing would take for a matrix unless it is named.
MATRICES = ".*(up|side|down|gate|out)"


class Blocks(nn.Module):
    """Blocks of several matrices, of which the middle one can be used in part, and a matrix outside of them."""

    def __init__(self):
        super().__init__()
        self.spare = nn.LayerNorm(16)
        self.embed = nn.Embedding(31, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.out = nn.Linear(16, 5)

    def forward(self, tokens, in_part=False):
        hidden = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            hidden = block(hidden, in_part and i == 1)
        return self.out(hidden).pow(4).mean()


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = TINY_MODELS["llama"]()

    def forward(self, tokens):
        return self.model(input_ids=tokens, labels=tokens).loss


def built(kind, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return kind().to(dtype)


def tokens(rank=None, step=0):
    """All tokens of a step, or those of one rank."""
    every = torch.randint(0, 31, (4, 6), generator=torch.Generator().manual_seed(step))
    return every if rank is None else every.chunk(WORLD)[rank]


def weights_of(model):
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def step_once(model, optimizer, *inputs):
    model(*inputs).backward()
    optimizer.step()
    optimizer.zero_grad()


def refusal(make_error):
    try:
        make_error()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def sharded(model):
    for block in (model.embed, *model.blocks):
        fully_shard(block)
    return fully_shard(model)


def assert_close(actual, expected, tolerance=0.0):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def trained_alone(kind, name, options, steps, dtype=torch.float32, frozen=()):
    """One process with the tokens of all ranks; each step has as many micro-batches as it is given."""
    model = built(kind, dtype)
    for part in frozen:
        getattr(model, part).requires_grad_(False)
    optimizer = create_optimizer(model, name, lr=0.01, lr_scale=0.2, weight_decay=0.1, **options)
    for micro_batches in steps:
        for micro_batch in micro_batches:
            model(tokens(step=micro_batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)

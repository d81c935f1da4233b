"""Claims about learning rates by kind of parameter under FSDP2: the same rates and steps, resumes of older files."""

import pytest
import torch
from conftest import TINY_MODELS
from rank_processes import joined, on_ranks
from test_rates import GIVEN, LR, backward, scales_of
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from hf_stateless import create_optimizer
from hf_stateless.trainer.untrained import is_untrained


# PEFT 0.21 reads `is_gradient_checkpointing`, which transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

CASES = {
    "plain": ("llama", {"rates": "pretraining"}),
    "tied": ("llama_tied", {"rates": "pretraining"}),
    "stateless": ("llama", {"embeddings": "stateless", **GIVEN}),
}


def sharded_steps(kind, options, *, shard):
    torch.manual_seed(0)
    model = TINY_MODELS[kind]()
    if shard:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    untrained = is_untrained(model)
    optimizer = create_optimizer(model, "sinkgd", lr=LR, **options)
    for _ in range(2):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    weights = {key: p.detach() for key, p in model.named_parameters()}
    return scales_of(optimizer), untrained, {k: w.full_tensor() if shard else w for k, w in weights.items()}


def resumed_scales(folder):
    """A sharded checkpoint of a run without scales in one that has some, and the other way round."""
    found = []
    for before, after in (({}, {}), (GIVEN, {}), (GIVEN, {"rest_lr_scale": 3})):
        model = TINY_MODELS["llama"]()
        fully_shard(model)
        first, second = (create_optimizer(model, "sinkgd", lr=LR, **options) for options in (before, after))
        checkpoint.save(get_optimizer_state_dict(model, first), checkpoint_id=f"{folder}/{len(found)}")
        state = get_optimizer_state_dict(model, second)
        checkpoint.load(state, checkpoint_id=f"{folder}/{len(found)}")
        set_optimizer_state_dict(model, second, state)
        found.append(scales_of(second))
    return found


def worker(rank, folder):
    torch.set_num_threads(1)
    with joined(rank, folder, 2) as save:
        results = {name: sharded_steps(*case, shard=True) for name, case in CASES.items()}
        save({**results, "resumed": resumed_scales(folder)})


def test_sharded_models_have_the_same_rates_and_take_the_same_steps():
    for of_rank in on_ranks(worker, 2):
        for name, case in CASES.items():
            expected = sharded_steps(*case, shard=False)
            scales, untrained, weights = of_rank[name]
            assert (scales, untrained) == expected[:2]
            torch.testing.assert_close(weights, expected[2], rtol=1e-4, atol=2e-5)
        ones = {"matrix": 1, "embedding": 1, "head": 1, "rest": 1}
        assert of_rank["resumed"] == [ones, ones, {**ones, "rest": 3}]

"""What each rank does with updates in backward under DDP; `test_layerwise_distributed.py` starts it."""

import contextlib
import time

import torch
from accelerate import Accelerator
from distributed_models import (
    DEPTH,
    STEPS,
    WORLD,
    Llama,
    Reentrant,
    Tied,
    Tower,
    built,
    refusal,
    step_once,
    tokens,
    weights_of,
)
from live_gradients import LiveGradients, gradient_bytes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_stateless import StatelessOptimizer, create_optimizer


# Each case: the model, its dtype, the name and the options of the optimizer.
REPLICATED = {
    **{name: (Tower, torch.float32, name, {}) for name in ("swan", "sinkgd", "multinorm")},
    "bfloat16": (Tower, torch.bfloat16, "sinkgd", {}),
    "all released": (Tower, torch.float32, "sinkgd", {"release": "all"}),
    "tied": (Tied, torch.float32, "sinkgd", {}),
    "tied, all released": (Tied, torch.float32, "sinkgd", {"release": "all"}),
    "llama": (Llama, torch.float32, "sinkgd", {}),
    "llama, all released": (Llama, torch.bfloat16, "sinkgd", {"release": "all"}),
}
# DDP is told of parameters that no rank uses, here `spare`.
UNUSED = {"find_unused_parameters": True}


def make(case, rank, layerwise, wrap=DistributedDataParallel):
    """Return the wrapped model and its optimizer; ranks start from different weights, which wrapping has to mend."""
    kind, dtype, name, options = REPLICATED[case]
    model = built(kind, dtype, seed=rank)
    if layerwise:
        optimizer = create_optimizer(model, f"{name}_layerwise", lr=0.01, lr_scale=0.2, weight_decay=0.1, **options)
        return wrap(model, **UNUSED), optimizer
    plain = wrap(model, **UNUSED)
    options = {key: value for key, value in options.items() if key != "release"}
    return plain, create_optimizer(plain, name, lr=0.01, lr_scale=0.2, weight_decay=0.1, **options)


def run_replicated(rank, case):
    trained = []
    for layerwise in (True, False):
        model, optimizer = make(case, rank, layerwise)
        for step in range(STEPS):
            step_once(model, optimizer, tokens(rank, step))
        trained.append(weights_of(model))
    return trained


def run_partly_used(rank, release):
    """Layers that one rank leaves out, layers that both leave out, and at last a rank that uses no layer at all."""
    left_out = [([(1, 2), ()], [(), (6, 7)]), ([(0, 7), (7,)], [(7,), (3, 7)]), ([tuple(range(DEPTH)), ()], [(), ()])]
    trained = []
    for layerwise in (True, False):
        model = built(Tower)
        if layerwise:
            optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01, weight_decay=0.1, release=release)
        model = DistributedDataParallel(model, **UNUSED)
        if not layerwise:
            optimizer = create_optimizer(model, "sinkgd", lr=0.01, weight_decay=0.1)
        for case in left_out:
            for step, without in enumerate(case):
                step_once(model, optimizer, tokens(rank, step), without[rank])
        trained.append(weights_of(model))
    return trained


def run_accumulated(rank, release, hold_all):
    trained = []
    for layerwise in (True, False):
        model = built(Tower)
        if layerwise:
            optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01, release=release)
        model = DistributedDataParallel(model, **UNUSED)
        optimizer = optimizer if layerwise else create_optimizer(model, "sinkgd", lr=0.01)
        for step in range(STEPS):
            with model.no_sync(), optimizer.hold():
                model(tokens(rank, 2 * step)).backward()
            with optimizer.hold() if hold_all else contextlib.nullcontext():
                model(tokens(rank, 2 * step + 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(weights_of(model))
    return trained


def run_measured(rank, release):
    """Peak of live gradient bytes in the second step, what DDP's buckets hold, and the sizes of the groups."""
    model = built(Tower)
    model.spare.requires_grad_(False)
    live = LiveGradients(model)
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01, release=release)
    model = DistributedDataParallel(model)
    peaks = []
    for step in range(2):
        live.peak = 0
        model(tokens(rank, step)).backward()
        peaks.append(live.peak)
        optimizer.step()
        optimizer.zero_grad()
    sizes = gradient_bytes(optimizer)
    managed = model._get_ddp_logging_data()["total_parameter_size_bytes"]
    deadline = time.monotonic() + 10
    while live.now() and time.monotonic() < deadline:  # gloo's threads let go of a tensor a little later
        time.sleep(0.01)
    return {"peaks": peaks, "managed": managed, "left": live.now(), **sizes}


def run_clipped(rank):
    """The norm that accelerate reports and the weights after clipping, layer-wise and plain."""
    results = []
    for layerwise in (True, False):
        accelerator, model = Accelerator(cpu=True), built(Llama)
        assert accelerator.num_processes == WORLD
        name = "sinkgd_layerwise" if layerwise else "sinkgd"
        model, optimizer = accelerator.prepare(
            model, create_optimizer(model, name, lr=0.01, lr_scale=0.2, adamw_eps=1e-2)
        )
        norms = []
        for step in range(STEPS):
            accelerator.backward(model(tokens(rank, step)))
            norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.1))
            optimizer.step()
            optimizer.zero_grad()
        results.append((torch.stack(norms), weights_of(model)))
    return results


def run_compiled(rank):
    """DDP around a compiled model, of which the names have a prefix."""
    model = built(Tower)
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01, lr_scale=0.2, weight_decay=0.1)
    wrapped = DistributedDataParallel(torch.compile(model, backend="aot_eager"), **UNUSED)
    for step in range(STEPS):
        step_once(wrapped, optimizer, tokens(rank, step))
    return weights_of(model)


def run_refused(rank):
    def reentrant():
        model = built(Reentrant)
        model.norm.requires_grad_(False)  # then backward begins inside a checkpoint
        optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01)
        step_once(DistributedDataParallel(model), optimizer, tokens(rank))

    return {
        "wrapped": refusal(
            lambda: create_optimizer(DistributedDataParallel(built(Tower)), "sinkgd_layerwise", lr=0.01)
        ),
        "reentrant": refusal(reentrant),
    }


def run_reentrant(rank):
    trained = []
    for layerwise in (True, False):
        model = built(Reentrant)
        if layerwise:
            optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01, lr_scale=0.2)
        model = DistributedDataParallel(model)
        optimizer = optimizer if layerwise else create_optimizer(model, "sinkgd", lr=0.01, lr_scale=0.2)
        for step in range(STEPS):
            step_once(model, optimizer, tokens(rank, step))
        trained.append(weights_of(model))
    return trained


def run_wrapped_twice(rank):
    """DDP around another module than the optimizer knows, so that it also has the hooked matrices in its buckets."""
    model = built(Tower)
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01, lr_scale=0.2, weight_decay=0.1)
    wrapped = DistributedDataParallel(nn.Sequential(model), gradient_as_bucket_view=True, **UNUSED)
    for step in range(STEPS):
        step_once(wrapped, optimizer, tokens(rank, step))
    return weights_of(model)


def run_by_hand(rank):
    """Groups made by hand around a model that DDP has in its buckets."""
    model = DistributedDataParallel(built(Tower), **UNUSED)
    matrices = [p for p in model.parameters() if p.shape == (16, 16)]
    optimizer = StatelessOptimizer([{"params": matrices, "algorithm": "multinorm"}], lr=0.01, release="matrices")
    optimizer.train()
    step_once(model, optimizer, tokens(rank))
    return weights_of(model)


def run_late(rank, join):
    """torch.distributed is initialised after the optimizer was made."""
    model = built(Tower)
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=0.01)
    join()
    model = DistributedDataParallel(model, **UNUSED)
    message = refusal(lambda: model(tokens(rank)).backward())
    optimizer.zero_grad()
    optimizer.train()
    model.require_forward_param_sync = True
    return message

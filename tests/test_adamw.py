"""AdamW for what is no matrix, its 8-bit and stateless stand-ins, and the bytes that all this costs."""

import copy
import io
import sys

import pytest
import reference
import torch
from conftest import dense, relative_error, tiny_inputs
from transformers import LlamaConfig, LlamaForCausalLM

import hf_stateless.optimizer.adamw
from hf_stateless import StatelessOptimizer, create_optimizer


SHAPES = [(7, 300), (33,), (1, 5), (), (64, 64)]
GIB = 2**30


def values(shape, **options):
    return dense(*(shape or (1,)), **options).reshape(shape)


def parameters(dtype=torch.float32):
    return [torch.nn.Parameter(values(shape, dtype=dtype, seed=i)) for i, shape in enumerate(SHAPES)]


def take_steps(optimizer, params, steps):
    for step in steps:
        for i, p in enumerate(params):
            p.grad = values(p.shape, dtype=p.dtype, seed=1000 * step + i + 1)
        optimizer.step()
    return [p.detach().clone() for p in params]


def optimizer_of(params, algorithm="adamw", lr=1e-2, **options):
    if algorithm == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    return StatelessOptimizer([{"params": params, "algorithm": algorithm, **options}], lr=lr)


def state_bytes(optimizer):
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values())


# ---- AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)], ids=str)
def test_ten_steps_equal_torch_adamw_to_the_bit(dtype, betas):
    ours, theirs = parameters(dtype), parameters(dtype)
    options = {"betas": betas, "eps": 1e-6, "weight_decay": 0.1}
    mine = optimizer_of(ours, stochastic_rounding=False, **options)
    torchs = torch.optim.AdamW(theirs, lr=1e-2, fused=True, **options)
    weights, expected = take_steps(mine, ours, range(10)), take_steps(torchs, theirs, range(10))
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    for p, q in zip(ours, theirs, strict=True):
        assert set(mine.state[p]) == set(torchs.state[q])
        torch.testing.assert_close(dict(mine.state[p]), dict(torchs.state[q]), rtol=0, atol=0)


def test_ten_steps_equal_the_formula():
    weight = torch.nn.Parameter(dense(8, 12))
    optimizer = optimizer_of([weight], weight_decay=0.1)
    expected, m, v = reference.f64(weight), torch.zeros(8, 12), torch.zeros(8, 12)
    for step in range(10):
        weight.grad = dense(8, 12, seed=step + 1)
        expected, m, v = reference.adamw(expected, weight.grad, m, v, step + 1, lr=1e-2, weight_decay=0.1)
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_a_model_gets_torch_adamw_for_everything_but_its_matrices(make_model):
    ours, theirs = make_model("llama"), make_model("llama")
    optimizer = create_optimizer(ours, "sinkgd", lr=1e-3, lr_scale=0.0)
    rest = [p for name, p in theirs.named_parameters() if "proj" not in name]
    adamw = torch.optim.AdamW(rest, lr=1e-3, fused=True, weight_decay=0.0)
    for _ in range(3):
        for model, stepped in ((ours, optimizer), (theirs, adamw)):
            model.zero_grad()
            model(**tiny_inputs("llama")).loss.backward()
            stepped.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_a_bf16_second_moment_follows_what_rounding_to_nearest_cannot():
    moved = {}
    for stochastic_rounding in (True, False):
        weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
        optimizer = optimizer_of([weight], stochastic_rounding=stochastic_rounding)
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()
        optimizer.state[weight]["exp_avg_sq"].fill_(1.0)
        for _ in range(50):
            optimizer.step()
        moved[stochastic_rounding] = 1 - optimizer.state[weight]["exp_avg_sq"].float().mean().item()
    exact = 0.75 * (1 - 0.999**50)
    assert moved[True] == pytest.approx(exact, rel=0.05)
    assert moved[False] == 0.0


def test_bf16_weights_follow_a_float32_run():
    size, steps, lr = (64, 128), 40, 3e-5
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))
        optimizer = optimizer_of([weight], lr=lr)
        for step in range(steps):
            weight.grad = (torch.ones(size) + 0.3 * dense(*size, seed=step)).to(dtype)
            optimizer.step()
        moved[dtype] = 1 - weight.detach().float().mean().item()
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.1)


# ---- 8-bit moments


def test_8bit_adamw_follows_adamw():
    """Each moment is stored to about one part in forty, so an update may be off by a few percent."""
    start, moved = dense(64, 300), {}
    for algorithm in ("adamw", "adamw_8bit"):
        weight = torch.nn.Parameter(start.clone())
        take_steps(optimizer_of([weight], algorithm, weight_decay=0.1), [weight], range(30))
        moved[algorithm] = weight.detach() - start
    assert 0 < relative_error(moved["adamw_8bit"], moved["adamw"]) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_8bit_moments_take_two_bytes_per_parameter(dtype):
    weight = torch.nn.Parameter(dense(128, 1024, dtype=dtype))
    optimizer = optimizer_of([weight], "adamw_8bit")
    take_steps(optimizer, [weight], range(1))
    assert round(state_bytes(optimizer) / weight.numel(), 2) == 2.03  # two codes, and two maxima per 256


@pytest.mark.parametrize("algorithm", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_work_in_chunks_equals_work_at_once(algorithm, dtype, monkeypatch):
    results = []
    for chunk in (1 << 24, 1):
        monkeypatch.setattr(hf_stateless.optimizer.adamw, "_CHUNK", chunk)
        weight = torch.nn.Parameter(dense(600, 24, dtype=dtype))
        optimizer = optimizer_of([weight], algorithm)
        results.append(take_steps(optimizer, [weight], range(3))[0].float())
        assert optimizer.state[weight]["step"] == 3
    # The noise of stochastic rounding depends on the chunk: two neighbouring values for each of three steps.
    atol = 0.0 if dtype == torch.float32 else 4 * 3 * torch.finfo(dtype).eps
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=atol)


def test_8bit_moments_without_bitsandbytes_say_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    weight = torch.nn.Parameter(dense(4, 4))
    weight.grad = dense(4, 4)
    optimizer = StatelessOptimizer([{"params": [weight], "algorithm": "adamw_8bit"}])
    with pytest.raises(
        ImportError, match=r"bitsandbytes, which is not installed: type pip install \"hf_stateless\[bnb"
    ):
        optimizer.step()


# ---- Sinkhorn momentum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sinkhorn_momentum_equals_its_reference(dtype):
    weight = torch.nn.Parameter(dense(40, 12, dtype=dtype))
    optimizer = optimizer_of([weight], "sinkhorn_momentum", lr=0.1)
    expected, momentum = reference.f64(weight), torch.zeros(40, 12)
    for step in range(10):
        weight.grad = dense(40, 12, dtype=dtype, seed=step + 1)
        weight.grad[::3] = 0.0 if step % 2 else 1e-9  # tokens that were not seen, or hardly
        delta, momentum = reference.sinkhorn_momentum(weight.grad, momentum)
        expected = expected - 0.1 * delta
        optimizer.step()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(weight.detach().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinkhorn_momentum_leaves_unseen_tokens_alone_and_holds_one_buffer(dtype):
    weight = torch.nn.Parameter(dense(20, 8, dtype=dtype))
    before = weight.detach().clone()
    optimizer = optimizer_of([weight], "sinkhorn_momentum", lr=0.1)
    for step in range(3):
        weight.grad = dense(20, 8, dtype=dtype, seed=step + 1)
        weight.grad[5:15] = 0
        optimizer.step()
    changed = (weight.detach() != before).any(-1)
    assert changed.nonzero().flatten().tolist() == [*range(5), *range(15, 20)]
    assert {name: (t.numel(), t.dtype) for name, t in optimizer.state[weight].items()} == {
        "step": (1, torch.float32),
        "momentum_buffer": (weight.numel(), dtype),
    }


# ---- What a model costs


@pytest.mark.parametrize("name", ["swan", "sinkgd", "multinorm"])
def test_stateless_embeddings_leave_no_moments_anywhere(name, any_model):
    kind, model = any_model
    optimizer = create_optimizer(model, name, lr=1e-2, embeddings="stateless")
    before = copy.deepcopy(model.state_dict())
    model(**tiny_inputs(kind)).loss.backward()
    optimizer.step()
    assert {tuple(t.shape) for state in optimizer.state.values() for t in state.values()} == {(1,)}
    for key, p in model.named_parameters():
        moved = p.grad is not None and bool(p.grad.any())
        assert bool((p.detach() != before[key]).any()) == moved, key


@pytest.fixture(scope="module")
def llama_60m():
    """The 60M shape of the GaLore benchmark in bfloat16, with a gradient for each parameter."""
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32000, tie_word_embeddings=False))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.02)
        p.grad = p.detach()  # any values do
    return model


@pytest.mark.parametrize(
    ("embeddings", "gib"),
    [("adamw", 0.230), ("adamw_8bit", 0.170), ("sinkhorn_momentum", 0.169), ("stateless", 0.108)],
)
def test_weights_and_state_of_llama_60m(llama_60m, embeddings, gib):
    """25.30 million entries in matrices, 32.77 million in embedding and head: 2 bytes each, and the moments."""
    if embeddings == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    weights = sum(p.nbytes for p in llama_60m.parameters())
    assert weights == 2 * 58_073_600
    optimizer = create_optimizer(llama_60m, "sinkgd", lr=0.0, embeddings=embeddings)
    optimizer.step()
    assert len(optimizer.state) == len(list(llama_60m.parameters()))
    assert round((weights + state_bytes(optimizer)) / GIB, 3) == gib


def test_state_of_a_bf16_run_survives_a_file(make_model):
    """Moments of 8 bits, float32 maxima and steps come back in their own dtypes, for each part of a model."""
    pytest.importorskip("bitsandbytes")
    model = make_model("llama").to(torch.bfloat16)
    optimizer = create_optimizer(model, "sinkgd", lr=1e-2, embeddings="adamw_8bit")
    model(**tiny_inputs("llama")).loss.backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = create_optimizer(model, "sinkgd", lr=1e-2, embeddings="adamw_8bit")
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for p, state in optimizer.state.items():
        torch.testing.assert_close(dict(fresh.state[p]), dict(state), rtol=0, atol=0)
    assert {t.dtype for state in fresh.state.values() for t in state.values()} == {
        torch.float32,
        torch.bfloat16,
        torch.uint8,
    }

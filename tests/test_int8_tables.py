"""Embeddings and heads in 8 bits, tied and not, and attention that holds its weights itself."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from int8_folders import load_int8_folder
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3MoeConfig
from transformers.trainer_optimizer import OptimizerContext

import hf_stateless
from hf_stateless import Int8TrainingConfig, create_optimizer
from hf_stateless.trainer.handler import handle
from hf_stateless.weights.int8 import tables
from hf_stateless.weights.int8.holder import hold
from hf_stateless.weights.int8.weight import Int8Weight, Scale


SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
CONFIGS = {
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "apart": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "scaled": lambda: Gemma3TextConfig(**SIZES, tie_word_embeddings=True),  # an embedding with code of its own
    "experts": lambda: Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, tie_word_embeddings=False
    ),
}
INT8 = {"group_size": 8, "embeddings": True}
ROWS = torch.tensor([[3, 7, 1, 9, 30, 2, 5, 5, 8], [4, 4, 6, 1, 1, 2, 3, 9, 20]])


def plain(kind):
    torch.manual_seed(0)
    config = {"dtype": torch.bfloat16, "attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(CONFIGS[kind](), **config).train()


def quantized(kind):
    return hf_stateless.quantize(plain(kind), Int8TrainingConfig(**INT8))


def table_weights(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def loss_of(model):
    return model(input_ids=ROWS, labels=ROWS).loss


@pytest.mark.parametrize("kind", CONFIGS)
def test_forward_and_gradients_are_those_of_the_dequantised_model(kind, monkeypatch):
    monkeypatch.setattr(tables, "_BLOCK", 16 * 7)  # the head goes by blocks of seven tokens
    model, expected = quantized(kind), plain(kind)
    stored = {name: p for name, p in model.named_parameters() if isinstance(p, Int8Weight)}
    for name, p in expected.named_parameters():
        p.data = stored[name].dequantize() if name in stored else p.data
    embedding, head = table_weights(model)
    assert type(embedding) is type(head) is Int8Weight
    assert (embedding is head) == model.config.tie_word_embeddings
    losses = [loss_of(m) for m in (model, expected)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    grads = dict(expected.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad.float(), grads[name].grad.float(), rtol=0.05, atol=2e-3)
    assert not embedding.grad[0].any() or embedding is head  # padding


@pytest.mark.parametrize("embeddings", ["stateless", "factored", "row_moment", "column_moment"])
@pytest.mark.parametrize("kind", ["tied", "apart"])
def test_tables_are_trained(kind, embeddings):
    model = quantized(kind)
    optimizer = create_optimizer(model, "sinkgd", lr=0.02, embeddings=embeddings)
    before = [weight.codes.clone() for weight in table_weights(model)]
    losses = []
    for _ in range(6):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(not torch.equal(w.codes, old) for w, old in zip(table_weights(model), before, strict=True))
    if kind == "apart" and embeddings in ("factored", "row_moment"):
        unseen = [token for token in range(40) if token not in ROWS]
        assert torch.equal(table_weights(model)[0].codes[unseen], before[0][unseen])


@pytest.mark.parametrize("embeddings", ["factored", "row_moment", "column_moment"])
def test_a_step_is_that_of_the_float_table(embeddings):
    model, expected = quantized("apart"), plain("apart").float()
    weight = table_weights(model)[0]
    table_weights(expected)[0].data = weight.dequantize(torch.float32)
    grad = torch.randn(weight.shape).bfloat16()
    grad[5] = 0
    before = weight.codes[5].clone()
    for m in (model, expected):
        p = table_weights(m)[0]
        p.grad = grad.to(p.dtype)
        create_optimizer(
            m, "sinkgd", lr=0.01, weight_decay=0.1, embeddings=embeddings, stochastic_rounding=False
        ).step()
    in_codes = (
        (weight.dequantize(torch.float32) - table_weights(expected)[0].detach()).abs().view(*weight.scale.shape, -1)
    )
    assert float((in_codes / weight.scale.detach().float().unsqueeze(-1)).max()) < 0.52
    if embeddings != "column_moment":
        assert torch.equal(weight.codes[5], before)


@pytest.mark.parametrize("optim", ["sinkgd", "swan", "sinkgd_layerwise"])
def test_adamw_is_refused_with_what_to_type(optim):
    with pytest.raises(ValueError, match=r"embeddings=factored"):
        create_optimizer(quantized("apart"), optim, lr=1e-3)
    with pytest.raises(ValueError, match=r"heads=factored"):
        create_optimizer(quantized("apart"), optim, lr=1e-3, embeddings="factored", heads="adamw")


@pytest.mark.parametrize("kind", CONFIGS)
def test_folders_load_with_the_same_bytes(kind, tmp_path):
    plain(kind).save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", dtype=torch.bfloat16, quantization_config=Int8TrainingConfig(**INT8)
    )
    embedding, head = table_weights(model)
    assert type(embedding) is type(head) is Int8Weight
    assert (embedding is head) == model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "int8")
    again = load_int8_folder(tmp_path / "int8", dtype=torch.bfloat16)
    state, read = model.state_dict(), again.state_dict()
    assert state.keys() == read.keys()
    assert all(torch.equal(tensor, read[name]) and tensor.dtype == read[name].dtype for name, tensor in state.items())
    embedding, head = table_weights(again)
    assert (embedding is head) == model.config.tie_word_embeddings
    again.save_pretrained(tmp_path / "second")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("int8", "second")]
    assert files[0] == files[1]
    hf_stateless.export_model(tmp_path / "int8", tmp_path / "bf16", "bf16")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert torch.equal(table_weights(exported)[0], embedding.dequantize())
    assert (table_weights(exported)[0] is table_weights(exported)[1]) == model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["tied", "apart", "scaled"])
def test_copies_pickles_and_state_dicts(kind):
    model = quantized(kind)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), torch.load(file, weights_only=False), quantized(kind)]
    others[2].load_state_dict(model.state_dict())
    logits = model.eval()(ROWS).logits
    for other in others:
        assert torch.equal(other.eval()(ROWS).logits, logits)
        embedding, head = table_weights(other)
        assert (embedding is head) == model.config.tie_word_embeddings
        assert embedding is not table_weights(model)[0]
    assert type(model.to(torch.float32).get_output_embeddings().weight) is Int8Weight


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_counted(kind):
    model = quantized(kind)
    assert model.num_parameters() == plain(kind).num_parameters()
    stored = sum(t.nbytes for p in model.parameters() if isinstance(p, Int8Weight) for t in p.stored)
    rest = sum(p.nbytes for p in model.parameters() if not isinstance(p, Int8Weight | Scale))
    assert model.get_memory_footprint() == stored + rest + sum(buffer.nbytes for buffer in model.buffers())


def test_a_tied_head_that_stays_in_float_keeps_its_embedding_there():
    config = Int8TrainingConfig(**INT8, modules_to_not_convert=["lm_head"])
    kinds = {name: [type(w) for w in table_weights(hf_stateless.quantize(plain(name), config))] for name in CONFIGS}
    assert kinds["tied"] == kinds["scaled"] == [nn.Parameter, nn.Parameter]
    assert kinds["apart"] == kinds["experts"] == [Int8Weight, nn.Parameter]


def test_trl_is_refused_a_head_in_8_bits(tmp_path):
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(tmp_path, optim="sinkgd", optim_args="embeddings=factored", bf16=False, report_to=[])
    context = OptimizerContext(args, quantized("apart"), {"lr": 1e-3}, {"betas": (0.9, 0.999), "eps": 1e-8}, {})
    with pytest.raises(ValueError, match="TRL reads"):
        handle("sinkgd", context)


def attention(**sizes):
    torch.manual_seed(0)
    return nn.MultiheadAttention(16, 2, batch_first=True, **sizes).bfloat16()


@pytest.mark.parametrize("sizes", [{}, {"kdim": 8, "vdim": 8}, {"bias": False}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_attention_computes_with_what_it_holds(sizes, frozen):
    held = attention(**sizes)
    for name in [n for n, p in held.named_parameters(recurse=False) if p.ndim == 2]:
        hold(held, name, 8)
    hold(held.out_proj, "weight", 8)
    expected = attention(**sizes)
    weights = dict(held.named_parameters())
    for name, p in expected.named_parameters():
        stored = weights[name]
        p.data = stored.dequantize() if isinstance(stored, Int8Weight) else stored.data
        p.requires_grad_(not frozen or p.ndim == 1)
        stored.requires_grad_(p.requires_grad)
    results = []
    for module in (held, expected):
        torch.manual_seed(1)
        query = torch.randn(2, 5, 16).bfloat16().requires_grad_()
        key = torch.randn(2, 7, sizes.get("kdim", 16)).bfloat16().requires_grad_()
        out = module(query, key, key)[0]
        out.square().sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        results.append({"out": out, "query": query.grad, "key": key.grad, **grads})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not any(purse._values.untyped_storage().nbytes() for purse in held._purses.values())


def test_attention_is_trained_and_saved():
    model = nn.Sequential()
    model.attention, model.out = attention(), nn.Linear(16, 4).bfloat16()
    for module, name in ((model.attention, "in_proj_weight"), (model.attention.out_proj, "weight")):
        hold(module, name, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = create_optimizer(model, "swan", lr=0.01)
    x = torch.randn(2, 5, 16).bfloat16()
    model.out(model.attention(x, x, x)[0]).square().mean().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"attention.codes-of-in-proj-weight", "attention.out_proj.codes-of-weight"} <= moved
    model.load_state_dict(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", CONFIGS)
def test_cut_tables_are_refused_adamw_floats_and_modules_that_are_not_gathered(kind, mesh):
    model = fully_shard(quantized(kind), mesh=mesh)
    with pytest.raises(ValueError, match="stored in 8 bits, which AdamW cannot update"):
        create_optimizer(model, "swan", lr=1e-3)
    assert create_optimizer(model, "swan", lr=1e-3, embeddings="factored")
    with pytest.raises(ValueError, match="The weights are cut over ranks: save the model"):
        hf_stateless.dequantize(model)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        with pytest.raises(RuntimeError, match="has become a DTensor: call the module that"):
            table(torch.zeros(1, 16, dtype=torch.long))

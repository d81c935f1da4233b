"""Stacks of experts in 8 bits: computed, trained, saved and exported as the float ones are."""

import copy
import io
import json

import pytest
import torch
from expert_models import CONFIGS, expert_model
from int8_folders import load_int8_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_stateless
from hf_stateless import Int8TrainingConfig, create_optimizer
from hf_stateless.weights.int8.weight import Int8Weight, Scale


ROWS = torch.tensor([[3, 7, 1, 9, 30, 2, 5, 5, 8], [4, 4, 6, 1, 1, 2, 3, 9, 20]])
EAGER = {"experts_implementation": "eager", "dtype": torch.bfloat16}


def loss_of(model):
    return model(input_ids=ROWS, labels=ROWS).loss


def stacks_of(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, Int8Weight) and p.ndim == 3}


def quantized(kind, group_size=8):
    return hf_stateless.quantize(expert_model(kind), Int8TrainingConfig(group_size=group_size))


def in_float(model):
    """The plain model with the same values: what is kept in float32 too."""
    plain = expert_model_like(model)
    weights = {name: w.dequantize() for name, w in model.named_parameters() if isinstance(w, Int8Weight)}
    others = {name: p.data for name, p in model.named_parameters() if not isinstance(p, Int8Weight | Scale)}
    for name, p in plain.named_parameters():
        p.data = weights[name] if name in weights else others[name].clone()
    for buffer, value in zip(plain.buffers(), model.buffers(), strict=True):
        buffer.data = value.data.clone()
    return plain


def expert_model_like(model):
    kind = {"experts_implementation": "eager", "dtype": torch.bfloat16}
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    return AutoModelForCausalLM.from_config(config, **kind).train()


def gradients(model):
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def held_bytes(model):
    """Bytes of float stacks that are there."""
    purses = [purse for module in model.modules() for purse in getattr(module, "_purses", {}).values()]
    return sum(purse._values.untyped_storage().nbytes() for purse in purses if purse._values is not None)


@pytest.mark.parametrize("kind", CONFIGS)
def test_forward_and_gradients_are_those_of_the_dequantised_model(kind):
    model = quantized(kind)
    assert stacks_of(model)
    loss, grads = gradients(model)
    expected_loss, expected = gradients(in_float(model))
    assert loss == expected_loss
    assert grads.keys() == expected.keys()
    assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())
    assert held_bytes(model) == 0


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_every_implementation_of_experts(kind, implementation, reentrant):
    model = quantized(kind)
    model.set_experts_implementation(implementation)
    expected_loss, expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss, grads = gradients(model)
    assert loss == expected_loss
    assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())
    assert held_bytes(model) == 0


def test_two_forwards_before_one_backward_and_a_second_backward():
    model = quantized("mixtral")
    _, once = gradients(model)
    once = {name: grad.clone() for name, grad in once.items()}
    model.zero_grad()
    loss = loss_of(model) + loss_of(model)
    loss.backward(retain_graph=True)
    assert all(
        torch.allclose(p.grad, 2 * once[n], rtol=0.05, atol=1e-3) for n, p in model.named_parameters() if n in once
    )
    loss.backward()
    assert held_bytes(model) == 0


def test_an_update_between_forward_and_backward_is_an_error():
    model = quantized("mixtral")
    loss = loss_of(model)
    for weight in stacks_of(model).values():
        weight.codes.add_(1)
    with pytest.raises(RuntimeError, match="updated between forward and backward"):
        loss.backward()


def test_frozen_stacks_pass_gradients_on_and_give_their_memory_back():
    model = quantized("qwen3_moe")
    _, expected = gradients(model)
    for weight in stacks_of(model).values():
        weight.requires_grad_(False)
    _, grads = gradients(model)
    assert grads.keys() == expected.keys() - stacks_of(model).keys()
    assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())
    assert held_bytes(model) == 0
    with torch.no_grad():
        model.eval()(ROWS)
    assert held_bytes(model) == 0


@pytest.mark.parametrize("optim", ["sinkgd", "swan", "swan_layerwise", "sinkgd_layerwise"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "jetmoe"])
def test_every_expert_is_trained_once_and_routers_stay_float(kind, optim):
    model = quantized(kind)
    layerwise = optim.endswith("layerwise")
    optimizer = create_optimizer(model, optim, lr=0.02, **({"release": "all"} if layerwise else {}))
    before = {name: p.stored[0].clone() for name, p in stacks_of(model).items()}
    losses = []
    for _ in range(4):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(not torch.equal(p.stored[0], before[name]) for name, p in stacks_of(model).items())
    routers = [p for name, p in model.named_parameters() if "router" in name or name.endswith("mlp.gate.weight")]
    assert routers
    assert not any(isinstance(p, Int8Weight) for p in routers)


@pytest.mark.parametrize("optim", ["sinkgd", "swan"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
def test_the_update_is_that_of_each_expert_in_float(kind, optim):
    """Without noise a step of lr moves an 8-bit expert to the code nearest to where the float expert goes."""
    model = quantized(kind)
    plain = in_float(model).float()
    steps = [create_optimizer(m, optim, lr=0.01, stochastic_rounding=False) for m in (model, plain)]
    torch.manual_seed(1)
    stored = dict(model.named_parameters())
    for name, p in stacks_of(model).items():
        dict(plain.named_parameters())[name].data = p.dequantize(torch.float32)  # in bf16 they are rounded
    for name, p in plain.named_parameters():
        stored[name].grad = torch.randn(p.shape).to(torch.bfloat16).to(stored[name].dtype)
        p.grad = stored[name].grad.float()
    for step in steps:
        step.step()
    floats = dict(plain.named_parameters())
    for name, p in stacks_of(model).items():
        in_codes = (p.dequantize(torch.float32) - floats[name].detach()).abs().view(*p.scale.shape, -1)
        assert float((in_codes / p.scale.detach().float().unsqueeze(-1)).max()) < 0.55


def test_an_expert_without_a_token_keeps_every_byte():
    model = quantized("mixtral")
    optimizer = create_optimizer(model, "sinkgd", lr=0.02, weight_decay=0.1)
    gradients(model)
    weight = next(iter(stacks_of(model).values()))
    weight.grad[2] = 0
    before = weight.codes.clone()
    optimizer.step()
    assert torch.equal(weight.codes[2], before[2])
    assert not torch.equal(weight.codes[1], before[1])


@pytest.mark.parametrize("kind", CONFIGS)
def test_folders_load_with_the_same_bytes_and_export_under_the_names_of_the_float_folder(kind, tmp_path):
    plain = expert_model(kind)
    plain.save_pretrained(tmp_path / "float")
    config = Int8TrainingConfig(group_size=8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config, **EAGER)
    for name, weight in stacks_of(model).items():
        error = (weight.dequantize(torch.float32) - dict(plain.named_parameters())[name]).abs().amax()
        assert float(error) <= float(weight.scale.amax()) * 0.51
    model.save_pretrained(tmp_path / "int8")
    again = load_int8_folder(tmp_path / "int8", **EAGER)
    state, read = model.state_dict(), again.state_dict()
    assert state.keys() == read.keys()
    assert all(torch.equal(tensor, read[name]) and tensor.dtype == read[name].dtype for name, tensor in state.items())
    again.save_pretrained(tmp_path / "second")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("int8", "second")]
    assert files[0] == files[1]
    assert (
        json.loads((tmp_path / "int8/config.json").read_text())["quantization_config"]["quant_method"]
        != "compressed-tensors"
    )
    hf_stateless.export_model(tmp_path / "int8", tmp_path / "bf16", "bf16")
    exported = load_file(tmp_path / "bf16/model.safetensors")
    assert exported.keys() == load_file(tmp_path / "float/model.safetensors").keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", **EAGER)
    for name, weight in stacks_of(model).items():
        assert torch.equal(dict(loaded.named_parameters())[name], weight.dequantize())


@pytest.mark.parametrize("damage", ["missing", "scale", "shape", "shape of scales", "nan"])
def test_a_damaged_stack_is_refused(damage, tmp_path):
    quantized("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    codes = next(name for name in tensors if "codes-of-gate-up-proj" in name)
    scales = codes.replace("codes-of", "scales-of")
    if damage == "missing":
        del tensors[codes]
    elif damage == "scale":
        del tensors[scales]
    elif damage == "shape":
        tensors[codes] = tensors[codes][:, :, :1].contiguous()
    elif damage == "shape of scales":
        tensors[scales] = tensors[scales][:, :, :1].contiguous()
    else:
        tensors[scales] = tensors[scales] * float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"gate[-_]up[-_]proj|mismatched"):
        load_int8_folder(tmp_path, **EAGER)


def test_copies_pickles_and_state_dicts_keep_the_bytes():
    model = quantized("gpt_oss")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), torch.load(file, weights_only=False), quantized("gpt_oss")]
    others[2].load_state_dict(model.state_dict())
    logits = model.eval()(ROWS).logits
    for other in others:
        assert torch.equal(other.eval()(ROWS).logits, logits)
        assert type(other.model.layers[0].mlp.experts).__name__ == "GptOssExperts"
        assert all(
            a.codes is not b.codes for a, b in zip(stacks_of(model).values(), stacks_of(other).values(), strict=True)
        )


def test_casts_and_moves():
    model = quantized("mixtral").to(torch.float32)
    weight = next(iter(stacks_of(model).values()))
    assert (weight.dtype, weight.codes.dtype, weight.scale.dtype) == (torch.float32, torch.int8, torch.bfloat16)
    assert loss_of(model).isfinite()
    assert all(p.is_meta for p in copy.deepcopy(model).to("meta").parameters())


def test_what_is_counted():
    model = quantized("qwen3_moe")
    assert model.num_parameters() == expert_model("qwen3_moe").num_parameters()
    stored = sum(t.nbytes for p in model.parameters() if isinstance(p, Int8Weight) for t in p.stored)
    rest = sum(p.nbytes for p in model.parameters() if not isinstance(p, Int8Weight | Scale))
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert model.get_memory_footprint() == stored + rest + buffers


def test_modules_that_are_left_in_float():
    model = hf_stateless.quantize(expert_model("mixtral"), Int8TrainingConfig(modules_to_not_convert=["experts"]))
    assert not stacks_of(model)
    model = hf_stateless.quantize(expert_model("mixtral"), Int8TrainingConfig(modules_to_not_convert=["down_proj"]))
    assert {name.rpartition(".")[2] for name in stacks_of(model)} == {"gate_up_proj"}
    # Who does not know the format would read such a folder without an error, with random experts.
    with pytest.raises(ValueError, match="experts alone"):
        hf_stateless.quantize(expert_model("mixtral"), Int8TrainingConfig(modules_to_not_convert=[r".*self_attn"]))

"""Wrapped, sharded and adapted models have the roles of the model inside."""

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, assert_exhaustive_and_disjoint, build, role_of
from torch import nn
from transformers import Trainer

from hf_stateless.trainer.partition import partition_parameters


# PEFT 0.21 reads `is_gradient_checkpointing`, which transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


class ValueHead(nn.Module):
    """A model inside another module, as TRL's value head."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Linear(32, 1)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "compiled": torch.compile,
    "DDP": nn.parallel.DistributedDataParallel,
    "compiled and DDP": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),
    "DataParallel": nn.DataParallel,
    "value head": ValueHead,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "bert"])
def test_wrapped_model_has_the_roles_of_the_model(make_model, process_group, name, wrapper):
    model = make_model(name)
    expected = {id(e.parameter): e.role for e in partition_parameters(model)}
    wrapped = WRAPPERS[wrapper](model)
    entries = partition_parameters(wrapped)
    assert_exhaustive_and_disjoint(wrapped, entries)
    assert {id(e.parameter): e.role for e in entries if "v_head" not in e.name} == expected
    decayed = set(Trainer.get_decay_parameter_names(object.__new__(Trainer), wrapped))
    assert {e.name for e in entries if e.decay} == {e.name for e in entries} & decayed


def test_sharded_model_has_the_roles_and_layouts_of_the_model(process_group):
    name, sizes, expected = next(entry for entry in ARCHITECTURES if entry[0] == "Llama4ForCausalLM")
    model = build(name, sizes, device="cpu")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for module in (*(m for m in model.modules() if type(m).__name__ == "Llama4TextExperts"), model):
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    entries = partition_parameters(model)
    assert_exhaustive_and_disjoint(model, entries)
    assert {ending: role_of(entries, ending) for ending in expected} == expected


def test_fsdp1_is_refused(make_model, process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(make_model("llama"), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^FSDP1 flattens parameters.*fsdp_version: 2.*TrainingArguments\.$"):
        partition_parameters(model)


# Options of LoraConfig, and the roles of what is trainable by a part of its name.
LORA = {
    "plain": ("llama", {"target_modules": "all-linear"}, {"lora_": "adapter"}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}, {"lora_": "adapter"}),
    "dora": (
        "llama",
        {"target_modules": ["q_proj"], "use_dora": True},
        {"lora_A": "adapter", "lora_B": "adapter", "lora_magnitude_vector": "rest"},
    ),
    "modules_to_save": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"lora_": "adapter", "lm_head.modules_to_save": "head", "embed_tokens.modules_to_save": "embedding"},
    ),
    "embedding": (
        "llama",
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"q_proj.lora_": "adapter", "lora_embedding_": "embedding"},
    ),
    "token_indices": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        {"q_proj.lora_": "adapter", "trainable_tokens_delta": "embedding"},
    ),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}, {"lora_": "adapter"}),
    "tied_head": ("llama_tied", {"target_modules": ["q_proj", "lm_head"]}, {"lora_": "adapter"}),
    "conv1d_layout": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, {"lora_": "adapter"}),
    "classifier": (
        "vit",
        {"target_modules": ["fc1", "projection"], "modules_to_save": ["classifier"]},
        {"fc1.lora_": "adapter", "projection.lora_": "rest", "classifier.modules_to_save": "head"},
    ),
    "experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"lora_": "adapter"},
    ),
}


@pytest.mark.parametrize("case", LORA)
def test_adapters_are_matrices_of_their_own_and_the_base_is_left_out(make_model, case):
    peft = pytest.importorskip("peft")
    name, options, expected = LORA[case]
    model = peft.get_peft_model(make_model(name), peft.LoraConfig(r=4, **options))
    entries = partition_parameters(model)
    assert_exhaustive_and_disjoint(model, entries)
    for part, role in expected.items():
        assert {e.role for e in entries if part in e.name} == {role}, part
    assert all(any(part in e.name for part in expected) for e in entries)
    assert {e.name for e in entries if e.layout == "in_out"} == {e.name for e in entries if "embedding_A" in e.name}
    divided = {e.name: e.layout for e in entries if e.layout not in ("out_in", "in_out")}
    assert divided == {e.name: f"out_in{'*' if 'lora_A' in e.name else '/'}4" for e in entries if "experts" in e.name}


@pytest.mark.filterwarnings("ignore")
def test_int8_base_is_left_out_under_lora(make_model, tmp_path):
    peft = pytest.importorskip("peft")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    make_model("llama").save_pretrained(tmp_path)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )
    model = peft.get_peft_model(quantised, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert any(isinstance(m, bitsandbytes.nn.Linear8bitLt) for m in model.modules())
    entries = partition_parameters(model)
    assert_exhaustive_and_disjoint(model, entries)
    assert {e.role for e in entries} == {"adapter"}

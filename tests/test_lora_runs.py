"""`lora=product`: runs that resume to the bit, updates in backward, several processes."""

import peft
import pytest
import torch
from conftest import VOCAB_SIZE, dense, tiny_inputs
from lora_pairs import adapted, example, optimizer_of, pair_of
from rank_processes import joined, on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_stateless
from hf_stateless import create_lora_optimizer


# PEFT 0.21 reads a name that transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


# ---- Runs


@pytest.fixture(scope="module")
def rows():
    tokens = torch.randint(3, VOCAB_SIZE, (24, 10), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def trained(make_model, rows, folder, *, resume=None, stop=None, lora_options=None, **options):
    model = adapted(make_model, **{"target_modules": ["q_proj", "up_proj"], **(lora_options or {})})
    defaults = {"optim": "swan", "optim_args": "lora=product", "max_steps": 6, "learning_rate": 2e-2}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_steps": 3, "weight_decay": 0.1}
    args = TrainingArguments(
        output_dir=str(folder), warmup_steps=2, per_device_train_batch_size=2, **quiet, **{**defaults, **options}
    )
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[StopAt(stop)] if stop else None)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def factors_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora_options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_resumed_run_ends_with_the_same_bits_and_keeps_only_counters(lora_options, make_model, rows, tmp_path):
    whole = trained(make_model, rows, tmp_path / "whole", lora_options=lora_options)
    trained(make_model, rows, tmp_path / "half", stop=3, lora_options=lora_options)
    resumed = trained(make_model, rows, tmp_path / "half", resume=True, lora_options=lora_options)
    torch.testing.assert_close(factors_of(resumed.model), factors_of(whole.model), rtol=0, atol=0)
    optimizer = resumed.optimizer.optimizer
    pairs = [p for g in optimizer.param_groups if g["algorithm"] == "lora_product" for p in g["params"]]
    assert len(pairs) == 8
    # The first step of the warm-up has lr = 0 and does not count.
    assert all(list(optimizer.state[p]) == ["step"] and optimizer.state[p]["step"].item() == 5 for p in pairs)


def test_bf16_factors_resume_from_a_state_dict_to_the_bit(tmp_path):
    """PEFT loads adapters in float32, so a Trainer cannot resume in bf16; the optimizer can."""

    def steps(pair, optimizer, numbers):
        for number in numbers:
            for k, p in enumerate(pair):
                p.grad = dense(*p.shape, seed=10 * number + k, dtype=torch.bfloat16)
            optimizer.step()

    whole, half = (pair_of(*example(), torch.bfloat16) for _ in range(2))
    steps(whole, optimizer_of(*whole), range(6))
    stopped = optimizer_of(*half)
    steps(half, stopped, range(3))
    torch.save(stopped.state_dict(), tmp_path / "optimizer.pt")
    resumed = optimizer_of(*half)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(half, resumed, range(3, 6))
    torch.testing.assert_close(half, whole, rtol=0, atol=0)
    assert half[0].dtype == torch.bfloat16


def test_a_checkpoint_of_the_other_treatment_goes_on_with_a_warning(make_model, rows, tmp_path, caplog):
    for first, second in (("separate", "product"), ("product", "separate")):
        folder = tmp_path / first
        trained(make_model, rows, folder, stop=3, optim_args=f"lora={first}")
        caplog.clear()
        resumed = trained(make_model, rows, folder, resume=True, optim_args=f"lora={second}")
        assert resumed.state.global_step == 6
        assert "The checkpoint was written with algorithm=" in caplog.text
        algorithms = {g["algorithm"] for g in resumed.optimizer.optimizer.param_groups}
        assert algorithms == {"lora_product" if second == "product" else "multinorm"}


def batch(model, optimizer):
    loss = model(**tiny_inputs("llama")).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("release", ["matrices", "all"])
def test_layerwise_names_hold_the_gradients_of_a_pair_and_step_alike(release, make_model):
    runs = []
    for name, options in (("swan", {}), ("swan_layerwise", {"release": release})):
        model = adapted(make_model, target_modules="all-linear", modules_to_save=["lm_head"])
        optimizer = create_lora_optimizer(model, name, lr=1e-2, lora="product", **options)
        losses = [batch(model, optimizer) for _ in range(4)]
        assert losses[-1] < losses[0]
        runs.append(factors_of(model))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-7)


def test_every_trained_factor_moves_but_a_in_the_first_step(make_model):
    model = adapted(make_model, target_modules="all-linear", use_dora=True)
    optimizer = create_lora_optimizer(model, lr=1e-2, lora="product")
    before = factors_of(model)
    batch(model, optimizer)
    moved = {name for name, p in factors_of(model).items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_A" not in name}
    batch(model, optimizer)
    assert all(not torch.equal(p, before[name]) for name, p in factors_of(model).items())


# ---- Several processes


WORLD = 2


def sharded_steps(rank, folder):
    torch.set_num_threads(1)
    with joined(rank, folder, WORLD) as save:
        results = {}
        for placement in (Shard(0), Replicate()):
            mesh = init_device_mesh("cpu", (WORLD,))
            results[str(placement)] = stepped(lambda whole, p=placement, m=mesh: distribute_tensor(whole, m, [p]))
        save(results)


def stepped(place, steps=3):
    """Some steps of pairs of odd sizes, one of rank 1, that `place` distributes; returned whole."""
    pairs = []
    for seed, (m, n, r) in enumerate([(9, 14, 3), (9, 14, 3), (7, 5, 1)]):
        A, B, _, _ = example(m, n, r, b=0.0, seed=seed, dtype=torch.float32)
        pairs.append((nn.Parameter(place(A)), nn.Parameter(place(B))))
    optimizer = optimizer_of(*(p for pair in pairs for p in pair), weight_decay=0.1)
    for step in range(steps):
        for i, pair in enumerate(pairs):
            for k, p in enumerate(pair):
                p.grad = place(dense(*p.shape, seed=100 * step + 10 * i + k))
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for pair in pairs for p in pair]


def test_sharded_pairs_step_as_on_one_process():
    results = on_ranks(sharded_steps, WORLD)
    expected = stepped(lambda whole: whole)
    for of_rank in results:
        for placed in of_rank.values():
            torch.testing.assert_close([p.detach() for p in placed], expected, rtol=1e-5, atol=1e-6)


def test_the_option_is_public_where_the_documents_say():
    assert "create_lora_optimizer" in hf_stateless.__all__
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert create_lora_optimizer(model, "swan", lr=1e-2, lora="product").param_groups[0]["scaling"] == 4.0

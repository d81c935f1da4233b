"""Memory that is predicted from a config: states, weights, gradients, and what an estimate is made of."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY_MODELS
from expert_models import CONFIGS
from lora_pairs import adapted
from memory_models import DTYPES, LLAMA_7B, SMALL, meta_model, real_model, small_llama, state_bytes
from torch import nn
from transformers import LlamaConfig, Trainer, TrainingArguments

import hf_stateless
from hf_stateless.reports.files import GIB
from hf_stateless.reports.predicted import Settings, build_model, estimate, known_optimizers, optimizer_state_bytes
from hf_stateless.reports.predicted.estimate import step_temporary, update_temporaries
from hf_stateless.reports.predicted.model import tensor_bytes, weight_bytes_of_rank
from hf_stateless.reports.predicted.state import RULES
from hf_stateless.reports.predicted.table import fits
from hf_stateless.reports.predicted.trace import LiveBytes
from hf_stateless.trainer.factory import parameter_groups
from hf_stateless.trainer.optim_args import parse_options


def trainer_step(model, optim, tmp_path, **arguments):
    """The optimizer that the Trainer makes for a name, after one step."""
    args = TrainingArguments(output_dir=tmp_path, optim=optim, use_cpu=True, report_to=[], **arguments)
    optimizer = Trainer(model=model, args=args).create_optimizer()
    tokens = torch.randint(3, 90, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def bitsandbytes_of_its_own():
    """bitsandbytes remembers for good, by identity, which parameters the Trainer wanted at 32 bits."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()


STATE_CASES = [
    ("sinkgd", ""),
    ("swan", ""),
    ("multinorm", "norms=row_l2+sign"),
    ("sinkgd", "embeddings=stateless"),
    ("sinkgd", "embeddings=sinkhorn_momentum"),
    ("sinkgd", "embeddings=adamw_8bit"),
    ("sinkgd", "embeddings=row_moment,heads=column_moment"),
    ("swan_layerwise", "embeddings=factored"),
    ("sinkgd", "momentum=0.9"),
    ("swan", "momentum=0.9,momentum_dtype=bfloat16,embeddings=stateless"),
    ("sinkgd_layerwise", "momentum=0.9,momentum_dtype=float32"),
    ("adamw_torch", ""),
    ("adamw_torch_fused", ""),
    ("adamw_bnb_8bit", ""),
    ("adamw_8bit", ""),
    ("lion_32bit", ""),
    ("lion_8bit", ""),
    ("adafactor", ""),
    ("sgd", ""),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["llama", "llama_tied", "gpt2", "small_llama", "small_gpt2"])
@pytest.mark.parametrize(("optim", "options"), STATE_CASES)
def test_predicted_optimizer_state_is_equal_to_the_byte(optim, options, model, dtype, tmp_path, request):
    if "8bit" in optim + options or "lion" in optim:
        request.getfixturevalue("bitsandbytes_of_its_own")
    optimizer = trainer_step(real_model(model, dtype), optim, tmp_path, optim_args=options or None)
    given = dict(pair.split("=") for pair in options.split(",") if pair)
    predicted = optimizer_state_bytes(meta_model(model, Settings(dtype=dtype)), optim, given)
    assert predicted == state_bytes(optimizer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("model", "rank"), [("llama", 4), ("small_llama", 16), ("small_llama", 500)])
def test_predicted_state_of_galore_is_equal_to_the_byte(model, rank, dtype, tmp_path):
    pytest.importorskip("galore_torch")
    targets = {"optim_target_modules": ["self_attn", "mlp"], "optim_args": f"rank={rank}"}
    optimizer = trainer_step(real_model(model, dtype), "galore_adamw", tmp_path, **targets)
    predicted = optimizer_state_bytes(meta_model(model, Settings(dtype=dtype)), "galore_adamw", {"rank": str(rank)})
    assert predicted == state_bytes(optimizer)


def test_every_rule_of_another_optimizer_is_compared_with_the_real_one():
    assert set(RULES) == {name for name, _ in STATE_CASES if name in RULES} | {"galore_adamw"}


def test_a_predicted_state_does_not_depend_on_whether_the_model_has_weights():
    for name in known_optimizers():
        expected = optimizer_state_bytes(real_model("small_llama", "bf16"), name)
        assert optimizer_state_bytes(meta_model("small_llama", Settings()), name) == expected, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", [*TINY_MODELS, *SMALL])
def test_weights_and_gradients_are_counted_as_they_are(model, dtype):
    real = real_model(model, dtype)
    tensors = [*real.parameters(), *real.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    meta = meta_model(model, Settings(dtype=dtype))
    # A cast model casts the float32 tables of rotary embeddings too, one that is built in a dtype keeps them.
    cast = sum(b.nbytes for b in real.buffers()) - sum(b.nbytes for b in meta.buffers())
    assert weight_bytes_of_rank(meta) == sum(storages.values()) - cast
    assert tensor_bytes(meta.parameters()) == sum(p.nbytes for p in real.parameters())


def test_a_tied_weight_is_counted_once():
    tied, untied = (build_model(small_llama(tie_word_embeddings=tie), Settings()) for tie in (True, False))
    head = 301 * 72 * 2
    assert weight_bytes_of_rank(untied) - weight_bytes_of_rank(tied) == head
    rows = [estimate(model, ["adamw_torch"], Settings(seq=16))[0] for model in (tied, untied)]
    assert rows[1].gradients - rows[0].gradients == head
    assert rows[1].optimizer_state - rows[0].optimizer_state == 2 * head + 4


def test_what_is_estimated_is_neither_allocated_nor_left_behind():
    settings = Settings(seq=16)
    with LiveBytes() as live:
        model = build_model(LlamaConfig(**LLAMA_7B), settings)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert all(b.device.type == "meta" for b in model.buffers())
    del live
    attention = torch.nn.functional.scaled_dot_product_attention
    rows = estimate(model, ["sinkgd", "sinkgd_layerwise"], settings)
    assert rows == estimate(model, ["sinkgd", "sinkgd_layerwise"], settings)
    assert torch.nn.functional.scaled_dot_product_attention is attention
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    # The caches of rounding keys and 8-bit codes hold tensors; none without contents may stay in them.
    weights = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    weights.grad = torch.ones_like(weights)
    hf_stateless.StatelessOptimizer([{"params": [weights], "algorithm": "multinorm"}]).step()
    assert type(weights.data) is torch.Tensor
    assert weights.isfinite().all()


def test_layerwise_updates_hold_fewer_gradients_and_the_same_state():
    settings = Settings(seq=64, checkpointing=True)
    model = meta_model("small_llama", settings)
    plain, layerwise = estimate(model, ["sinkgd", "sinkgd_layerwise"], settings)
    assert layerwise.optimizer_state == plain.optimizer_state
    assert layerwise.gradients < plain.gradients
    embeddings = sum(p.nbytes for name, p in model.named_parameters() if "layers" not in name)
    assert layerwise.gradients >= embeddings
    everything = estimate(model, ["sinkgd_layerwise"], settings, {"release": "all"})[0]
    assert everything.gradients < layerwise.gradients


def test_checkpointing_trades_activations():
    plain, less = (Settings(seq=64, checkpointing=checkpointing) for checkpointing in (False, True))
    rows = [estimate(meta_model("small_llama", settings), ["sgd"], settings)[0] for settings in (plain, less)]
    assert rows[1].activations < rows[0].activations
    assert rows[1].weights == rows[0].weights


def test_sharding_divides_what_lasts_and_adds_what_is_gathered():
    one, eight = (Settings(seq=64, fsdp=ranks) for ranks in (1, 8))
    model = meta_model("small_llama", one)
    alone, sharded = (estimate(model, ["adamw_torch"], settings)[0] for settings in (one, eight))
    buffers = sum(b.nbytes for b in model.buffers())
    # Each tensor is cut along its rows, so a rank may have up to one row of each too many.
    slack = sum(p[0].nbytes for p in model.parameters())
    assert alone.gathered == 0
    assert 0 <= sharded.weights - buffers - (alone.weights - buffers) / 8 <= slack
    assert 0 <= sharded.gradients - alone.gradients / 8 <= slack
    assert sharded.gathered >= max(p.nbytes for p in model.parameters())


def test_sharded_weights_in_8_bits_are_gathered_in_8_bits():
    settings = [Settings(seq=64, fsdp=4, dtype=dtype) for dtype in ("bf16", "int8")]
    plain, int8 = (estimate(meta_model("small_llama", one), ["sinkgd"], one)[0] for one in settings)
    assert int8.gradients == plain.gradients
    assert int8.weights < plain.weights
    layer = meta_model("small_llama", settings[0]).model.layers[0]
    # Of two layers one byte less for each weight of a matrix, but for a scale in 128.
    saved = 2 * sum(p.numel() for p in layer.parameters() if p.ndim > 1)
    assert 0.95 * saved < plain.gathered - int8.gathered < saved


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_experts_in_8_bits_are_counted_as_fsdp2_cuts_and_sends_them(kind, ranks):
    """Stacks between experts, all else between rows; codes and scales are gathered twice, as they are stored."""
    settings = Settings(seq=8, fsdp=ranks, dtype="int8")
    model = build_model(CONFIGS[kind](), settings)
    row = estimate(model, ["sinkgd"], settings)[0]
    buffers = dict(model.named_buffers())
    stored = [t for name, t in model.state_dict().items() if name not in buffers]
    assert sum(t.dtype == torch.int8 and t.ndim == 4 for t in stored) == 4
    parts = [-(-len(t) // ranks) * t[0].nbytes for t in stored]
    assert row.weights == sum(parts) + sum(b.nbytes for b in buffers.values())
    trained = sum(p.numel() * 2 for p in model.parameters() if p.requires_grad)
    assert row.sent_by_fsdp == (2 * sum(t.nbytes for t in stored) + trained) * (ranks - 1) // ranks
    layer = sum(t.nbytes for t in model.model.layers[0].state_dict().values())
    gradients = 2 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert row.gathered >= 2 * layer + gradients
    # Those of the layer before are being reduced while the floats of the next one are there.
    checkpointed = replace(settings, checkpointing=True)
    assert estimate(model, ["sinkgd"], checkpointed)[0].gathered == row.gathered
    assert estimate(model, ["sinkgd_layerwise"], checkpointed)[0].gathered == row.gathered + gradients


def test_an_estimate_says_what_its_peak_is_made_of():
    settings = Settings(seq=64)
    for row in estimate(meta_model("small_llama", settings), list(known_optimizers()), settings):
        assert sum(row.at_peak.values()) == row.peak
        assert row.at_peak["gradients"] <= row.gradients
        assert row.moment in ("backward", "step")
        assert row.peak >= row.weights + row.optimizer_state


@pytest.mark.parametrize(("peak", "gib", "answer"), [(21, 24, False), (20, 24, True), (6, 8, True), (7, 8, False)])
def test_a_gpu_fits_with_a_tenth_and_one_gib_to_spare(peak, gib, answer):
    assert fits(peak * GIB, gib) is answer


def test_each_of_several_matrices_in_one_is_predicted_wherever_it_stands():
    """The layout of a weight is known by its position in a group, of which a prediction runs a part."""
    stacks, layers = [nn.MultiheadAttention(30, 2), nn.LSTM(30, 32)], [nn.Linear(30, 62), nn.Linear(62, 30)]
    found = []
    for modules in (stacks + layers, layers + stacks):
        groups = parameter_groups(nn.Sequential(*modules), parse_options("swan", {}), lr=1e-3, target_modules=".*")
        assert groups[0]["layouts"]
        found.append((update_temporaries(groups, "cpu"), step_temporary(groups, "cpu")))
    assert found[0] == found[1]
    assert all(size > 0 for size in found[0][0].values())


def test_pairs_of_lora_stay_together_in_a_prediction(make_model):
    model = adapted(make_model, target_modules=["q_proj", "k_proj"])
    groups = parameter_groups(model, parse_options("swan", {"lora": "product"}), lr=1e-3)
    assert len({p.shape for p in groups[0]["params"]}) % 2
    assert step_temporary(groups, "cpu") > 0


@pytest.mark.parametrize("embeddings", ["adamw", "adamw_8bit", "sinkhorn_momentum", "factored", "stateless"])
def test_a_prediction_leaves_nothing_behind_that_a_run_could_meet(embeddings):
    if embeddings == "adamw_8bit":
        pytest.importorskip("bitsandbytes")

    def trained():
        model = real_model("small_llama", "bf16")
        optimizer = hf_stateless.create_optimizer(model, "sinkgd", lr=1e-2, embeddings=embeddings)
        tokens = torch.arange(64).view(2, 32)
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    expected = trained()
    settings = Settings(dtype="bf16", batch=2, seq=32, device="cpu")
    estimate(meta_model("small_llama", settings), ["sinkgd"], settings, {"embeddings": embeddings})
    assert all(torch.equal(p, q) for p, q in zip(trained(), expected, strict=True))

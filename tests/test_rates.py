"""Claims about learning rates by kind of parameter: who gets which, under schedulers, at resume, and who is told."""

import io

import pytest
import torch
from conftest import relative_error, tiny_inputs
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

from hf_stateless import Int8TrainingConfig, create_optimizer, quantize
from hf_stateless.optimizer.options import embeddings
from hf_stateless.optimizer.rates import RATES, SCALES
from hf_stateless.optimizer.rules import complete_group, told_options
from hf_stateless.reports.card.sources import collect
from hf_stateless.trainer.optim_args import optimizer_names, parse_options
from hf_stateless.trainer.table import describe
from hf_stateless.update.rate import learning_rate, rate_scale


# PEFT 0.21 reads `is_gradient_checkpointing`, which transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

LR = 1e-3
GIVEN = {"embedding_lr_scale": 8.0, "head_lr_scale": 2.0, "rest_lr_scale": 4.0}


def scales_of(optimizer):
    return {group["role"]: rate_scale(group) for group in optimizer.param_groups}


def backward(model, name="llama"):
    model(**tiny_inputs(name)).loss.backward()


def moves(model, optimizer, *, name="llama", steps=1, each_step=lambda: None):
    """How far each parameter moves in some steps."""
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for _ in range(steps):
        backward(model, name)
        optimizer.step()
        optimizer.zero_grad()
        each_step()
    return {key: p.detach() - before[key] for key, p in model.named_parameters()}


def roles_of(optimizer):
    return {name: group["role"] for group in optimizer.param_groups for name in group["param_names"]}


# ---- Who gets which


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("llama", {}, (1, 1, 1)),
        ("llama", {"rates": "finetuning"}, (1, 1, 1)),
        ("llama", {"rates": "pretraining"}, (48, 4, 16)),
        ("llama", {"rates": "pretraining", "head_lr_scale": "2"}, (48, 2, 16)),
        ("llama", {"rates": "pretraining", "embedding_lr_scale": 1}, (1, 4, 16)),
        ("llama", GIVEN, (8, 2, 4)),
        ("qwen3_moe", {"rates": "pretraining"}, (48, 4, 16)),
        ("llama_tied", {"rates": "pretraining"}, (4, None, 16)),
        ("gpt2", {"rates": "pretraining"}, (4, None, 16)),
        ("t5", {"rates": "pretraining"}, (4, None, 16)),
        ("llama_tied", {"rates": "pretraining", "embedding_lr_scale": 8}, (8, None, 16)),
        ("gpt2", {"embedding_lr_scale": 8}, (8, None, 1)),
        ("bert", {"rates": "pretraining"}, (48, 4, 16)),
        ("vit", {"rest_lr_scale": 2}, (None, 1, 2)),
    ],
    ids=str,
)
def test_every_kind_has_the_scale_that_was_asked_for(kind, given, expected, make_model):
    optimizer = create_optimizer(make_model(kind), "sinkgd", lr=LR, **given)
    scales = scales_of(optimizer)
    assert scales.pop("matrix") == 1
    assert tuple(scales.get(role) for role in ("embedding", "head", "rest")) == expected
    assert {group["lr"] for group in optimizer.param_groups} == {LR}


@pytest.mark.parametrize("name", optimizer_names())
def test_the_measured_rates_are_one_row_and_off_until_they_are_named(name):
    row = RATES["pretraining"]
    options = parse_options(name, {"rates": "pretraining"})
    assert [getattr(options, scale) for scale in SCALES] == [row.embedding, row.head, row.rest]
    assert options.tied_lr_scale == row.tied
    assert [getattr(parse_options(name, {}), scale) for scale in SCALES] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "t5"])
def test_the_groups_are_those_of_a_run_without_rates(kind, make_model):
    """So that checkpoints of one go on as the other, whichever is tied."""
    plain, scaled = (create_optimizer(make_model(kind), "swan", lr=LR, **rates) for rates in ({}, GIVEN))
    for before, after in zip(plain.param_groups, scaled.param_groups, strict=True):
        assert before["param_names"] == after["param_names"]
        assert not before.keys() & set(SCALES)
        assert {key: after[key] for key in before if key != "params"} == {
            k: before[k] for k in before if k != "params"
        }


@pytest.mark.parametrize("rule", embeddings())
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
def test_a_step_is_so_many_times_as_long_whatever_rule_makes_it(rule, kind, make_model):
    if rule == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    found = []
    for given in ({}, GIVEN):
        model = make_model(kind)
        optimizer = create_optimizer(model, "sinkgd", lr=LR, embeddings=rule, **given)
        found.append(moves(model, optimizer, name=kind))
    roles = roles_of(optimizer)
    for name, move in found[0].items():
        factor = GIVEN.get(f"{roles[name]}_lr_scale", 1.0)
        assert relative_error(found[1][name], factor * move) < (2e-3 if factor != 1 else 1e-12), name


@pytest.mark.parametrize("given", [{}, {"adamw_lr": 5e-4}, {"adamw_lr": 5e-4, "embeddings": "stateless"}], ids=str)
def test_the_scales_multiply_the_rate_of_the_adamw_part(given, make_model):
    optimizer = create_optimizer(make_model("llama"), "swan", lr=LR, **given, **GIVEN)
    base = given.get("adamw_lr", LR) if "embeddings" not in given else LR
    rates = {group["role"]: learning_rate(group) for group in optimizer.param_groups}
    assert rates == pytest.approx({"matrix": LR, "embedding": 8 * base, "head": 2 * base, "rest": 4 * base})


def test_weight_decay_is_per_unit_of_the_rate_that_is_taken(make_model):
    for rule, factor in (("adamw", 1 - 8 * LR * 0.1), ("stateless", 1 - 8 * LR * 0.1)):
        ends = []
        for decay in (0.0, 0.1):
            model = make_model("llama")
            start = model.model.embed_tokens.weight.detach().clone()
            optimizer = create_optimizer(model, "sinkgd", lr=LR, weight_decay=decay, embeddings=rule, **GIVEN)
            moves(model, optimizer)
            ends.append(model.model.embed_tokens.weight.detach())
        assert torch.allclose(ends[1] - ends[0], (factor - 1) * start, atol=1e-7)


def test_a_scale_of_zero_leaves_a_kind_alone(make_model):
    for scale, role in zip(SCALES, ("embedding", "head", "rest"), strict=True):
        model = make_model("llama")
        optimizer = create_optimizer(model, "sinkgd", lr=LR, **{scale: 0})
        roles = roles_of(optimizer)
        still = {name for name, move in moves(model, optimizer, steps=2).items() if not move.any()}
        assert still == {name for name in roles if roles[name] == role}
        assert told_options(next(g for g in optimizer.param_groups if g["role"] == role))[scale] == 0


# ---- Schedulers


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, LR, total_steps=8, cycle_momentum=False),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, LR / 2, LR, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
        [2],
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_the_scales_live_under_every_scheduler(make, make_model):
    model = make_model("llama")
    optimizer = create_optimizer(model, "sinkgd", lr=LR, rates="pretraining")
    scheduler, seen = make(optimizer), []

    def look():
        scheduler.step()
        rates = {group["role"]: learning_rate(group) for group in optimizer.param_groups}
        seen.append([rates[role] / rates["matrix"] for role in ("embedding", "head", "rest")])

    moves(model, optimizer, steps=4, each_step=look)
    assert torch.allclose(torch.tensor(seen), torch.tensor([48.0, 4.0, 16.0]))


def test_a_learning_rate_that_is_a_tensor_is_scaled_too(make_model):
    found = []
    for as_tensor in (False, True):
        model = make_model("llama")
        optimizer = create_optimizer(model, "sinkgd", lr=LR, embeddings="stateless", **GIVEN)
        for group in optimizer.param_groups if as_tensor else ():
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        found.append(moves(model, optimizer))
    assert all(torch.allclose(found[1][name], move, atol=1e-9) for name, move in found[0].items())


@pytest.mark.parametrize("name", ["swan", "sinkgd", "multinorm"])
@pytest.mark.parametrize("release", ["matrices", "all"])
def test_layerwise_runs_take_the_same_steps(name, release, make_model):
    ends = []
    for optim, options in ((name, {}), (f"{name}_layerwise", {"release": release})):
        model = make_model("llama")
        optimizer = create_optimizer(model, optim, lr=LR, rates="pretraining", **options)
        ends.append(moves(model, optimizer, steps=3))
    assert all(torch.equal(ends[1][key], move) for key, move in ends[0].items())


# ---- Resume


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("options", [GIVEN, {"rates": "pretraining"}, {"embeddings": "stateless", **GIVEN}], ids=str)
def test_a_resumed_run_goes_on_to_the_bit_and_says_nothing(options, make_model, caplog):
    straight, resumed = make_model("llama"), make_model("llama")
    optimizer = create_optimizer(straight, "sinkgd", lr=LR, **options)
    moves(straight, optimizer, steps=2)
    again = create_optimizer(resumed, "sinkgd", lr=LR, **options)
    again.load_state_dict(through_file(optimizer.state_dict()))
    resumed.load_state_dict(straight.state_dict())
    pairs = zip(moves(straight, optimizer).values(), moves(resumed, again).values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert "The checkpoint was written" not in caplog.text


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"rates": "pretraining"}, ("embedding_lr_scale=1.0", "embedding_lr_scale=48.0")),
        ({"rates": "pretraining"}, {}, ("rest_lr_scale=16.0", "rest_lr_scale=1.0")),
        ({"head_lr_scale": 2}, {"head_lr_scale": 3}, ("head_lr_scale=2.0", "head_lr_scale=3.0")),
        ({"rest_lr_scale": 0}, {"embedding_lr_scale": 2}, ("rest_lr_scale=0.0", "rest_lr_scale=1.0")),
    ],
    ids=str,
)
def test_another_value_at_resume_is_applied_with_one_warning(before, after, told, make_model, caplog):
    saved = create_optimizer(make_model("llama"), "sinkgd", lr=LR, **before)
    resumed = create_optimizer(make_model("llama"), "sinkgd", lr=LR / 2, **after)
    expected = scales_of(resumed)
    resumed.load_state_dict(through_file(saved.state_dict()))
    assert scales_of(resumed) == expected
    assert {group["lr"] for group in resumed.param_groups} == {LR}  # the scheduler's
    (line,) = [record.getMessage() for record in caplog.records if "was written with" in record.getMessage()]
    assert all(part in line for part in told)


@pytest.mark.parametrize("given", [{}, GIVEN, {"rates": "pretraining"}], ids=str)
def test_a_checkpoint_from_before_there_were_scales_is_loaded(given, make_model):
    old = through_file(create_optimizer(make_model("gpt2"), "sinkgd", lr=LR).state_dict())
    assert not any(group.keys() & set(SCALES) for group in old["param_groups"])
    optimizer = create_optimizer(make_model("gpt2"), "sinkgd", lr=LR, **given)
    expected = scales_of(optimizer)
    optimizer.load_state_dict(old)
    assert scales_of(optimizer) == expected


# ---- What is told


@pytest.mark.parametrize(
    ("kind", "given", "line"),
    [
        ("llama", {"rates": "pretraining"}, "learning rates: embedding 48x, head 4x, rest 16x"),
        ("gpt2", {"rates": "pretraining"}, "learning rates: embedding 4x, rest 16x"),
        ("llama", {"head_lr_scale": 2.5}, "learning rates: head 2.5x"),
        ("llama", {}, ""),
        (
            "llama",
            {"rates": "pretraining", "embeddings": "stateless"},
            "learning rates: embedding 48x, head 4x, rest 16x",
        ),
    ],
    ids=str,
)
def test_the_table_and_the_card_tell_what_differs(kind, given, line, make_model):
    groups = create_optimizer(make_model(kind), "swan", lr=LR, **given).param_groups
    table = describe(groups, "swan").splitlines()
    assert [text for text in table if text.startswith("learning rates")] == ([line] if line else [])
    told = {key: value for group in groups for key, value in told_options(group).items() if key in SCALES}
    assert told == {f"{group['role']}_lr_scale": rate_scale(group) for group in groups if rate_scale(group) != 1}


def test_groups_that_are_made_by_hand_may_hold_the_scale_of_their_role():
    group = complete_group({"params": [], "algorithm": "adamw", "lr": 0.5, "rest_lr_scale": 4.0}, lr=0.1)
    assert learning_rate(group) == 2.0
    assert learning_rate({**group, "role": "head"}) == 0.5
    with pytest.raises(ValueError, match="no option 'lr_scales'"):
        complete_group({"params": [], "algorithm": "adamw", "lr_scales": 4.0}, lr=0.5)


# ---- Trainer, LoRA, 8 bits


@pytest.fixture
def run(tmp_path):
    def make(model, **options):
        given = {"optim": "sinkgd", "max_steps": 2, "save_strategy": "no", "report_to": [], "use_cpu": True, **options}
        args = TrainingArguments(str(tmp_path), learning_rate=LR, disable_tqdm=True, **given)
        row = {key: value[0] for key, value in tiny_inputs("llama").items()}
        return Trainer(model, args, train_dataset=[row] * 4)

    return make


def test_a_trainer_takes_them_and_another_value_when_it_resumes(run, make_model):
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    run(make_model("llama"), optim_args="rates=pretraining", **saving).train()
    trainer = run(make_model("llama"), optim_args="rates=pretraining,head_lr_scale=2", **{**saving, "max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    assert scales_of(trainer.optimizer) == {"matrix": 1, "embedding": 48, "head": 2, "rest": 16}
    assert trainer.state.global_step == 4
    told = collect(trainer, ModelCard("---\n---\n"), {}).hyperparameters
    assert [told[f"{scale} (adamw)"] for scale in SCALES] == [48, 2, 16]


def test_the_scales_reach_what_is_trained_beside_adapters(make_model):
    peft = pytest.importorskip("peft")
    for extra, role in (("lm_head", "head"), ("embed_tokens", "embedding"), ("norm", "rest")):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[extra])
        optimizer = create_optimizer(peft.get_peft_model(make_model("llama"), config), "sinkgd", lr=LR, **GIVEN)
        assert scales_of(optimizer) == {"adapter": 1, role: GIVEN[f"{role}_lr_scale"]}


@pytest.mark.parametrize("embeddings", ["adamw", "stateless"])
def test_pairs_of_an_adapted_embedding_take_the_rate_of_embeddings(embeddings, make_model):
    peft = pytest.importorskip("peft")
    found = []
    for given in ({}, {"embedding_lr_scale": 4.0}):
        config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
        model = peft.get_peft_model(make_model("llama"), config)
        options = {"lora": "product", "embeddings": embeddings, **given}
        found.append(moves(model, create_optimizer(model, "swan", lr=1e-6, **options)))
    moved = {name for name, move in found[0].items() if move.any()}
    assert any("lora_embedding" in name for name in moved)
    for name in moved:
        assert relative_error(found[1][name], (4 if "lora_embedding" in name else 1) * found[0][name]) < 1e-2


def test_a_model_with_8_bit_weights_takes_them_too(make_model):
    found = []
    for given in ({}, GIVEN):
        model = quantize(make_model("llama"), Int8TrainingConfig(None))
        found.append(moves(model, create_optimizer(model, "sinkgd", lr=LR, **given)))
    for name, factor in (("model.embed_tokens.weight", 8), ("lm_head.weight", 2), ("model.norm.weight", 4)):
        assert relative_error(found[1][name], factor * found[0][name]) < 2e-3

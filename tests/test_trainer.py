"""`optim=` in the Trainer and in TRL: what reaches the groups, and runs that resume to the bit."""

import contextlib
import copy

import pytest
import torch
from conftest import VOCAB_SIZE
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_stateless import PRESETS, MultiNormFactory, SinkGDFactory, StatelessOptimizer, SwanFactory
from hf_stateless.trainer.partition import ROLES


each_name = pytest.mark.parametrize("name", PRESETS)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCAB_SIZE, (32, 12), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


@pytest.fixture
def arguments(tmp_path):
    def make(**options):
        defaults = {
            "output_dir": str(tmp_path),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return TrainingArguments(**{**defaults, **options})

    return make


class Recorder(TrainerCallback):
    """Keeps the learning rate of group 0 before each step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def trained(model, args, rows, resume=None, **options):
    trainer = Trainer(model, args, train_dataset=rows, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def groups_of(model, args, **options):
    """The groups of a Trainer's optimizer, by role."""
    optimizer = Trainer(model, args, **options).create_optimizer()
    assert isinstance(optimizer, StatelessOptimizer)
    order = [ROLES.index(g["role"]) for g in optimizer.param_groups]
    assert order == sorted(order)
    return {g["role"]: g for g in optimizer.param_groups}


def weights_of(model):
    return copy.deepcopy(model.state_dict())


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---- Runs


CASES = [(name, dtype, None) for name in PRESETS for dtype in (torch.float32, torch.bfloat16)]
CASES += [(name, torch.bfloat16, "momentum=0.9,width_rule=spectral") for name in ("swan", "sinkgd")]


@pytest.mark.parametrize(("name", "dtype", "optim_args"), CASES, ids=str)
def test_a_run_resumed_at_half_way_ends_with_the_same_weights(
    name, dtype, optim_args, make_model, arguments, rows, tmp_path
):
    options = {
        "optim": name,
        "optim_args": optim_args,
        "max_steps": 8,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
    }
    whole = trained(make_model("llama").to(dtype), arguments(**options), rows).model
    half = arguments(**{**options, "output_dir": str(tmp_path / "half")})
    # Stopped by a callback, so that the schedule is that of the whole run.
    trained(make_model("llama").to(dtype), half, rows, callbacks=[StopAt(4)])
    resumed = trained(make_model("llama").to(dtype), half, rows, resume=True)
    assert resumed.state.global_step == 8
    assert {p.dtype for p in resumed.model.parameters()} == {dtype}
    assert_equal(weights_of(resumed.model), weights_of(whole))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@each_name
def test_the_logged_learning_rate_is_that_of_the_matrices(name, make_model, arguments, rows):
    recorder = Recorder()
    options = {"lr_scheduler_type": "linear", "max_steps": 4, "optim_args": "adamw_lr=0.5"}
    trainer = trained(make_model("llama"), arguments(optim=name, **options), rows, callbacks=[recorder])
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx(recorder.rates, rel=1e-9)
    assert recorder.rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3], rel=1e-9)


@each_name
def test_a_model_with_a_tied_head_is_trained(name, make_model, arguments, rows):
    model = make_model("llama_tied")
    before = weights_of(model)
    trained(model, arguments(optim=name), rows)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all((value != before[key]).any() for key, value in model.state_dict().items())


def test_a_run_learns_what_it_is_shown(make_model, arguments, rows):
    trainer = trained(make_model("llama"), arguments(optim="sinkgd", max_steps=40), rows[:4])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


def test_clipping_scales_the_adamw_part_only(make_model, arguments, rows):
    """Every norm projection is invariant to scaling; AdamW is so only up to its epsilon."""
    runs = {}
    for max_grad_norm in (0.0, 1e-3):
        options = {"max_grad_norm": max_grad_norm, "max_steps": 1, "optim_args": "adamw_eps=1e-2"}
        trainer = trained(make_model("llama"), arguments(optim="sinkgd", **options), rows)
        groups = {g["role"]: g for g in trainer.optimizer.param_groups}
        runs[max_grad_norm] = {role: [p.detach().clone() for p in g["params"]] for role, g in groups.items()}
    # The clipped gradients are rounded once more, which is 1e-6 of a step.
    torch.testing.assert_close(runs[1e-3]["matrix"], runs[0.0]["matrix"], rtol=1e-6, atol=1e-2 * 0.2 * 1e-5)
    assert (runs[1e-3]["head"][0] - runs[0.0]["head"][0]).abs().max() > 1e-4


def test_the_best_checkpoint_is_loaded_at_the_end(make_model, arguments, rows, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 2}
    # A learning rate at which the loss only rises.
    args = arguments(optim="swan", learning_rate=1.0, lr_scheduler_type="constant", **options, **best)
    trainer = Trainer(make_model("llama"), args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best_step = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best_step}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best_step], rel=1e-6)


# ---- What reaches the groups


@pytest.mark.parametrize(
    ("options", "role", "expected"),
    [
        ({"learning_rate": 3e-3}, "matrix", {"lr": 3e-3, "algorithm": "multinorm"}),
        ({"learning_rate": 3e-3}, "rest", {"lr": 3e-3, "algorithm": "adamw"}),
        ({"optim_args": "lr_scale=0.7,num_iterations=3"}, "matrix", {"lr_scale": 0.7, "num_iterations": 3}),
        ({"optim_args": "adamw_lr=0.002"}, "embedding", {"lr": 2e-3}),
        ({"optim_args": "stochastic_rounding=false,seed=9"}, "head", {"stochastic_rounding": False, "seed": 9}),
        ({"optim_args": "embeddings=stateless"}, "embedding", {"algorithm": "multinorm"}),
        ({"optim_args": "embeddings=adamw_8bit"}, "head", {"algorithm": "adamw_8bit"}),
        ({"adam_beta1": 0.8, "adam_beta2": 0.95}, "head", {"betas": (0.8, 0.95)}),
        ({"adam_epsilon": 1e-6}, "rest", {"eps": 1e-6}),
        ({"adam_beta1": 0.8, "optim_args": "adamw_beta1=0.7"}, "head", {"betas": (0.7, 0.999)}),
        ({"weight_decay": 0.1}, "matrix", {"weight_decay": 0.1}),
        ({"weight_decay": 0.1}, "embedding", {"weight_decay": 0.1}),
        ({"weight_decay": 0.1}, "rest", {"weight_decay": 0.0}),
        ({"optim_target_modules": ["q_proj", "v_proj"]}, "matrix", {"param_names": ["q_proj", "v_proj"]}),
        ({"optim_target_modules": r".*layers\.0.*o_proj"}, "matrix", {"param_names": ["o_proj"]}),
    ],
    ids=str,
)
def test_training_arguments_reach_the_groups(options, role, expected, make_model, arguments):
    group = groups_of(make_model("llama"), arguments(optim="sinkgd", **options))[role]
    names = sorted({name.split(".")[-2] for name in group["param_names"]})
    actual = {key: names if key == "param_names" else group[key] for key in expected}
    assert actual == expected


@pytest.mark.parametrize(
    ("name", "optim_args", "expected"),
    [
        ("swan", None, {"norms": ("row_standardize", "spectral"), "num_iterations": 1, "whitening": "polar_express"}),
        ("swan", "center=false,whitening=eigh", {"norms": ("row_l2", "spectral"), "whitening": "eigh"}),
        ("swan", "whitening=newton_schulz,ns_steps=7,ns_beta=0.5", {"ns_steps": 7, "ns_beta": 0.5}),
        ("sinkgd", None, {"norms": ("row_l2", "col_l2"), "num_iterations": 5}),
        ("multinorm", "norms=sign", {"norms": ("sign",)}),
        (
            "multinorm",
            "norms=row_l2+spectral,num_iterations=3",
            {"norms": ("row_l2", "spectral"), "num_iterations": 3},
        ),
    ],
    ids=str,
)
def test_each_name_gives_its_chain(name, optim_args, expected, make_model, arguments):
    group = groups_of(make_model("llama"), arguments(optim=name, optim_args=optim_args))["matrix"]
    assert {key: group[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim_args": "lr_scal=0.1"}, "Unknown key 'lr_scal' .*Did you mean 'lr_scale'"),
        ({"optim_args": "num_iterations=five"}, "num_iterations='five' is not an integer"),
        ({"optim_args": "ns_steps=5"}, "ns_steps belongs to a whitening such as 'spectral'"),
        ({"optim_target_modules": ["no_such_layer"]}, "matched no trainable matrix.*q_proj"),
    ],
    ids=["unknown key", "wrong type", "key of another chain", "no matching module"],
)
def test_bad_arguments_are_refused_before_training(options, message, make_model, arguments, rows):
    with pytest.raises(ValueError, match=message):
        trained(make_model("llama"), arguments(optim="sinkgd", **options), rows)


@pytest.mark.parametrize(
    ("factory", "name"), [(SwanFactory, "swan"), (SinkGDFactory, "sinkgd"), (MultiNormFactory, "multinorm")]
)
def test_a_factory_gives_the_run_that_the_name_gives(factory, name, make_model, arguments, rows):
    by_name = trained(make_model("llama"), arguments(optim=name), rows).model
    by_factory = trained(
        make_model("llama"), arguments(), rows, optimizer_cls_and_kwargs=(factory, {"lr": 1e-2})
    ).model
    assert_equal(weights_of(by_factory), weights_of(by_name))


def test_the_bare_class_is_refused_because_its_groups_say_no_algorithm(make_model, arguments, rows):
    with pytest.raises(ValueError, match="needs algorithm="):
        trained(make_model("llama"), arguments(), rows, optimizer_cls_and_kwargs=(StatelessOptimizer, {"lr": 1e-2}))


def test_the_state_of_adamw_is_refused_at_resume(make_model, arguments, rows):
    saving = {"save_strategy": "steps", "save_steps": 2}
    trained(make_model("llama"), arguments(optim="adamw_torch", **saving), rows)
    with pytest.raises(ValueError, match=r"another optimizer than hf_stateless.*schedule starts over"):
        trained(make_model("llama"), arguments(optim="sinkgd", max_steps=4, **saving), rows, resume=True)


def test_the_schedule_starts_over_without_optimizer_pt_as_refusals_say(make_model, arguments, rows, tmp_path):
    args = arguments(optim="sinkgd", max_steps=4, save_strategy="steps", save_steps=2, warmup_steps=1)
    trained(make_model("llama"), args, rows)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    resumed = trained(make_model("llama"), args, rows, resume=str(tmp_path / "checkpoint-2"))
    rates = [entry["learning_rate"] for entry in resumed.state.log_history if "learning_rate" in entry]
    assert rates[2:] == rates[:2]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_options_changed_at_resume_are_applied(kind, make_model, arguments, rows):
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "sinkgd"}
    trained(make_model(kind), arguments(**saving), rows)
    changed = arguments(max_steps=4, weight_decay=0.1, optim_args="num_iterations=3,adamw_beta1=0.8", **saving)
    trainer = trained(make_model(kind), changed, rows, resume=True)
    groups = {g["role"]: g for g in trainer.optimizer.param_groups}
    assert (groups["matrix"]["num_iterations"], groups["matrix"]["weight_decay"]) == (3, 0.1)
    assert groups["head"]["betas"] == (0.8, 0.999)


# ---- TRL


@each_name
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # TRL's own default
def test_trl_trains_with_the_name(name, make_model, rows, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w2"
    )
    config = trl.SFTConfig(
        output_dir=str(tmp_path),
        optim=name,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
    )
    model = make_model("llama")
    before = weights_of(model)
    dataset = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows])
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    with contextlib.redirect_stdout(None):
        trainer.train()
    assert trainer.optimizer.optimizer.param_groups[0]["norms"] == PRESETS[name].norms
    assert all((value != before[key]).any() for key, value in model.state_dict().items())

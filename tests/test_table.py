"""The table of who went where: printed once by a Trainer, logged without one, and whole by `hf-stateless explain`."""

import logging
import re

import pytest
import torch
from conftest import TINY_MODELS, tiny_inputs
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_stateless import SinkGDFactory, create_optimizer
from hf_stateless.run.command import main
from hf_stateless.trainer.factory import parameter_groups
from hf_stateless.trainer.optim_args import parse_options
from hf_stateless.trainer.partition import ROLES
from hf_stateless.trainer.table import alike, describe, explain


# PEFT 0.21 reads `is_gradient_checkpointing`, which transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def groups_of(model, optim="sinkgd", **options):
    return parameter_groups(model, parse_options(optim, options), lr=1e-3)


def with_lora(model, **options):
    peft = pytest.importorskip("peft")
    config = {"r": 4, "target_modules": "all-linear", "modules_to_save": ["lm_head"], **options}
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def counted(table):
    """Tensors and parameters of all lines of the short table."""
    lines = [re.split(r" {2,}", line) for line in table.splitlines()[2:] if not line.startswith("frozen")]
    assert {line[1] for line in lines} <= set(ROLES)
    return sum(int(line[2]) for line in lines), sum(int(line[3].replace(",", "")) for line in lines)


def test_the_short_table_counts_every_parameter_once(any_model):
    _, model = any_model
    table = describe(groups_of(model), "sinkgd", model)
    assert counted(table) == (len(list(model.parameters())), sum(p.numel() for p in model.parameters()))
    assert len(table.splitlines()) <= 10
    shares = [float(share) for share in re.findall(r"([\d.]+) %", table)]
    assert sum(shares) == pytest.approx(100, abs=0.3)


@pytest.mark.parametrize("embeddings", ["adamw", "sinkhorn_momentum", "stateless"])
@pytest.mark.parametrize("lora", ["separate", "product"])
def test_the_short_table_stays_short_for_adapters_with_many_groups(lora, embeddings, make_model):
    ranks = {f"layers.{i}.*{name}": 2 + i for i in range(2) for name in ("q_proj", "v_proj")}
    model = with_lora(make_model("llama"), rank_pattern=ranks, target_modules=["q_proj", "v_proj", "embed_tokens"])
    groups = groups_of(model, "swan", lora=lora, embeddings=embeddings)
    table = describe(groups, "swan", model)
    assert len(table.splitlines()) <= 10
    assert max(map(len, table.splitlines())) < 160
    assert table.splitlines()[-1] == f"frozen: {sum(not p.requires_grad for p in model.parameters())} tensors"
    assert counted(table)[0] == sum(p.requires_grad for p in model.parameters())
    assert ("swan (B A)" in table) == (lora == "product")


def test_a_line_names_the_two_largest(make_model):
    table = describe(groups_of(make_model("llama")), "sinkgd")
    line = next(line for line in table.splitlines() if " matrix " in line)
    assert line.endswith("70.9 %  model.layers.*.mlp.gate_proj.weight, model.layers.*.mlp.up_proj.weight")


@pytest.mark.parametrize("numbers", [[0], [1], [0, 1, 2, 5, 7, 8]], ids=str)
def test_layers_that_differ_are_told_by_their_numbers(numbers):
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(9))})
    pattern = f"layers.({'|'.join(map(str, numbers))})"
    groups = parameter_groups(model, parse_options("sinkgd", {}), lr=1e-3, target_modules=pattern)
    matrix, rest = explain(groups, "sinkgd").splitlines()[1:]
    expected = {1: f"layers.{numbers[0]}.weight", 6: "layers.{0-2,5,7-8}.weight x 6"}[len(numbers)]
    assert matrix.split("  ")[-1].strip() == expected
    assert rest.endswith(f" x {9 - len(numbers)}")
    assert {row.role: len(row.names) for row in alike(groups, "sinkgd")} == {
        "matrix": len(numbers),
        "rest": 9 - len(numbers),
    }


HEAD = "updates (all names: hf-stateless explain MODEL"


@pytest.fixture
def run(tmp_path, make_model):
    """A Trainer with its optimizer."""

    def make(**options):
        factory = options.pop("factory", None)
        row = {key: value[0] for key, value in tiny_inputs("llama").items()}
        given = {"optim": "sinkgd", "max_steps": 2, "save_strategy": "no", "report_to": [], "use_cpu": True, **options}
        kwargs = {"optimizer_cls_and_kwargs": (factory, {"lr": 1e-3})} if factory else {}
        args = TrainingArguments(str(tmp_path), **given)
        trainer = Trainer(make_model("llama"), args, train_dataset=[row] * 4, **kwargs)
        trainer.create_optimizer()
        return trainer

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    yield make
    transformers_logging.set_verbosity(level)


@pytest.fixture
def quiet_root(monkeypatch):
    """Loggers as an ordinary script leaves them."""
    monkeypatch.setattr(logging.getLogger("hf_stateless"), "level", logging.NOTSET)
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    for name in ("hf_stateless", "hf_stateless.trainer.table"):
        logging.getLogger(name)._cache.clear()


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, 1),
        ({"disable_tqdm": True}, 1),
        ({"optim": "swan_layerwise"}, 1),
        ({"log_level": "info"}, 1),
        ({"factory": SinkGDFactory, "optim": "adamw_torch"}, 1),
        ({"optim": "adamw_torch"}, 0),
        ({"log_level": "warning"}, 0),
        ({"log_level": "error"}, 0),
        ({"log_level": "critical", "factory": SinkGDFactory}, 0),
    ],
    ids=str,
)
def test_a_trainer_prints_it_once_unless_it_was_asked_to_be_quiet(options, times, run, quiet_root, capsys):
    run(**options)
    assert capsys.readouterr().out.count(HEAD) == times


def test_training_twice_and_with_smaller_batches_prints_it_once(run, quiet_root, monkeypatch, capsys):
    step = Trainer.training_step

    def too_large(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 1:
            raise RuntimeError("CUDA out of memory.")
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", too_large)
    trainer = run(auto_find_batch_size=True, per_device_train_batch_size=2)
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2
    assert capsys.readouterr().out.count(HEAD) == 1


def test_where_the_log_is_seen_it_is_logged_and_not_printed(run, capsys, caplog):
    with caplog.at_level("INFO", logger="hf_stateless"):
        run()
    assert caplog.text.count(HEAD) == 1
    assert HEAD not in capsys.readouterr().out


def test_without_a_trainer_it_is_logged_and_never_printed(make_model, quiet_root, capsys, caplog):
    create_optimizer(make_model("llama"), "sinkgd", lr=1e-3)
    assert HEAD not in capsys.readouterr().out + caplog.text
    with caplog.at_level("INFO", logger="hf_stateless"):
        create_optimizer(make_model("llama"), "sinkgd", lr=1e-3)
    assert caplog.text.count(HEAD) == 1
    assert HEAD not in capsys.readouterr().out


@pytest.mark.parametrize("level", ["WARNING", "INFO"])
def test_other_processes_say_nothing(level, run, monkeypatch, capsys, caplog):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    from hf_stateless.trainer.table import announce

    with caplog.at_level(level, logger="hf_stateless"):
        announce("a table", printed=True)
    assert "a table" not in capsys.readouterr().out + caplog.text


@pytest.fixture
def folder(tmp_path, make_model):
    """`folder("llama")`: a folder with the config of that tiny model alone."""

    def make(name):
        config = make_model(name).config
        config.architectures = [type(TINY_MODELS[name]()).__name__]
        config.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "t5", "bert", "vit"])
def test_explain_prints_every_parameter_of_a_config(name, folder, make_model, capsys):
    source = folder(name)
    assert main(["explain", str(source)]) == 0
    out = capsys.readouterr().out
    assert main(["explain", str(source / "config.json")]) == 0
    assert capsys.readouterr().out.replace("/config.json", "") == out
    rows = out.split("\n\n")[1].splitlines()[1:]
    expanded = sum(int(match.group(1)) if (match := re.search(r" x (\d+)$", row)) else 1 for row in rows)
    assert expanded == len(list(make_model(name).parameters()))
    assert HEAD in out


def test_explain_takes_the_options_of_a_run(folder, capsys):
    source = str(folder("llama"))
    assert main(["explain", source, "--optim", "swan_layerwise", "--optim-args", "embeddings=stateless"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^rest +frobenius +vector +32 +64 +model\.layers\.\*\.input_layernorm\.weight x 2$", out, re.M)
    assert re.search(r"^embedding +swan +out_in +96 x 32 +3,072 +model\.embed_tokens\.weight$", out, re.M)
    assert main(["explain", source, "--target-modules", ".*(q_proj|v_proj)"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^matrix .*[qv]_proj\.weight x 2$", out, re.M)) == 2
    assert re.search(r"^rest +adamw .*k_proj\.weight x 2$", out, re.M)
    pytest.importorskip("peft")
    assert main(["explain", source, "--lora", "4", "--optim-args", "lora=product"]) == 0
    assert re.search(r"^adapter +sinkgd \(B A\) .*lora_A\.default\.weight x 2$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder/at/all"], "expected a folder with a config.json"),
        ([], "the following arguments are required: MODEL"),
        (["CONFIG", "--optim", "adam"], "Unknown optimizer 'adam'"),
        (["CONFIG", "--optim-args", "lr_scale"], "expected key=value,key=value"),
        (["CONFIG", "--optim-args", "release=all"], "take optim='sinkgd_layerwise'"),
        (["CONFIG", "--target-modules", "q_proj"], "--target-modules '.*q_proj'"),
        (["CONFIG", "--lora", "0"], "expected a rank of at least 1"),
    ],
    ids=str,
)
def test_explain_refuses_in_one_line(arguments, message, folder, capsys):
    source = folder("llama")
    assert main(["explain", *(str(source) if a == "CONFIG" else a for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hf-stateless explain: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("optim", "options", "told"),
    [
        ("swan", {}, "whitening: polar_express, 5 steps"),
        ("swan_layerwise", {"whitening": "newton_schulz"}, "whitening: newton_schulz, 10 steps"),
        ("sinkgd_polar", {}, "whitening: polar_express, one step"),
        ("multinorm", {"whitening": "eigh"}, "whitening: eigh"),
        ("multinorm", {"norms": "sign"}, None),
        ("sinkgd", {}, None),
    ],
)
def test_the_table_says_how_matrices_are_whitened(optim, options, told, make_model, caplog):
    with caplog.at_level("INFO", logger="hf_stateless"):
        create_optimizer(make_model("llama"), optim, lr=1e-3, **options)
    lines = [line for line in caplog.text.splitlines() if line.startswith("whitening:")]
    assert lines == ([told] if told else [])

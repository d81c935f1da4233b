"""Memory that is predicted from a config equals what training the model then takes."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY_MODELS, tiny_inputs
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Trainer, TrainingArguments

import hf_stateless
from hf_stateless.reports.files import GIB
from hf_stateless.reports.predicted import (
    Settings,
    build_model,
    estimate,
    known_optimizers,
    main,
    optimizer_state_bytes,
)
from hf_stateless.reports.predicted.model import tensor_bytes, weight_bytes_of_rank
from hf_stateless.reports.predicted.state import RULES
from hf_stateless.reports.predicted.table import GPUS, SCHEMA_VERSION, Estimate, as_json, as_table, fits
from hf_stateless.reports.predicted.trace import LiveBytes


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def small_llama(**sizes):
    """Matrices on both sides of bitsandbytes' limit of 4096 entries, of sizes that are no multiples of its blocks."""
    defaults = {"hidden_size": 72, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 6}
    return LlamaConfig(
        **{**defaults, "num_key_value_heads": 2, "vocab_size": 301, **sizes}, architectures=["LlamaForCausalLM"]
    )


def small_gpt2():
    return GPT2Config(
        n_embd=72, n_layer=3, n_head=6, n_positions=96, vocab_size=301, bos_token_id=1, eos_token_id=2,
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip


SMALL = {"small_llama": small_llama, "small_gpt2": small_gpt2}


def real_model(name, dtype="fp32"):
    """A model with weights, tiny or small."""
    torch.manual_seed(0)
    if name in TINY_MODELS:
        return TINY_MODELS[name]().to(DTYPES[dtype])
    return AutoModelForCausalLM.from_config(SMALL[name](), dtype=DTYPES[dtype])


def meta_model(name, settings):
    """The same model from its config, without weights."""
    if name in SMALL:
        return build_model(SMALL[name](), settings)
    model = TINY_MODELS[name]()
    model.config.architectures = [type(model).__name__]
    model.config.use_cache = False
    return build_model(model.config, settings)


def state_bytes(optimizer):
    """Bytes of the tensors in an optimizer's state, each storage once; GaLore keeps some in an object."""
    storages = {}

    def look(value):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for inner in value.values():
                look(inner)
        elif hasattr(value, "ortho_matrix"):
            look(vars(value))

    for state in optimizer.state.values():
        look(dict(state))
    return sum(storages.values())


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


def measured_peak(model, inputs, optim, **options):
    """Bytes alive at the fullest moment of the second step on the CPU, counted from real tensors."""
    if optim in RULES:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = hf_stateless.create_optimizer(model, optim, lr=1e-3, **options)
    model.config.use_cache = False
    before = weight_bytes_of_rank(model)
    with LiveBytes() as live:
        for _ in range(2):
            live.restart()
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return before + live.peak.total


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optim", ["sinkgd", "swan", "adamw_torch", "sinkgd_layerwise", "swan_layerwise"])
@pytest.mark.parametrize("model", SMALL)
def test_the_predicted_peak_is_what_is_alive_in_a_real_step(model, optim, dtype, checkpointing):
    settings = Settings(dtype=dtype, batch=2, seq=64, checkpointing=checkpointing, device="cpu")
    real = real_model(model, dtype).train()
    if checkpointing:
        real.activation_checkpointing_enable()
    tokens = torch.randint(3, 300, (2, 64))
    measured = measured_peak(real, {"input_ids": tokens, "labels": tokens}, optim)
    predicted = estimate(meta_model(model, settings), [optim], settings)[0].peak
    # In backward a CPU keeps the buffers of the largest update, which count for much in a model of this size.
    assert predicted == pytest.approx(measured, rel=0.1 if optim.endswith("layerwise") else 0.03)


@pytest.mark.parametrize("optim", ["sinkgd", "swan", "sinkgd_layerwise"])
def test_the_predicted_peak_holds_with_momentum(optim):
    settings, options = Settings(dtype="bf16", batch=2, seq=64, device="cpu"), {"momentum": 0.9}
    tokens = torch.randint(3, 300, (2, 64))
    inputs = {"input_ids": tokens, "labels": tokens}
    measured = measured_peak(real_model("small_llama", "bf16").train(), inputs, optim, **options)
    predicted = estimate(meta_model("small_llama", settings), [optim], settings, options)[0].peak
    assert predicted == pytest.approx(measured, rel=0.1 if optim.endswith("layerwise") else 0.03)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_the_predicted_peak_holds_for_other_kinds_of_models(model):
    settings = Settings(dtype="fp32", batch=2, seq=8, device="cpu")
    measured = measured_peak(real_model(model).train(), tiny_inputs(model), "sinkgd")
    predicted = estimate(meta_model(model, settings), ["sinkgd"], settings)[0].peak
    assert predicted == pytest.approx(measured, rel=0.1)


# PEFT asks transformers for an attribute that it has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_predicted_peak_holds_for_lora(checkpointing):
    peft = pytest.importorskip("peft")
    settings = Settings(dtype="fp32", batch=2, seq=64, lora=4, checkpointing=checkpointing, device="cpu")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    real = peft.get_peft_model(real_model("small_llama"), config).train()
    if checkpointing:
        real.get_base_model().activation_checkpointing_enable()
    tokens = torch.randint(3, 300, (2, 64))
    measured = measured_peak(real, {"input_ids": tokens, "labels": tokens}, "sinkgd")
    row = estimate(meta_model("small_llama", settings), ["sinkgd"], settings)[0]
    assert row.peak == pytest.approx(measured, rel=0.03)
    assert row.gradients == sum(p.nbytes for p in real.parameters() if p.requires_grad)


RESIDENT_SET = """
import json, resource, sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
import hf_stateless

def train(batch, seq, **sizes):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=dtype).train()
    model.config.use_cache = False
    make = torch.optim.AdamW if optim == "adamw_torch" else None
    optimizer = make(model.parameters()) if make else hf_stateless.create_optimizer(model, optim, lr=1e-3)
    tokens = torch.randint(0, sizes["vocab_size"], (batch, seq))
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

optim, dtype, run = sys.argv[1], getattr(torch, sys.argv[2]), json.loads(sys.argv[3])
tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
train(1, 8, vocab_size=100, **tiny)
with open("/proc/self/statm") as statm:
    before = int(statm.read().split()[1]) * resource.getpagesize()
train(**run)
# Not `ru_maxrss`, which begins with what the parent process held when it forked.
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(peak * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the resident set from /proc")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optim", ["sinkgd", "swan", "adamw_torch"])
@pytest.mark.parametrize(
    ("sizes", "batch"),
    [
        pytest.param((384, 1024, 6, 16000), 2, id="23M"),
        pytest.param((512, 1376, 8, 32000), 2, id="58M"),
        pytest.param((768, 2048, 8, 32000), 1, id="106M"),
    ],
)
def test_the_predicted_peak_is_within_a_tenth_of_the_resident_set(sizes, batch, optim, dtype):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    config = {**dict(zip(names, sizes, strict=True)), "num_attention_heads": sizes[0] // 64}
    settings = Settings(dtype=dtype, batch=batch, seq=256, device="cpu")
    predicted = estimate(build_model(LlamaConfig(**config), settings), [optim], settings)[0].peak
    arguments = [optim, str(DTYPES[dtype]).removeprefix("torch."), json.dumps({**config, "batch": batch, "seq": 256})]
    # Freed tensors go back to the system at once, so that the resident set is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RESIDENT_SET, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert predicted == pytest.approx(int(done.stdout.split()[-1]), rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optim", ["sinkgd", "swan", "adamw_torch"])
def test_the_predicted_peak_is_within_a_tenth_of_the_allocated_memory(optim):
    config = small_llama(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16)
    settings = Settings(batch=2, seq=1024)
    predicted = estimate(build_model(config, settings), [optim], settings)[0].peak
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().train()
    model.config.use_cache = False
    make = torch.optim.AdamW(model.parameters()) if optim in RULES else None
    optimizer = make or hf_stateless.create_optimizer(model, optim, lr=1e-3)
    tokens = torch.randint(3, 300, (2, 1024), device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


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


@pytest.fixture
def config_file(tmp_path):
    """A folder with the config of the small model."""
    folder = tmp_path / "secret-user" / "small"
    small_llama(max_position_embeddings=128).save_pretrained(folder)
    return folder / "config.json"


def test_the_json_has_a_version_and_every_number_its_origin(config_file, capsys):
    assert main([str(config_file.parent), "--json", "--optim", "sinkgd,adamw_torch", "--gpus", "24,1e-3"]) == 0
    text = capsys.readouterr().out
    report = json.loads(text)
    assert (report["schema"], report["version"]) == ("hf_stateless.memory_estimate", SCHEMA_VERSION)
    assert report["unit"] == "bytes"
    assert report["model"] == "small"
    assert "secret-user" not in text
    assert report["settings"]["seq"] == 128
    assert set(report["versions"]) == {"python", "hf_stateless", "torch", "transformers"}
    assert [row["optimizer"] for row in report["estimates"]] == ["sinkgd", "adamw_torch"]
    for row in report["estimates"]:
        assert set(row["origin"].values()) <= {"counted", "predicted"}
        assert all(isinstance(row[key], int) for key in row["origin"])
        assert row["fits_gib"] == [24]
        assert sum(row["at_peak"].values()) == row["peak"]


def test_a_file_and_its_folder_are_the_same_model(config_file, capsys):
    outputs = []
    for source in (config_file, config_file.parent):
        assert main([str(source)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_the_table_shows_each_optimizer_with_its_numbers_and_gpus():
    sizes = {"weights": 12, "gradients": 11, "optimizer_state": 3, "activations": 2, "temporary": 1, "gathered": 0}
    rows = [
        Estimate("sinkgd", **{k: v * GIB for k, v in sizes.items()}, peak=27 * GIB, moment="step"),
        Estimate("adamw_torch", **{k: v * GIB for k, v in sizes.items()}, peak=999 * GIB, moment="step"),
    ]
    facts = {"model": "m", "model_class": "C", "has_tokens": True, "parameters": 5, "trained_parameters": 4}
    table = as_table(as_json({**facts, "notes": ["A note."]}, Settings(), rows, sorted(GPUS)))
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    assert re.split(r" {2,}", lines["sinkgd"])[1:7] == ["12.00", "11.00", "3.00", "2.00", "1.00", "27.00"]
    assert "40 GiB and up" in lines["sinkgd"]
    assert GPUS[40] in lines["sinkgd"]
    assert "more than 141 GiB" in lines["adamw_torch"]
    assert {"counted", "predicted"} <= set(table.split())
    assert "gathered" not in table
    assert table.endswith("A note.")


def test_the_plot_is_a_picture(config_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "memory.png"
    assert main([str(config_file), "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "sinkgd" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder/at/all"], "expected a folder with a config.json"),
        (["CONFIG", "--optim", "sinkgd,adam"], "Unknown optimizer 'adam'. Known: swan, sinkgd"),
        (["CONFIG", "--optim", ""], "Unknown optimizer ''"),
        (["CONFIG", "--gpus", "24,big"], "--gpus '24,big': expected sizes in GiB"),
        (["CONFIG", "--gpus", "-1"], "expected sizes in GiB"),
        (["CONFIG", "--dtype", "int8", "--optim", "adamw_torch"], "adamw_torch cannot train 8-bit weights"),
        (["CONFIG", "--dtype", "int8", "--fsdp", "2"], "8-bit weights cannot be sharded"),
        (["CONFIG", "--dtype", "fp8"], "expected bf16 or fp32 or int8"),
        (["CONFIG", "--batch", "0"], "expected an integer of at least 1, got '0'"),
        (["CONFIG", "--seq", "129"], "type --seq 128"),
        (["CONFIG", "--optim-args", "num_iterations"], "expected key=value"),
        (["CONFIG", "--optim-args", "num_iteration=3"], "Did you mean 'num_iterations'?"),
        (["CONFIG", "--optim", "sgd", "--optim-args", "num_iterations=3"], "does not change its memory"),
        (["CONFIG", "--optim", "galore_adamw", "--optim-args", "rank=x"], "rank='x' is no integer"),
        (["CONFIG", "--plot", "no/such/folder/memory.png"], "cannot be written"),
        (["CONFIG", "--colour"], "unrecognized arguments: --colour"),
        ([], "required: MODEL"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, config_file, capsys):
    arguments = [str(config_file) if argument == "CONFIG" else argument for argument in arguments]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid|not a valid|not valid"),
        ("{}", "model_type"),
        ('{"model_type": "clip"}', "cannot be built|takes"),
    ],
)
def test_a_config_that_is_none_gets_one_line(content, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_a_picture_without_matplotlib_says_what_to_install(config_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(config_file), "--plot", "memory.png"]) == 2
    assert 'pip install "hf_stateless[plot]"' in capsys.readouterr().err


def test_layerwise_is_applied_to_ours_only(config_file, capsys):
    assert main([str(config_file), "--layerwise", "--json", "--optim", "sinkgd,sgd,sinkgd_layerwise"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["optimizer"] for row in report["estimates"]] == ["sinkgd_layerwise", "sgd"]
    assert [row["origin"]["gradients"] for row in report["estimates"]] == ["predicted", "counted"]


@pytest.mark.parametrize("options", [[], ["--checkpointing", "--layerwise"], ["--lora", "16"], ["--fsdp", "8"]])
def test_a_7b_config_takes_less_than_30_seconds_of_processor_time(options, tmp_path, capsys):
    if "--lora" in options:
        pytest.importorskip("peft")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    start = time.process_time()
    assert main([str(tmp_path), "--json", *options]) == 0
    assert time.process_time() - start < 30
    report = json.loads(capsys.readouterr().out)
    # The 6.74 billion parameters of LLaMA-7B.
    assert report["parameters"] == pytest.approx(6.74e9, rel=0.01)

"""The report as a file: its schema, its arithmetic, its picture, and that nothing private is in it."""

import copy
import getpass
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODELS
from transformers import Trainer, TrainingArguments

import hf_stateless
from hf_stateless.reports.files import GIB
from hf_stateless.reports.measured.build import continued, residual
from hf_stateless.reports.measured.footprint import LiveGradients, Storages, count_parameters, stored_weight_bytes
from hf_stateless.reports.measured.picture import bars, draw
from hf_stateless.reports.measured.schema import SCHEMA_VERSION, MemoryReport, Moments, Range
from hf_stateless.reports.run_facts import hub_id


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a real run."""
    folder = tmp_path_factory.mktemp("run")
    args = TrainingArguments(
        folder, optim="sinkgd", optim_args="num_iterations=3", use_cpu=True, report_to=[], max_steps=2,
        logging_steps=1, per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (8, 6)).tolist()]
    trainer = Trainer(TINY_MODELS["llama"](), args, train_dataset=rows)
    hf_stateless.attach_memory_report(trainer)
    trainer.train()
    return folder


@pytest.fixture
def report(trained):
    return MemoryReport.load(trained)


def test_a_report_survives_the_way_through_its_file(trained, report, tmp_path):
    assert MemoryReport.load(report.save(tmp_path)) == report
    assert MemoryReport.load(trained / "memory_report.json") == report
    values = json.loads((trained / "memory_report.json").read_text())
    assert values == report.to_dict()
    assert values["schema_version"] == SCHEMA_VERSION
    assert report.setup.optimizer_options == {"num_iterations": "3"}


def sizes(values):
    """Every number of a report but rates and counts of other things."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from sizes(value)
        elif key in {"start", "max", "min", "peak", "weights", "gradients", "optimizer_state", "state_bytes"}:
            yield value


def test_sizes_are_whole_bytes(report):
    found = list(sizes(report.to_dict()))
    assert len(found) > 8
    assert all(type(size) is int and size >= 0 for size in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(schema_version=99), "schema_version is 99, expected 1"),
        (lambda v: v.pop("counted"), "'counted' is missing"),
        (lambda v: v["counted"].pop("weights"), "'counted.weights' is missing"),
        (lambda v: v["counted"].update(weights=1.5), "'counted.weights' is 1.5, expected int"),
        (lambda v: v["measured"].update(steps=True), "'measured.steps' is True, expected int"),
        (lambda v: v["setup"].update(device_capacity="80"), "'setup.device_capacity' is '80', expected int"),
        (lambda v: v.update(groups={}), "'groups' is {}, expected list"),
        (lambda v: v["groups"][0].update(role=3), "'groups.0.role' is 3, expected str"),
        (
            lambda v: v["predicted"].update(adamw_torch_fused=[]),
            "'predicted.adamw_torch_fused' is [], expected an object",
        ),
        (lambda v: v["setup"]["dtypes"].update(float32="many"), "'setup.dtypes.float32' is 'many', expected int"),
    ],
)
def test_a_report_of_another_shape_gets_one_line(change, message, report, tmp_path):
    values = report.to_dict()
    change(values)
    file = tmp_path / "memory_report.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="memory report") as error:
        MemoryReport.load(tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_json_gets_one_line(tmp_path):
    (tmp_path / "memory_report.json").write_text('{"schema_version": 1,')
    with pytest.raises(ValueError, match="no JSON") as error:
        MemoryReport.load(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        MemoryReport.load(tmp_path / "nowhere")


def test_keys_of_later_versions_are_ignored(report):
    values = {**report.to_dict(), "colour": "blue"}
    values["setup"]["weather"] = "fair"
    assert MemoryReport.from_dict(values) == report


def test_a_file_is_replaced_whole_or_not_at_all(report, tmp_path, monkeypatch):
    report.save(tmp_path)
    before = (tmp_path / "memory_report.json").read_text()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    report.complete = False
    with pytest.raises(OSError, match="No space left"):
        report.save(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        draw(report, tmp_path / "memory.png")
    assert [path.name for path in tmp_path.iterdir()] == ["memory_report.json"]
    assert (tmp_path / "memory_report.json").read_text() == before


def test_nothing_private_is_in_a_report(trained):
    text = (trained / "memory_report.json").read_text()
    private = {str(Path.home()), str(Path.cwd()), str(trained), str(trained.parent), socket.gethostname()}
    assert not {word for word in private if len(word) > 1 and word in text}
    assert f"/{getpass.getuser()}/" not in text


def test_a_local_folder_is_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    for name, expected in {
        "HuggingFaceTB/SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M",
        "gpt2": "gpt2",
        "": None,
        "runs/sft": None,
        "a/b/c": None,
        str(tmp_path / "gone"): None,
    }.items():
        assert hub_id(name) == expected, name


def test_quantised_weights_are_counted_with_their_scales():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 128)
    for layer, dtype, codes in (
        (bitsandbytes.nn.Linear8bitLt(64, 128, has_fp16_weights=False), "int8", 64 * 128),
        (bitsandbytes.nn.Linear4bit(64, 128, quant_type="nf4", compress_statistics=False), "nf4", 64 * 128 // 2),
    ):
        layer.load_state_dict(plain.state_dict())
        layer = layer.to("cpu")
        bias, blocks = 4 * 128, 64 * 128 // 64
        tables = 4 * 128 if dtype == "int8" else 4 * blocks + 4 * 16  # scales of rows; of blocks, and the 16 values
        for _ in range(2):
            assert stored_weight_bytes(layer) == codes + tables + bias, dtype
            assert count_parameters(layer.parameters()) == {dtype: 64 * 128, "float32": 128}
            layer(torch.randn(2, 64))  # bitsandbytes moves codes and scales


def test_int8_weights_of_this_package_are_counted_with_their_scales():
    torch.manual_seed(0)
    model = TINY_MODELS["llama"]()
    before = stored_weight_bytes(model)
    hf_stateless.quantize(model, hf_stateless.Int8TrainingConfig())
    expected = sum(
        {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for p in (*model.parameters(), *model.buffers())
            for t in (getattr(p, "codes", p), getattr(p, "scale", p))
        }.values()
    )
    assert stored_weight_bytes(model) == expected < before
    assert count_parameters(model.parameters())["int8"] > 0


def test_a_storage_counts_once_however_it_is_seen():
    storages, W = Storages(), torch.zeros(4, 8)
    assert storages.add({"a": W, "b": [W.T, W[1:]], "c": (W.view(-1), None, "text", 3)}) == 4 * 4 * 8
    assert storages.add(W) == 0
    assert storages.add(torch.zeros(0)) == 0


def test_gradients_that_are_freed_in_backward_are_not_alive_together():
    params = [torch.nn.Parameter(torch.eye(32)) for _ in range(4)]
    live = LiveGradients(params)

    def free(p):
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(free) for p in params]
    torch.linalg.multi_dot(params).sum().backward()
    # A backward pass may have several at hand; the hooks that free them come right after those that look.
    assert live.peak == 4 * 32 * 32
    for handle in handles:
        handle.remove()
    torch.linalg.multi_dot(params).sum().backward()
    assert live.peak == 4 * 4 * 32 * 32
    live.remove()


def test_what_is_not_counted_is_divided_without_going_below_nothing(report):
    counted = copy.copy(report.counted)
    held = counted.weights + counted.gradients + counted.optimizer_state
    for peak, before, expected in ((held + 10, 4, (6, 4)), (held + 10, 40, (0, 10)), (held - 1, 4, (0, 0))):
        rest = residual(peak, counted, before)
        assert (rest.activations_and_temporaries, rest.before_training) == expected


def test_parts_of_a_resumed_run_are_put_together(report):
    earlier = copy.deepcopy(report)
    earlier.measured.peak = Range(report.measured.peak.max + 1000, 1)
    earlier.measured.moments = Moments(report.measured.peak.max + 1000, 1)
    later = copy.deepcopy(report)
    later.measured.from_step = 2
    whole = continued(later, earlier)
    assert (whole.measured.from_step, whole.measured.steps) == (0, 4)
    assert whole.measured.peak.max == whole.measured.moments.forward_backward == report.measured.peak.max + 1000
    assert whole.cost.tokens == 2 * report.cost.tokens
    assert whole.residual.activations_and_temporaries == report.residual.activations_and_temporaries + 1000
    earlier.measured.kind = "CUDA allocator"
    assert continued(copy.deepcopy(report), earlier) == report


def test_the_bars_are_as_long_as_the_peaks(report):
    run, *others = bars(report).values()
    assert sum(run.values()) == report.measured.peak.max
    assert [sum(other.values()) for other in others] == [prediction.peak for prediction in report.predicted.values()]
    report.setup.optimizer = "adamw_torch_fused"
    assert [label.split("\n")[0] for label in bars(report)] == ["adamw_torch_fused", "adamw_bnb_8bit"]


@pytest.mark.parametrize("capacity", [None, 2 * GIB, 80 * GIB])
def test_the_picture_is_one(capacity, report, tmp_path):
    report.setup.device_capacity = capacity
    draw(report, tmp_path / "memory.png")
    picture = (tmp_path / "memory.png").read_bytes()
    assert picture[1:4] == b"PNG"
    width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
    assert width == 1200
    assert 400 < height < 700
    assert len(picture) < 200_000


def test_a_picture_without_matplotlib_says_what_to_install(report, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hf_stateless\[plot\]"'):
        draw(report, tmp_path / "memory.png")

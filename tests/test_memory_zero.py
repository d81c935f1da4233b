"""What `hf-stateless memory --zero STAGE --ranks N` predicts, and what it refuses."""

import json
from math import ceil

import pytest
import torch
from memory_models import meta_model

from hf_stateless.reports.predicted import Settings, estimate
from hf_stateless.reports.predicted.command import main
from hf_stateless.reports.predicted.zero import zero_optimizer_bytes
from hf_stateless.trainer.factory import parameter_groups
from hf_stateless.trainer.optim_args import parse_options


SETTINGS = {"batch": 1, "seq": 16}


def rows(optim, **settings):
    settings = Settings(**SETTINGS, **settings)
    model = meta_model("small_llama", settings)
    return model, estimate(model, [optim], settings)[0]


@pytest.fixture
def folder(tmp_path):
    model = meta_model("small_llama", Settings(**SETTINGS))
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    return tmp_path


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sinkgd", "swan"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_each_stage_cuts_one_more_thing(optim, ranks):
    model, alone = rows(optim)
    entries = sum(p.numel() for p in model.parameters())
    for stage in (1, 2, 3):
        row = rows(optim, zero=stage, ranks=ranks)[1]
        assert row.weights == pytest.approx(alone.weights / (ranks if stage == 3 else 1), rel=0.03)
        assert row.gradients == pytest.approx(alone.gradients / (ranks if stage > 1 else 1), rel=0.03)
        assert row.activations == alone.activations
        times = 3 if stage == 3 else 2
        assert row.sent_by_fsdp == pytest.approx(times * alone.gradients * (1 - 1 / ranks), rel=0.01)
        # Masters, and both moments of what AdamW updates.
        moments = entries if optim.startswith("adamw") else entries - matrices(model)
        assert row.optimizer_state == pytest.approx((4 * entries + 8 * moments) / ranks, rel=0.03)
        assert row.peak == sum(row.at_peak.values())


def matrices(model):
    groups = parameter_groups(model, parse_options("sinkgd", {}), lr=1e-3)
    return sum(p.numel() for group in groups if group["algorithm"] == "multinorm" for p in group["params"])


@pytest.mark.parametrize("ranks", [5, 7])
def test_what_is_sent_are_pieces_of_the_matrices_across_borders(ranks):
    model = meta_model("small_llama", Settings(**SETTINGS))
    sent = [0] * ranks
    for group in parameter_groups(model, parse_options("sinkgd", {}), lr=1e-3):
        if group["algorithm"] != "multinorm":
            continue
        owners = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(group["params"])])
        size = 2 * ceil(len(owners) / (2 * ranks))
        parts = [owners[rank * size : (rank + 1) * size] for rank in range(ranks)]
        for rank, part in enumerate(parts):
            for matrix, count in zip(*part.unique(return_counts=True), strict=True):
                others = sum(bool((other == matrix).any()) for other in parts) - 1
                sent[rank] += 4 * int(count) * others
    settings = Settings(**SETTINGS, zero=2, ranks=ranks)
    assert zero_optimizer_bytes(model, "sinkgd", {}, settings) == max(sent) > 0
    assert zero_optimizer_bytes(model, "adamw_torch_fused", {}, settings) == 0


@pytest.mark.parametrize(("optim", "ways"), [("sinkgd", 1), ("swan", 2), ("sinkgd_polar", 2)])
def test_at_stage_3_gradients_of_matrices_are_gathered_and_whitened_updates_shared(optim, ways):
    settings = Settings(**SETTINGS, zero=3, ranks=4)
    model = meta_model("small_llama", settings)
    assert zero_optimizer_bytes(model, optim, {}, settings) == ways * 4 * matrices(model) * 3 // 4
    row = estimate(model, [optim], settings)[0]
    # Gradients of the part, and of a batch the gathered ones, each once more, and a weight for each.
    assert row.temporary >= 4 * sum(p.numel() for p in model.parameters()) // 4 + 3 * 4 * matrices(model)


def test_averages_of_gradients_are_kept_and_gathered_in_their_dtype():
    def predicted(stage, **options):
        settings = Settings(**SETTINGS, zero=stage, ranks=4)
        model = meta_model("small_llama", settings)
        [row] = estimate(model, ["sinkgd"], settings, options)
        return matrices(model), row.optimizer_state, zero_optimizer_bytes(model, "sinkgd", options, settings)

    entries, state, sent = predicted(3)
    _, more_state, more_sent = predicted(3, momentum="0.9", momentum_dtype="bfloat16")
    assert more_state - state == pytest.approx(2 * entries / 4, rel=0.01)
    assert more_sent - sent == 2 * entries * 3 // 4
    assert predicted(2, momentum="0.9", momentum_dtype="float32")[2] == 2 * predicted(2)[2] > 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--zero 2", "--zero 2: expected the number of GPUs beside it, such as --ranks 8."),
        ("--ranks 8", "--ranks 8: expected --zero beside it; with FSDP2 type --fsdp N alone."),
        ("--zero 2 --ranks 8 --fsdp 8", "--zero 2: got --fsdp 8 beside it, expected one of the two."),
        ("--zero 2 --ranks 8 --dtype int8", "--zero 2: got --dtype int8 beside it, expected one of the two."),
        ("--zero 3 --ranks 8 --optim galore_adamw", "or an optimizer of ours, got galore_adamw."),
        ("--zero 1 --ranks 8 --layerwise", "leave out --layerwise."),
        ("--zero 1 --ranks 8 --optim adafactor", "or an optimizer of ours, got adafactor."),
        ("--zero 1 --ranks 8 --optim sinkgd --optim-args embeddings=row_moment", "leave it out, or use FSDP2."),
        ("--zero 1 --ranks 8 --optim sinkgd --optim-args momentum=0.9", "type momentum_dtype=bfloat16"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(words, line, folder, capsys):
    assert main([str(folder), "--seq", "16", *words.split()]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert line in told.err


def test_the_command_tells_the_stage_and_what_is_sent(folder, capsys):
    words = [str(folder), "--seq", "16", "--zero", "2", "--ranks", "8"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "ZeRO-2 over 8 GPUs, figures for one of them" in text
    assert "by ZeRO-2 itself; by the optimizers: sinkgd " in text
    assert "its buckets (reduce_bucket_size) come on top" in text
    assert "gathered" not in text
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["settings"]["zero"], found["settings"]["ranks"]) == (2, 8)
    assert "adamw_bnb_8bit" not in [row["optimizer"] for row in found["estimates"]]
    assert main([str(folder), "--seq", "16", "--zero", "3", "--ranks", "8"]) == 0
    assert "gathered" in capsys.readouterr().out

"""The commands of the stages on a GPU, which no rehearsal runs: their scripts understand every word."""

import argparse
import shlex
import sys
from functools import partial

import gpu_place
import gpu_ranks
import gpu_report
import memory
import pretrain
import pytest
import quality
import step_time
import whitening
from gpu_figures import options_of
from gpu_stages import STAGES


trl = pytest.importorskip("trl")
import finetuning_data  # noqa: E402
import finetuning_model  # noqa: E402
import reasoning_tasks  # noqa: E402


class ParsedError(Exception):
    """The command line was read; nothing is measured."""


def parsed(main, words, monkeypatch):
    """The arguments of a script, which ends there."""
    original = argparse.ArgumentParser.parse_args

    def read(parser, *args, **options):
        raise ParsedError(original(parser, *args, **options))

    monkeypatch.setattr(sys, "argv", ["script", *words])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read)
    with pytest.raises(ParsedError) as found:
        main()
    return found.value.args[0]


MAINS = {module.__name__: module.main for module in (gpu_ranks, memory, quality, step_time, whitening)}
MODEL, DATA = finetuning_model.ModelArguments, finetuning_data.DataArguments
READERS = {
    "sft": (trl.SFTConfig, MODEL, DATA, trl.DatasetMixtureConfig),
    "grpo": (trl.GRPOConfig, MODEL, reasoning_tasks.TaskArguments),
}


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.kind != "tests"], ids=lambda stage: stage.slug)
@pytest.mark.parametrize("rehearse", [False, True])
def test_a_script_understands_its_stage(stage, rehearse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(output=tmp_path, work=tmp_path, model="somewhere", rehearse=rehearse)
    script, *words = shlex.split(gpu_place.fill(stage, args))
    name = script.rpartition("/")[2].removesuffix(".py")
    if name in MAINS:
        assert parsed(MAINS[name], words, monkeypatch)
        return
    read = pretrain.parse_arguments if name == "pretrain" else partial(finetuning_model.parse_arguments, name)
    words += ["--use_cpu", "true"]  # bf16 is refused where there is neither a GPU nor this
    found = read(words) if name == "pretrain" else read(*READERS[name], args=words)
    folders = {values.output_dir for values in found if hasattr(values, "output_dir")}
    assert folders == {options_of(shlex.join(words))["output_dir"]}


def test_stages_name_rows_and_studies_that_are_there():
    rows = {"step_time": step_time.ROWS, "memory": memory.ROWS, "quality": quality.ROWS}
    for stage in STAGES:
        assert stage.kind in gpu_report.TABLES
        for script, known in rows.items():
            if f"/{script}.py" in stage.script:
                assert words_after("--rows", stage.full) <= known.keys()
                assert words_after("--rows", stage.tiny) <= known.keys()
                assert words_after("--study", stage.full + stage.tiny) <= quality.STUDIES.keys()
    assert len({stage.slug for stage in STAGES}) == len({stage.name for stage in STAGES}) == len(STAGES)


def words_after(flag, command):
    words, found = shlex.split(command), set()
    for start in (place for place, word in enumerate(words) if word == flag):
        end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
        found |= set(words[start + 1 : end])
    return found

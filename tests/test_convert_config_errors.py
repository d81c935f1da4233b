"""`hf-stateless convert-config`: what it refuses, what it prints, and when it writes."""

import os

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from config_files import ON, ZERO2, accelerate_config, of_deepspeed, of_fsdp, written

from hf_stateless.run import command as cli
from hf_stateless.run.convert.command import main


BILLIONS = "\n".join(["a0: &a0 [1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
BAD = {
    "a list": ("[1, 2]", "got a list"),
    "empty": ("", "got an empty file"),
    "a text": ("hello", "got a text"),
    "half a JSON": ('{"zero_optimization": {', "not JSON"),
    "half a YAML": ("a: [1\nb", "not YAML"),
    "deep": ("[" * 100_000, "not YAML"),
    "in itself": ("zero_optimization: &a {stage: 3, b: *a}", "got more than 10000 values"),
    "endless": ("zero_optimization: {stage: 3}\n" + "# \n" * 100_000, "got more than 262144 characters"),
    "a number of 400 digits": ({**ZERO2, "train_batch_size": 10**400}, "expected a whole number"),
    "a list that stands for billions": (f"{BILLIONS}\nzero_optimization: {{stage: *a11}}", "got more than 10000"),
    "billions": (
        "zero_optimization: {stage: 3}\na0: &a0 {x: 1, y: 1}\n"
        + "\n".join(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}" for i in range(1, 12)),
        "got more than",
    ),
    "of a model": ({"model_type": "llama"}, "got a file with model_type, expected a DeepSpeed config"),
    "of a run": ({"deepspeed": "ds.json", "bf16": True}, "convert-config ds.json"),
    "of a run of axolotl": ({"fsdp_config": {"fsdp_offload_params": True}}, "type version: 2 in its fsdp_config"),
    "of the Trainer": ({"transformer_layer_cls_to_wrap": ["A"], "min_num_params": 0}, 'type "version": 2'),
    "a key twice": ('{"zero_optimization": {"stage": 2}, "zero_optimization": {}}', "got zero_optimization twice"),
    "stage 4": ({"zero_optimization": {"stage": 4}}, "stage: got 4, expected a stage of ZeRO"),
    "stage true": ({"zero_optimization": {"stage": True}}, "expected a stage of ZeRO"),
    "stage auto": ({"zero_optimization": {"stage": "auto"}}, "expected a stage of ZeRO"),
    "no block": ({"zero_optimization": 3}, "expected a block"),
    "precision as a switch": ({**ZERO2, "bf16": True}, "bf16: got True, expected a block"),
    "both precisions": ({**ZERO2, "bf16": ON, "fp16": ON}, "bf16 and fp16 are both enabled"),
    "precision of words": ({**ZERO2, "bf16": {"enabled": "maybe"}}, "expected true, false or auto"),
    "words": ({**ZERO2, "gradient_accumulation_steps": "two"}, "expected a whole number of at least 1"),
    "negative": ({**ZERO2, "gradient_clipping": -1}, "expected a number of at least 0"),
    "not a number": ('{"zero_optimization": {}, "gradient_clipping": NaN}', "expected a number"),
    "device": ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, "expected none, cpu or nvme"),
    "sizes": (
        {**ZERO2, "train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
        "expected a multiple of 2 x 2",
    ),
    "FSDP2": (of_fsdp(fsdp_version=2), "got fsdp_version: 2"),
    "half FSDP2": (of_fsdp(fsdp_version=2, fsdp_use_orig_params=True), "take fsdp_use_orig_params out"),
    "version 3": (of_fsdp(fsdp_version=3), "expected 1 or none"),
    "strategy 9": (of_fsdp(fsdp_sharding_strategy=9), "expected one of FULL_SHARD"),
    "policy": (of_fsdp(fsdp_auto_wrap_policy="SOME"), "expected one of TRANSFORMER_BASED_WRAP"),
    "block of FSDP": (accelerate_config("FSDP", fsdp_config=[1]), "fsdp_config: got [1]"),
    "DDP": (accelerate_config("MULTI_GPU"), "distributed_type: got MULTI_GPU"),
    "no type": ({"compute_environment": "LOCAL_MACHINE"}, "distributed_type"),
    "SageMaker": ({"compute_environment": "AMAZON_SAGEMAKER"}, "got 'AMAZON_SAGEMAKER'"),
    "processes": ({**of_fsdp(), "num_processes": "many"}, "num_processes: got 'many'"),
    "no such JSON": (of_deepspeed(deepspeed_config_file="not_there.json"), "not_there.json: No such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_such_config_ends_in_one_line_and_writes_nothing(case, tmp_path, capsys):
    values, expected = BAD[case]
    is_json = isinstance(values, dict) and "distributed_type" not in values
    path = written(tmp_path, values, "config.json" if is_json else "config.yaml")
    out = tmp_path / "out.yaml"
    assert main([str(path), "-o", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hf-stateless convert-config: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["missing.json", ".", "\udcff.json"])
def test_a_file_that_cannot_be_read_ends_in_one_line(name, tmp_path, capsys):
    assert main([str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bytes_that_are_no_text_end_in_one_line(tmp_path, capsys):
    (tmp_path / "ds.json").write_bytes(b"\xff\xfe\x00{")
    assert main([str(tmp_path / "ds.json")]) == 2
    assert "ds.json: 'utf-8' codec" in capsys.readouterr().err


def test_an_existing_file_is_replaced_only_when_asked_and_only_by_a_whole_one(tmp_path, capsys):
    path, out = written(tmp_path, ZERO2), tmp_path / "out.yaml"
    out.write_text("mine")
    assert main([str(path), "-o", str(out)]) == 2
    assert "type --force" in capsys.readouterr().err
    assert main([str(written(tmp_path, "[]", "bad.json")), "-o", str(out), "--force"]) == 2
    assert out.read_text() == "mine"
    assert main([str(path), "-o", str(out), "--force"]) == 0
    assert load_config_from_file(str(out)).fsdp_config["fsdp_version"] == 2
    assert main([str(path), "-o", str(tmp_path / "out.json")]) == 2
    assert sorted(os.listdir(tmp_path)) == ["bad.json", "config.json", "out.yaml"]


def test_what_is_printed_is_the_file_and_a_key_cannot_write_into_it(tmp_path, capsys):
    path = written(tmp_path, {**ZERO2, "a\nmixed_precision: fp16": 1})
    assert cli.main(["convert-config", str(path)]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["fsdp_config"]["fsdp_reshard_after_forward"] is False
    assert "mixed_precision" not in yaml.safe_load(text)
    assert "# Take deepspeed=... out of the script" in text
    assert "# accelerate launch --config_file fsdp2.yaml --num_processes N train.py" in text


def test_help_says_what_goes_in_and_what_comes_out(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("DeepSpeed JSON", "-o fsdp2.yaml", "distributed_type: DEEPSPEED or FSDP"))
    cli.main(["--help"])
    assert "\n    convert-config " in capsys.readouterr().out

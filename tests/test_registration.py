"""Claims about the names that `import hf_stateless` adds to transformers, and the canary for its private parts."""

import copy
import dataclasses
import importlib
import inspect
import json
import pickle
import re
import subprocess
import sys
import threading
import warnings
from importlib.metadata import version

import pytest
import torch
import transformers
from private_parts import PRIVATE_PARTS
from transformers import HfArgumentParser, Trainer, TrainingArguments, trainer, trainer_optimizer
from transformers.trainer_optimizer import OptimizerContext
from transformers.training_args import OptimizerNames

import hf_stateless
from hf_stateless.trainer import names as registration


# TRL 1.16 sets `gradient_checkpointing`, which transformers 5.23 warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

NAMES = registration.optimizer_names()
CONFIGS = ["transformers:TrainingArguments", "trl:SFTConfig", "trl:GRPOConfig", "trl:DPOConfig"]


def make_arguments(name, config=CONFIGS[0], **options):
    module, _, cls = config.partition(":")
    options = {"use_cpu": True, "bf16": False, "report_to": "none", **options}
    return getattr(pytest.importorskip(module), cls)(output_dir="out", optim=name, **options)


@pytest.fixture
def undo_registration(monkeypatch):
    """Take back what a test registers, so that tests cannot see each other's names."""
    members, handlers = dict(OptimizerNames._member_map_), dict(trainer_optimizer._OPTIMIZER_HANDLERS)
    monkeypatch.setattr(registration, "_WARNED", set())
    yield
    for name in OptimizerNames._member_map_.keys() - members:
        OptimizerNames._member_names_.remove(name)
        del OptimizerNames._value2member_map_[OptimizerNames._member_map_.pop(name).value]
        type.__delattr__(OptimizerNames, name)
    trainer_optimizer._OPTIMIZER_HANDLERS.clear()
    trainer_optimizer._OPTIMIZER_HANDLERS.update(handlers)


def test_every_preset_is_a_name():
    assert set(hf_stateless.PRESETS) <= set(NAMES)
    assert {"swan", "sinkgd", "multinorm"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_name_is_a_full_member_of_the_enum(name):
    member = OptimizerNames(name)
    assert member is OptimizerNames[name.upper()]
    assert member is getattr(OptimizerNames, name.upper())
    assert member is OptimizerNames(member)
    assert isinstance(member, OptimizerNames)
    assert member in OptimizerNames
    assert [each.value for each in OptimizerNames].count(name) == 1
    assert (member.name, member.value) == (name.upper(), name)
    assert member == name
    assert hash(member) == hash(name)
    assert repr(member) == f"<OptimizerNames.{name.upper()}: {name!r}>"
    assert str(member) == str(OptimizerNames.SGD).replace("SGD", name.upper())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 introduced `value in Enum`")
@pytest.mark.parametrize("name", NAMES)
def test_plain_string_is_found_in_the_enum(name):
    assert name in OptimizerNames


def test_newer_pythons_list_of_hashable_values_gets_the_name(undo_registration, monkeypatch):
    values = [member.value for member in OptimizerNames]
    monkeypatch.setattr(OptimizerNames, "_hashable_values_", values, raising=False)
    registration.register(["extra_name"])
    assert values[-1] == "extra_name"


def test_unknown_name_is_refused_with_our_names_in_the_list():
    with pytest.raises(ValueError, match=r"sinkdg is not a valid OptimizerNames.*'sinkgd'"):
        make_arguments("sinkdg")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_configs_take_the_name_and_write_it_as_a_string(name, config):
    arguments = make_arguments(name, config)
    assert arguments.optim is OptimizerNames(name)
    assert arguments.to_dict()["optim"] == name
    assert json.loads(arguments.to_json_string())["optim"] == name
    assert arguments.to_sanitized_dict()["optim"] == name
    assert name in repr(arguments).lower()


@pytest.mark.parametrize("name", NAMES)
def test_set_optimizer_replace_and_copies_keep_the_member(name):
    member = OptimizerNames(name)
    arguments = make_arguments("sgd").set_optimizer(name, learning_rate=1e-3)
    assert arguments.optim is member
    assert dataclasses.replace(arguments, learning_rate=2e-3).optim is member
    assert copy.deepcopy(arguments).optim is member
    assert copy.copy(arguments).optim is member
    assert copy.deepcopy([member]) == [member]
    assert copy.deepcopy(member) is member
    assert TrainingArguments(**arguments.to_dict()).optim is member


def listed_choices(usage):
    return "".join(usage.partition("--optim {")[2].partition("}")[0].split()).split(",")


@pytest.mark.parametrize("name", NAMES)
def test_command_line_takes_and_lists_the_name(name):
    parser = HfArgumentParser(TrainingArguments)
    (arguments,) = parser.parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", "--optim", name])
    assert arguments.optim is OptimizerNames(name)
    assert name in listed_choices(parser.format_usage())


@pytest.mark.skipif(
    transformers.__version__.startswith("5.2."), reason="--help of transformers 5.2 fails: a help text has a bare %"
)
def test_help_lists_the_names(capsys):
    with pytest.raises(SystemExit) as stop:
        HfArgumentParser(TrainingArguments).parse_args(["--help"])
    assert stop.value.code == 0
    assert set(NAMES) <= set(listed_choices(capsys.readouterr().out))


@pytest.mark.parametrize("name", NAMES)
def test_argument_files_take_the_name(name, tmp_path):
    values = {"output_dir": "out", "use_cpu": True, "optim": name, "optim_args": "num_iterations=3"}
    (tmp_path / "arguments.yaml").write_text(json.dumps(values), encoding="utf-8")
    (arguments,) = HfArgumentParser(TrainingArguments).parse_yaml_file(str(tmp_path / "arguments.yaml"))
    assert (arguments.optim, arguments.optim_args) == (name, "num_iterations=3")
    (arguments,) = HfArgumentParser(TrainingArguments).parse_dict(values)
    assert arguments.optim is OptimizerNames(name)


@pytest.mark.parametrize("name", NAMES)
def test_trl_parser_takes_the_name_from_yaml_and_the_command_line_wins(name, tmp_path):
    trl = pytest.importorskip("trl")
    config = tmp_path / "config.yaml"
    config.write_text(f"output_dir: out\nuse_cpu: true\nbf16: false\noptim: {name}\n", encoding="utf-8")
    (arguments,) = trl.TrlParser(trl.SFTConfig).parse_args_and_config(["--config", str(config)])
    assert arguments.optim is OptimizerNames(name)
    command = ["--config", str(config), "--optim", "adafactor"]
    (arguments,) = trl.TrlParser(trl.SFTConfig).parse_args_and_config(command)
    assert arguments.optim is OptimizerNames.ADAFACTOR


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dumps", [pickle.dumps, pickle._dumps], ids=["c", "python"])
@pytest.mark.parametrize("name", NAMES)
def test_member_pickles_as_a_plain_string(name, dumps, protocol):
    payload = dumps(OptimizerNames(name), protocol)
    assert b"OptimizerNames" not in payload
    assert b"hf_stateless" not in payload
    assert type(pickle.loads(payload)) is str
    assert pickle.loads(payload) == name
    arguments = pickle.loads(dumps(make_arguments(name), protocol))
    assert arguments.to_dict()["optim"] == name


def test_dill_pickles_the_member_as_a_plain_string():
    dill = pytest.importorskip("dill")
    assert type(dill.loads(dill.dumps(OptimizerNames(NAMES[0])))) is str


def test_upstream_members_still_pickle_as_members():
    assert pickle.loads(pickle.dumps(OptimizerNames.SGD)) is OptimizerNames.SGD


LOAD_WITHOUT_US = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_stateless":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch

found = []
for path in sys.argv[1:]:
    arguments = torch.load(path, weights_only=False)
    found.append([type(arguments.optim).__name__, arguments.to_dict()["optim"], len(str(arguments)) > 0])
print(json.dumps({"found": found, "imported": "hf_stateless" in sys.modules}))
"""


def test_training_args_bin_loads_where_the_package_is_not_installed(tmp_path):
    pytest.importorskip("trl")
    expected, paths = [], []
    for name in NAMES:
        for config in CONFIGS[:2]:
            paths.append(tmp_path / f"{len(paths)}.bin")
            torch.save(make_arguments(name, config), paths[-1])
            expected.append(["str", name, True])
    command = [sys.executable, "-c", LOAD_WITHOUT_US, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"found": expected, "imported": False}


@pytest.mark.parametrize("name", NAMES)
def test_trainer_hands_the_name_and_its_context_to_the_factory(name, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hf_stateless.trainer.handler.handle", lambda *given: (seen.append(given), ("cls", {"lr": 1}))[1]
    )
    arguments = make_arguments(name, optim_args="norms=row_l2+col_l2, num_iterations=3")
    assert Trainer.get_optimizer_cls_and_kwargs(arguments) == ("cls", {"lr": 1})
    [(given, context)] = seen
    assert given == name
    assert isinstance(context, OptimizerContext)
    assert context.args is arguments
    assert context.optim_args == {"norms": "row_l2+col_l2", "num_iterations": "3"}


def test_registering_again_changes_nothing():
    members, parse = list(OptimizerNames), trainer._parse_optim_args
    handlers = list(trainer_optimizer._OPTIMIZER_HANDLERS.items())
    registration.register()
    assert [id(member) for member in OptimizerNames] == [id(member) for member in members]
    assert list(trainer_optimizer._OPTIMIZER_HANDLERS.items()) == handlers
    assert trainer._parse_optim_args is parse


def test_a_reloaded_module_does_not_stack_a_second_registration():
    members, parse = list(OptimizerNames), trainer._parse_optim_args
    importlib.reload(registration).register()
    assert list(OptimizerNames) == members
    assert trainer._parse_optim_args is parse


def test_threads_that_register_at_once_add_each_name_once(undo_registration):
    names, barrier = [f"extra_{index}" for index in range(20)], threading.Barrier(8)

    def work():
        barrier.wait()
        registration.register(names)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = [member.value for member in OptimizerNames]
    assert [values.count(name) for name in names] == [1] * len(names)


def test_further_names_can_be_registered(undo_registration):
    registration.register(["extra_name"])
    assert make_arguments("extra_name").optim is OptimizerNames.EXTRA_NAME


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("sgd", "transformers has a member of this value"),
        ("lion", "transformers has a member LION of another value"),
        ("foreign", "another package has put a handler under this name"),
    ],
)
def test_a_name_that_is_taken_is_left_alone_with_one_warning(name, why, undo_registration):
    trainer_optimizer._OPTIMIZER_HANDLERS["foreign"] = len
    members, handlers = list(OptimizerNames), dict(trainer_optimizer._OPTIMIZER_HANDLERS)
    with pytest.warns(UserWarning, match=rf"optim='{name}' is already.*type: .*create_optimizer\(model, '{name}'"):
        registration.register([name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration.register([name])
    assert list(OptimizerNames) == members, why
    assert handlers == trainer_optimizer._OPTIMIZER_HANDLERS, why


@pytest.mark.parametrize("installed", ["4.57.6", "5.1.0", "5.0.0rc1"])
def test_old_transformers_is_refused_in_one_line(installed, monkeypatch):
    monkeypatch.setattr(registration.transformers, "__version__", installed)
    expected = rf"needs transformers 5.2 or newer, but {installed} is installed; type: pip install"
    with pytest.raises(ImportError, match=expected) as caught:
        registration.register()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("installed", ["5.2.0", "5.2.0.dev0", "5.17.0", "6.0.0"])
def test_supported_transformers_is_accepted(installed, monkeypatch):
    monkeypatch.setattr(registration.transformers, "__version__", installed)
    registration.register()
    assert OptimizerNames("sinkgd").value == "sinkgd"


@pytest.mark.parametrize(
    ("module", "attribute"),
    [(trainer, "_parse_optim_args"), (trainer_optimizer, "_OPTIMIZER_HANDLERS")],
)
def test_a_private_part_that_is_gone_is_named_in_one_line(module, attribute, monkeypatch):
    monkeypatch.delattr(module, attribute)
    with pytest.raises(ImportError, match=rf"changed a private part.*{attribute}.*type: pip") as caught:
        registration.register()
    assert "\n" not in str(caught.value)


VALID_OPTIM_ARGS = [None, "", "a=1", "a=1,b=2", " a = 1, b = 2 ", "norms=row_l2+col_l2", "empty=", "a=1,a=2"]


@pytest.mark.parametrize("text", VALID_OPTIM_ARGS)
def test_well_formed_optim_args_parse_as_upstream(text):
    assert trainer._parse_optim_args(text) == trainer_optimizer._parse_optim_args(text)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("norms=row_l2,col_l2", "the part 'col_l2' is not key=value"),
        ("num_iterations", "the part 'num_iterations' is not key=value"),
        ("betas=(0.9,0.95)", "the part '0.95)' is not key=value"),
        ("a=1=2", "the part 'a=1=2' is not key=value"),
        ("a=1;b=2", "the part 'a=1;b=2' is not key=value"),
        ("a=1,", "a comma has nothing on one side"),
        ("a=1,,b=2", "a comma has nothing on one side"),
        (" ", "a comma has nothing on one side"),
        ({"norms": ["row_l2"]}, "a dict is not a string"),
        (["a=1"], "a list is not a string"),
        (3, "a int is not a string"),
        (b"a=1", "a bytes is not a string"),
    ],
)
@pytest.mark.parametrize("name", ["sgd", "sinkgd"])
def test_malformed_optim_args_give_one_clear_line(name, given, wrong):
    arguments = make_arguments("sgd").set_optimizer(name, args=given)
    with pytest.raises(ValueError, match="optim_args") as caught:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    message = str(caught.value)
    assert message.startswith(f"optim_args={given!r} is malformed: {wrong}. ")
    assert "Type key=value,key=value and join lists with +" in message
    assert "\n" not in message
    assert caught.value.__suppress_context__


def found_in_source(part):
    """Whether the name of `module#name` is written in the source of the module."""
    module, _, name = part.partition("#")
    return re.search(rf"\b{name}\b", inspect.getsource(importlib.import_module(module))) is not None


def is_there(part):
    if "#" in part:
        return found_in_source(part)
    module, _, path = part.partition(":")
    found = importlib.import_module(module)
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            return False
        found = getattr(found, attribute)
    return True


@pytest.mark.parametrize("row", PRIVATE_PARTS, ids=lambda row: row.part)
def test_canary_private_part_is_still_there(row):
    package = row.part.partition(".")[0].partition(":")[0]
    if row.everywhere and not is_there(row.part):
        files = ", ".join(f"hf_stateless/{name}" for name in row.used_by)
        pytest.fail(f"{package} {version(package)} moved {row.part}; used by {files}: {row.why}")


@pytest.mark.parametrize(
    "part", ["transformers.trainer:_moved", "torch.nn:Module._moved.deeper", "torch.nn.parallel.distributed#_moved"]
)
def test_a_part_that_was_moved_is_missed(part):
    assert not is_there(part)


def test_canary_trainer_still_reads_the_table_and_the_parser_that_are_changed():
    used = Trainer.get_optimizer_cls_and_kwargs.__code__.co_names
    assert trainer._OPTIMIZER_HANDLERS is trainer_optimizer._OPTIMIZER_HANDLERS
    assert {"_OPTIMIZER_HANDLERS", "_parse_optim_args"} <= set(used)
    fields = {field.name for field in dataclasses.fields(OptimizerContext)}
    assert {"args", "model", "optimizer_kwargs", "adam_kwargs", "optim_args"} <= fields

"""Names are registered in processes that do not import the package, and nothing else changes there."""

import os
import sys
import types

import pytest
from interpreters import CLI, PACKAGE, RUN, write
from transformers.training_args import OptimizerNames

from hf_stateless.run import command as cli
from hf_stateless.trainer.optim_args import optimizer_names


pytest_plugins = ["interpreters"]


# Modules that import each other as those of transformers do: whoever comes first finds the others half-initialised.
TRANSFORMERS = {
    "transformers/__init__.py": "",
    "transformers/training_args.py": "print('arguments')",
    "transformers/trainer_callback.py": "from . import training_args\nprint('callback')",
    "transformers/trainer.py": "from . import trainer_callback, training_args\nprint('trainer')",
    "accelerate/__init__.py": "import transformers.training_args\nprint('accelerate')",
}


@pytest.fixture
def autoload(tmp_path, light):
    """As `light`, with the folder `autoload` in front of the path and stand-ins for transformers and accelerate."""
    write(tmp_path / "front", TRANSFORMERS)

    def start(*arguments, **environment):
        done = light(*CLI, "run", sys.executable, *arguments, **environment)
        done.stdout = done.stdout.removeprefix("registered\n")
        return done

    return start


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("import transformers.training_args", "arguments registered"),
        ("import transformers.trainer_callback", "arguments callback registered"),
        ("import transformers.trainer", "arguments callback trainer registered"),
        ("import accelerate", "arguments accelerate registered"),
        ("import transformers, json", ""),
        ("import hf_stateless, transformers.trainer", "registered arguments callback trainer"),
    ],
)
def test_names_are_registered_when_no_module_is_half_initialised(autoload, code, printed):
    done = autoload("-c", code)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, printed.split(), "")


def test_modules_keep_loaders_of_plain_type_and_finders_go_when_done(autoload):
    code = """if True:
        import sys, transformers, transformers.training_args as t
        finders = [type(finder).__name__ for finder in sys.meta_path]
        print([vars(m.__spec__.loader).keys() == {"name", "path"} for m in (t, transformers)], "Watch" in finders)
    """
    assert autoload("-c", code).stdout.splitlines()[-1] == "[True, True] False"


def test_children_of_children_get_the_names(autoload):
    code = "import transformers.training_args"
    for _ in range(2):
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    assert autoload("-c", code).stdout.split() == ["arguments", "registered"]


@pytest.mark.parametrize(
    "body",
    ["print('theirs')", "import sys\nsys.path.insert(0, 'added')", "raise ValueError('theirs')", "import not_there"],
)
def test_an_existing_sitecustomize_runs_as_before(tmp_path, light, autoload, body):
    write(tmp_path, {"theirs/sitecustomize.py": body})
    code = "import sys; print(getattr(sys.modules.get('sitecustomize'), '__file__', None)); print(sys.path)"
    before, after = (start("-c", code, PYTHONPATH="theirs") for start in (light, autoload))
    # The first process of `autoload` is plain; its errors come first.
    assert before.stdout in after.stdout
    assert after.stderr == before.stderr * 2
    assert after.returncode == 0


def test_without_another_sitecustomize_the_path_is_as_before(light, autoload):
    code = "import sys; print(sys.path)"
    assert autoload("-c", code).stdout == light("-c", code).stdout


@pytest.mark.parametrize("missing", ["import not_there", "raise RuntimeError('two\\nlines')"])
@pytest.mark.parametrize("debug", ["", "1"])
def test_a_package_that_cannot_be_imported_breaks_nothing(tmp_path, autoload, missing, debug):
    write(tmp_path / "broken", {"hf_stateless/__init__.py": missing})
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'broken')!r}); import transformers.trainer; print('end')"
    done = autoload("-c", code, HF_STATELESS_DEBUG=debug)
    assert done.stdout.split()[-1] == "end"
    assert done.returncode == 0
    assert done.stderr.count("\n") == bool(debug)
    assert done.stderr.startswith("hf_stateless: names not registered: " if debug else "")


def test_where_transformers_is_missing_the_script_sees_the_usual_error(light):
    code = "import sys; sys.modules['torch'] = None; import transformers_not_there.training_args"
    done = light(*CLI, "run", sys.executable, "-c", code)
    assert done.returncode == 1
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'transformers_not_there'\n")
    assert "sitecustomize" not in done.stderr


def test_a_process_without_transformers_loads_nothing_more(light):
    path = {"PYTHONPATH": str(cli.AUTOLOAD)}
    code = "import sys; print(*sys.modules)"
    plain, watched = (set(start.stdout.split()) for start in (light("-c", code), light("-c", code, **path)))
    assert watched - plain <= {"sitecustomize", "__future__"}


def test_axolotl_gets_a_plugin_by_its_dotted_name(monkeypatch):
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    from hf_stateless.integrations import axolotl

    assert isinstance(axolotl.Plugin(), base.BasePlugin)
    assert set(optimizer_names()) <= {member.value for member in OptimizerNames}
    with pytest.raises(AttributeError, match="Other"):
        axolotl.Other  # noqa: B018


PARSE = """
    import sys
    from transformers import HfArgumentParser, TrainingArguments
    args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    print(args.optim.value, "hf_stateless" in globals())
    sys.exit(3)
    """


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(RUN, id="module"),
        pytest.param([*CLI, "run", sys.executable], id="command", marks=pytest.mark.slow),
    ],
)
def test_a_script_that_does_not_import_the_package_takes_the_names(tmp_path, python, launcher):
    write(tmp_path, {"script.py": PARSE})
    done = python(*launcher, "script.py", "--output_dir", "out", "--optim", "swan")
    assert (done.returncode, done.stdout.split()) == (3, ["swan", "False"]), done.stderr


@pytest.mark.parametrize("first", ["transformers.trainer_callback", "transformers.trainer"])
def test_names_come_whichever_module_of_transformers_comes_first(python, first):
    code = f"import {first}; from transformers import TrainingArguments as A; print(A('out', optim='sinkgd').optim)"
    path = os.pathsep.join([str(cli.AUTOLOAD), str(PACKAGE.parent)])
    done = python("-c", code, PYTHONPATH=path, HF_STATELESS_DEBUG="1")
    assert done.returncode == 0, done.stderr
    assert "not registered" not in done.stderr

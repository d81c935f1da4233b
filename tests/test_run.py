"""Any script: `python -m hf_stateless.run` and `hf-stateless run` change nothing but the names that `optim` knows."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.training_args import OptimizerNames

import hf_stateless
from hf_stateless.run import __main__ as run
from hf_stateless.run import command as cli
from hf_stateless.trainer.options import optimizer_names


PACKAGE = Path(hf_stateless.__file__).parent
RUN = ["-m", "hf_stateless.run"]
CLI = ["-m", "hf_stateless.run.command"]
posix = pytest.mark.skipif(os.name == "nt", reason="signals and exec as POSIX has them")


def write(folder, files):
    """Write files by name; the text may be indented."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


@pytest.fixture
def python(tmp_path):
    """`python(*arguments, **environment)`: an interpreter started in `tmp_path`, without network."""

    def start(*arguments, **environment):
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_STATELESS_DEBUG")}
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env={**inherited, **offline, **environment},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    return start


@pytest.fixture
def light(tmp_path, python):
    """As `python`, with a package that has the real `run`, `cli` and `autoload`, and imports in no time.

    It says `registered` on stdout when it is imported.
    """
    front = tmp_path / "front"
    body = f"__path__ = [{str(PACKAGE)!r}]\n__version__ = 'light'\nprint('registered')\n"
    write(front, {"hf_stateless/__init__.py": body})

    def start(*arguments, **environment):
        path = os.pathsep.join(filter(None, [str(front), environment.pop("PYTHONPATH", "")]))
        return python(*arguments, PYTHONPATH=path, **environment)

    return start


NEIGHBOUR = """
    def fail(value):
        raise KeyError(value)
    """
FACTS = """
    import sys, neighbour
    from __main__ import sys as own
    facts = [sys.argv, __name__, __file__, __package__, __spec__ and __spec__.name, __doc__, sys.path[0]]
    facts += [type(__loader__).__name__, own is sys, vars(sys.modules["__main__"]) is globals()]
    print(*facts, sep="\\n")
    """
SCRIPTS = {
    "facts": FACTS,
    "exit status": "import sys\nsys.exit(3)",
    "exit message": "import sys\nsys.exit('stopped')",
    "exception": """
        import neighbour

        def call():
            try:
                neighbour.fail("a key")
            except KeyError as error:
                raise ValueError("no such key") from error

        call()
        """,
    "import that fails": "import neighbour, not_there",
    "syntax": "print('before')\nx = = 1",
    "annotations are evaluated": "def f(x: list[int]): ...\nprint(f.__annotations__)",
    "interrupt": "raise KeyboardInterrupt",
    "exit handler": """
        import atexit

        def last():
            import __main__
            print(__main__.word)

        word = "end"
        atexit.register(last)
        """,
    "hook of its own": """
        import sys, traceback

        def hook(kind, error, trace):
            print("mine", *traceback.format_exception(kind, error, trace))

        sys.excepthook = hook
        1 / 0
        """,
    "spawned process": """
        import multiprocessing

        def double(x):
            return 2 * x

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(double, [1, 2]))
        """,
}


def outcome(done):
    """Status, output and errors, the latter from the first frame that is not the interpreter's."""
    errors = re.sub(r'^  File "[^"]*runpy[^"]*".*\n(    .*\n)*', "", done.stderr, flags=re.MULTILINE)
    return done.returncode, done.stdout.removeprefix("registered\n"), errors


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_under_plain_python(tmp_path, light, name):
    write(tmp_path, {"folder/script.py": SCRIPTS[name], "folder/neighbour.py": NEIGHBOUR})
    command = ["folder/script.py", "--flag", "-m", "two words"]
    assert outcome(light(*RUN, *command)) == outcome(light(*command))


@pytest.mark.parametrize("name", ["facts", "exit status", "exception", "import that fails", "interrupt"])
def test_a_module_runs_as_under_plain_python(tmp_path, light, name):
    write(tmp_path, {"package/__init__.py": "", "package/script.py": SCRIPTS[name], "neighbour.py": NEIGHBOUR})
    command = ["-m", "package.script", "--flag", "two words"]
    assert outcome(light(*RUN, *command)) == outcome(light(*command))


def test_a_package_runs_by_its_main_and_reaches_its_neighbours(tmp_path, light):
    write(tmp_path, {"package/__main__.py": "from . import other", "package/other.py": "print(__name__)"})
    assert outcome(light(*RUN, "-m", "package")) == (0, "package.other\n", "")


@posix
def test_a_linked_script_finds_the_neighbours_of_its_target(tmp_path, light):
    write(tmp_path, {"folder/script.py": FACTS, "folder/neighbour.py": ""})
    (tmp_path / "link.py").symlink_to("folder/script.py")
    assert outcome(light(*RUN, "link.py")) == outcome(light("link.py"))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "got nothing, expected a script or -m MODULE; type: python -m hf_stateless.run --help"),
        (["--optim"], 2, "got the option --optim, expected a script or -m MODULE; type: "),
        (["-m"], 2, "-m stands alone, expected a module after it"),
        (["missing.py"], 2, "can't open the script 'missing.py': No such file or directory"),
        (["."], 2, "can't open the script '.': "),
        (["-m", "missing"], 1, "No module named missing"),
        (["-m", "missing.part"], 1, "'missing.part' (ModuleNotFoundError: No module named 'missing')"),
        (["-m", "json"], 1, "'json' is a package and cannot be directly executed"),
    ],
)
def test_what_cannot_be_run_gives_one_line(arguments, status, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == status
    assert message in error
    assert error.startswith("hf_stateless.run: ")
    assert error.count("\n") == 1


def test_help_shows_both_forms(capsys):
    run.main(["--help"])
    assert {"SCRIPT", "MODULE"} <= set(re.findall(r"[A-Z]+", capsys.readouterr().out))


CHILD = "import os, sys; print(os.environ['PYTHONPATH']); print(sys.argv[1:])"


def test_the_command_gets_its_own_flags_and_the_old_path_behind_ours(light, tmp_path):
    flags = ["--help", "--version", "-m", "two words"]
    done = light(*CLI, "run", sys.executable, "-c", CHILD, *flags, PYTHONPATH="mine:")
    path, arguments = done.stdout.splitlines()[-2:]
    assert path.split(os.pathsep) == [str(cli.AUTOLOAD), str(tmp_path / "front"), "mine", ""]
    assert arguments == str(flags)


@pytest.mark.parametrize("existing", ["", "mine", "mine:other", ":mine"])
def test_setting_the_path_twice_changes_nothing(existing):
    once = cli.python_path(existing)
    assert cli.python_path(once) == once
    assert once.split(os.pathsep)[1:] == (existing.split(os.pathsep) if existing else [])


@posix
@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", -signal.SIGTERM), ("kill -PIPE $$", -signal.SIGPIPE)],
)
def test_the_command_takes_the_place_of_the_process(light, script, status):
    assert light(*CLI, "run", "sh", "-c", script).returncode == status


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "got nothing, expected run"),
        (["runn"], 2, "got 'runn', expected run"),
        (["run"], 2, "run got nothing, expected a command, like: hf-stateless run trl sft --optim sinkgd"),
        (["run", "--optim"], 2, "run got the option --optim, expected a command"),
        (["run", "no-such-command"], 127, "run found no command 'no-such-command'"),
        (["run", "train.py", "--optim"], 127, "type: hf-stateless run python train.py"),
    ],
)
def test_what_the_command_line_refuses_gets_one_line(arguments, status, message, capsys):
    assert cli.main(arguments) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_lists_the_subcommands(capsys):
    assert cli.main(["--help"]) == 0
    assert "hf-stateless memory" in capsys.readouterr().out
    assert cli.main(["run", "--help"]) == 0
    assert "hf-stateless run trl sft" in capsys.readouterr().out


def test_a_subcommand_gets_the_arguments_behind_it(monkeypatch):
    seen = []
    monkeypatch.setitem(cli.SUBCOMMANDS, "memory", lambda arguments: seen.extend(arguments) or 0)
    assert cli.main(["memory", "--model", "10m"]) == 0
    assert seen == ["--model", "10m"]


def test_the_command_is_declared():
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert '[project.scripts]\nhf-stateless = "hf_stateless.run.command:main"' in project


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


def test_a_process_without_transformers_pays_less_than_ten_milliseconds(light):
    path = {"PYTHONPATH": str(cli.AUTOLOAD)}
    code = "import sys; print(*sys.modules)"
    plain, watched = (set(start.stdout.split()) for start in (light("-c", code), light("-c", code, **path)))
    assert watched - plain <= {"sitecustomize", "__future__"}
    reports = [light("-X", "importtime", "-c", "", **path).stderr for _ in range(5)]
    # Microseconds; the outermost import, which holds that of another sitecustomize, is reported last.
    times = [int(re.findall(r"\| +(\d+) \| +sitecustomize", report)[-1]) for report in reports]
    # The best of five: a busy machine makes single ones longer.
    assert min(times) < 10_000


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


TRAIN = """
    import json, os, sys
    import torch
    from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    def main():
        args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(32, (16, 8)).tolist()]
        trainer = Trainer(model, args, train_dataset=rows)
        loss = trainer.train().training_loss
        found = [args.world_size, type(trainer.optimizer.optimizer).__name__, trainer.state.global_step, loss > 0]
        with open(f"rank{args.process_index}.json", "w") as file:
            json.dump(found, file)

    if __name__ == "__main__":
        main()
    """
TRAIN_FLAGS = (
    "--output_dir out --optim sinkgd --max_steps 2 --per_device_train_batch_size 2 --use_cpu --report_to none"
)
# Port 0 is any free one.
TWO_PROCESSES = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *RUN],
        ["-m", *TWO_PROCESSES, *RUN],
        [*CLI, "run", sys.executable, "-m", *TWO_PROCESSES],
    ],
    ids=["torchrun", "accelerate", "command"],
)
def test_two_processes_train_under_a_launcher(tmp_path, python, launcher):
    write(tmp_path, {"script.py": TRAIN})
    done = python(*launcher, "script.py", *TRAIN_FLAGS.split(), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [[2, "StatelessOptimizer", 2, True]] * 2


SFT_FLAGS = (
    "--model_name_or_path model --dataset_name data --output_dir out --optim sinkgd --optim_args num_iterations=2 "
    "--max_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-2 --logging_steps 1 --save_strategy no "
    "--bf16 false --use_cpu --report_to none"
)


@pytest.fixture
def tiny_sft(tmp_path):
    """What `SFT_FLAGS` name: a model with its tokenizer, and a data set."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=1, **sizes)).save_pretrained(tmp_path / "model")
    rows = [json.dumps({"text": " ".join(words[3 + (i + j) % 29] for j in range(8))}) for i in range(16)]
    write(tmp_path, {"data/train.jsonl": "\n".join(rows)})


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [[*CLI, "run", sys.executable, "-m", "trl.cli.main", "sft"], [*RUN, "-m", "trl.scripts.sft"]],
    ids=["trl sft", "trl.scripts.sft"],
)
def test_trl_trains_by_its_own_entry_points(tmp_path, python, tiny_sft, launcher):
    before = LlamaForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    done = python(*launcher, *SFT_FLAGS.split(), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    after = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    matrices = [name for name in before if name.endswith("proj.weight")]
    assert matrices
    assert all((after[name] - before[name]).abs().max() > 0 for name in matrices)

"""Any script: `python -m hf_stateless.run` and `hf-stateless run` change nothing but the names that `optim` knows."""

import os
import re
import signal
import sys

import pytest
from interpreters import CLI, CONSOLE, PACKAGE, RUN, write

from hf_stateless.run import __main__ as run
from hf_stateless.run import command as cli


pytest_plugins = ["interpreters"]
posix = pytest.mark.skipif(os.name == "nt", reason="signals and exec as POSIX has them")


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
        ([], 2, "got nothing, expected one of run, memory, explain"),
        (["runn"], 2, "got 'runn', expected one of run, memory, explain"),
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


def test_help_says_of_each_subcommand_what_it_does(capsys):
    assert cli.main(["--help"]) == 0
    told = re.findall(r"^    (\S+)  +\w+ .+$", capsys.readouterr().out, re.MULTILINE)
    assert told == ["run", *cli.SUBCOMMANDS]
    assert cli.main(["run", "--help"]) == 0
    assert "hf-stateless run trl sft" in capsys.readouterr().out


def test_a_subcommand_gets_the_arguments_behind_it(monkeypatch):
    seen = []
    monkeypatch.setitem(cli.SUBCOMMANDS, "memory", lambda arguments: seen.extend(arguments) or 0)
    assert cli.main(["memory", "--model", "10m"]) == 0
    assert seen == ["--model", "10m"]


# ---- The console script: the package is imported by the command that needs it, not before


@posix
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["run", "--help"], ["run"], ["run", "true"], ["no"]])
def test_the_console_script_answers_without_importing_the_package(light, arguments):
    console, module = (light(*start, *arguments) for start in (CONSOLE, CLI))
    assert "registered" not in console.stdout
    assert outcome(console) == outcome(module)


@posix
def test_a_command_starts_in_less_than_a_third_of_a_second(light):
    import resource

    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = light(*CONSOLE, "run", sys.executable, "-c", "print('started')")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of the processor, which other tests share: both interpreters together.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")
    assert min(seconds) < 0.3


@posix
@pytest.mark.parametrize("arguments", [["memory", "--colour"], ["compare"], ["export"]])
def test_the_other_commands_import_what_they_need(python, arguments):
    done = python(*CONSOLE, *arguments, PYTHONPATH=str(PACKAGE.parent))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"hf-stateless {arguments[0]}: ")


@posix
@pytest.mark.parametrize("name", ["trl-like", "with spaces", "python"])
def test_a_program_of_an_environment_that_is_not_on_path_is_found_beside_its_python(tmp_path, light, name):
    venv = tmp_path / "environment"
    write(venv, {"pyvenv.cfg": f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n", "bin/other": ""})
    (venv / "bin" / "python3").symlink_to(os.path.realpath(sys.executable))
    if name == "python":
        (venv / "bin" / name).symlink_to("python3")
        program = ["-c", "import sys; print(sys.executable, *sys.argv[1:])"]
    else:
        write(venv, {f"bin/{name}": '#!/bin/sh\necho "$0" "$@"\n'})
        (venv / "bin" / name).chmod(0o755)
        program = []
    nowhere = {"PATH": str(tmp_path / "nowhere")}
    code = f"""
        import subprocess, sys
        command = [{str(venv / "bin" / "python3")!r}, *{CONSOLE!r}, "run", {name!r}, *{program!r}]
        command += ["--flag", "two words"]
        sys.exit(subprocess.run(command).returncode)
        """
    write(tmp_path, {"start.py": code})
    done = light("start.py", **nowhere)
    assert (done.returncode, done.stdout) == (0, f"{venv / 'bin' / name} --flag two words\n"), done.stderr


@posix
def test_a_program_on_path_comes_before_the_one_beside_its_python(tmp_path, light):
    write(tmp_path, {"first/python": "#!/bin/sh\necho mine\n"})
    (tmp_path / "first" / "python").chmod(0o755)
    done = light(*CONSOLE, "run", "python", "-c", "print('theirs')", PATH=f"{tmp_path / 'first'}:{os.defpath}")
    assert done.stdout == "mine\n"


def test_the_command_is_declared_and_its_module_is_part_of_the_distribution():
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert '[project.scripts]\nhf-stateless = "hf_stateless_command:main"' in project
    assert '"hf_stateless/run/start.py" = "hf_stateless_command.py"' in project
    assert (PACKAGE / "run" / "start.py").is_file()

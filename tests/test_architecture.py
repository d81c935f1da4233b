"""The house rules that a reader relies on: who may import whom, what stays optional, how long a file may be."""

import ast
import subprocess
import sys

import pytest
from documents import ROOT, read, tracked_files

import hf_stateless


PACKAGE = "hf_stateless"
# A folder imports only from folders to its left; norms and weights do not know each other.
FOLDERS = ["norms", "weights", "update", "ranks", "optimizer", "trainer", "reports", "run"]
STRANGERS = {"norms", "weights"}
OPTIONAL = {"trl", "peft", "bitsandbytes", "matplotlib", "triton"}
LONGEST_FILE = 350

SOURCES = [name for name in tracked_files() if name.startswith(f"{PACKAGE}/") and name.endswith(".py")]
# `__init__` shows the public face, and `integrations` is another path to one file of `run`.
MODULES = [name for name in SOURCES if name.count("/") > 1]


def folder_of(path):
    return path.split("/")[1]


def own_imports(path, tree):
    """The folders that a file imports, at load, in functions, or by name; the package itself counts as `__init__`."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            dotted = [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Call) and last_name(node.func) in {"import_module", "__import__"}:
            dotted = [imported_by_name(node, package)]
        else:
            continue
        for parts in dotted:
            if parts[0] == PACKAGE:
                yield parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "__init__"


def last_name(node):
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)


def imported_by_name(call, package):
    """The parts of the name that `import_module` is called with, which has to stand there, at least its beginning."""
    name = call.args[0]
    if isinstance(name, ast.JoinedStr):
        name = name.values[0]
    assert isinstance(name, ast.Constant), f"cannot tell what {ast.unparse(call)} imports: write the name there"
    level = len(name.value) - len(name.value.lstrip("."))
    base = package[: len(package) - level + 1] if level else []
    return base + [part for part in name.value.split(".") if part]


def private_uses(tree):
    """Private names of transformers that a file imports or reaches through anything imported from there."""
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            bound |= {alias.asname or alias.name for alias in node.names}
            yield from (part for part in node.module.split(".") if is_private(part))
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "transformers":
                    bound.add(alias.asname or "transformers")
                    yield from (part for part in alias.name.split(".") if is_private(part))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and root_name(node.value) in bound:
            yield node.attr
        elif isinstance(node, ast.Call) and root_name(node.func) in {"getattr", "setattr", "hasattr", "delattr"}:
            target, name = node.args[:2]
            if isinstance(name, ast.Constant) and is_private(name.value) and root_name(target) in bound:
                yield name.value


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def root_name(node):
    """`a` for the expression `a.b[0](c).d`."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def imports_at_load(body):
    """Top-level modules imported when the file is loaded: not in functions, not under `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports_at_load(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imports_at_load(ast.iter_child_nodes(node))


def may_import(folder):
    left = set(FOLDERS[: FOLDERS.index(folder) + 1])
    if folder == FOLDERS[-1]:  # it starts scripts in which the package is imported
        return left | {"__init__"}
    return left - STRANGERS | {folder} if folder in STRANGERS else left


@pytest.mark.parametrize("path", MODULES)
def test_folders_import_from_their_left_only(path):
    folder = folder_of(path)
    others = set(own_imports(path, ast.parse(read(path)))) - may_import(folder)
    assert not others, f"{path} imports {sorted(others)}; {folder} may import {sorted(may_import(folder))}"


def test_there_are_these_folders_and_no_others():
    assert {folder_of(path) for path in MODULES} == set(FOLDERS)
    assert [path for path in SOURCES if path not in MODULES] == [
        f"{PACKAGE}/__init__.py",
        f"{PACKAGE}/integrations.py",
    ]


@pytest.mark.parametrize(
    ("path", "source", "folders"),
    [
        ("hf_stateless/trainer/factory.py", "from ..norms import NORMS", ["norms"]),
        ("hf_stateless/trainer/factory.py", "from .. import norms, __version__", ["norms", "__init__"]),
        ("hf_stateless/trainer/factory.py", "import hf_stateless.optimizer.optimizer", ["optimizer"]),
        ("hf_stateless/update/kernels/x.py", "def f():\n    from ...norms.chain import NORMS", ["norms"]),
        ("hf_stateless/trainer/factory.py", "import torch\nfrom transformers import Trainer", []),
        ("hf_stateless/norms/x.py", "import_module('..reports.compare', __package__)", ["reports"]),
        ("hf_stateless/norms/x.py", "importlib.import_module(f'hf_stateless.run.{name}')", ["run"]),
        ("hf_stateless/norms/x.py", "def f():\n    return __import__('hf_stateless')", ["__init__"]),
        ("hf_stateless/norms/x.py", "import_module('torch')", []),
    ],
)
def test_every_form_of_an_own_import_is_seen(path, source, folders):
    assert list(own_imports(path, ast.parse(source))) == folders


def test_an_import_by_a_name_that_cannot_be_read_is_refused():
    with pytest.raises(AssertionError, match="write the name there"):
        list(own_imports("hf_stateless/norms/x.py", ast.parse("import_module(name)")))


@pytest.mark.parametrize("path", SOURCES)
def test_one_file_touches_private_parts_of_transformers(path):
    uses = set(private_uses(ast.parse(read(path))))
    assert not uses or path == f"{PACKAGE}/trainer/names.py", f"{path} uses {sorted(uses)} of transformers"


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("from transformers.trainer_optimizer import _HANDLERS as h", ["_HANDLERS"]),
        ("import transformers\ntransformers.trainer._inner()", ["_inner"]),
        ("from transformers import Trainer\ngetattr(Trainer, '_inner')", ["_inner"]),
        ("from transformers import Trainer\nTrainer.__name__; Trainer.train", []),
        ("import torch\ntorch._foreach_mul_", []),
    ],
)
def test_every_private_use_is_seen(source, uses):
    assert list(private_uses(ast.parse(source))) == uses


# Files of kernels are themselves imported where they are used only: Triton's decorators run when a file is loaded.
@pytest.mark.parametrize("path", [path for path in SOURCES if "/kernels/triton_" not in path])
def test_optional_packages_are_imported_where_they_are_used(path):
    at_load = OPTIONAL & set(imports_at_load(ast.parse(read(path)).body))
    assert not at_load, f"{path} imports {sorted(at_load)} at load; import it inside the function that needs it"


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_loads_no_optional_package():
    # transformers loads some of them on its own account; what counts is what comes on top.
    loaded = f"{OPTIONAL!r} & set(sys.modules)"
    code = f"import sys, transformers.trainer; before = {loaded}; import {PACKAGE}; print(*({loaded}) - before)"
    assert run_python(code) == []


def test_the_package_imports_where_optional_packages_are_missing():
    hide = f"import sys; sys.modules.update(dict.fromkeys({sorted(OPTIONAL)!r}))"
    assert run_python(f"{hide}; import {PACKAGE}; print({PACKAGE}.__version__)") == [hf_stateless.__version__]


def test_no_file_is_a_drawer_for_everything():
    assert [name for name in tracked_files() if "utils" in name.rsplit("/", 1)[-1].lower()] == []


@pytest.mark.parametrize("name", hf_stateless.__all__)
def test_every_public_function_and_class_shows_an_example(name):
    public = getattr(hf_stateless, name)
    assert not callable(public) or ">>>" in (public.__doc__ or ""), f"the docstring of {name} has no >>> example"


@pytest.mark.parametrize("path", SOURCES)
def test_no_file_of_the_package_is_too_long(path):
    assert len(read(path).splitlines()) <= LONGEST_FILE

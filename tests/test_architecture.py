"""The house rules that a reader relies on: who may import whom, what stays optional, how long a file may be."""

import ast
import importlib
import re
import subprocess
import sys

import pytest
from documents import ROOT, read, tracked_files
from private_parts import PRIVATE_PARTS

import hf_stateless


PACKAGE = "hf_stateless"
# A folder imports only from folders to its left; norms and weights do not know each other.
FOLDERS = ["norms", "weights", "update", "ranks", "optimizer", "trainer", "reports", "run"]
STRANGERS = {"norms", "weights"}
OPTIONAL = {"trl", "peft", "bitsandbytes", "matplotlib", "triton", "kernels"}
UPSTREAMS = OPTIONAL | {"torch", "transformers", "accelerate", "huggingface_hub", "datasets", "axolotl", "safetensors"}
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


def is_private(name):
    return isinstance(name, str) and len(name.strip("_")) > 0 and name.startswith("_") and not name.endswith("__")


def root_name(node):
    """`a` for the expression `a.b[0](c).d`."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def own_names(tree):
    """What a file defines: a private attribute of one of these names is our own, whatever object it is read from."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and root_name(node) == "self":
            yield node.attr


def bound_names(tree):
    """The names that a file has for what it imports from other packages, each with where it comes from."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in UPSTREAMS:
            bound |= {alias.asname or alias.name: f"{node.module}:{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.split(".")[0]
                if package in UPSTREAMS:
                    bound[alias.asname or package] = alias.name if alias.asname else package
    return bound


def private_uses(source, own=frozenset()):
    """What a file uses of other packages without their promise: private names, and public ones that it replaces.

    Imported, reached from something that was imported, read from any object, overridden, named to `getattr`; imported
    against the list of what a package exports; assigned to; or called as a method without an object.
    """
    tree = ast.parse(source)
    bound, lines = bound_names(tree), source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in UPSTREAMS:
            not_exported = "attr-defined" in lines[node.lineno - 1]
            yield from (part for part in node.module.split(".") if is_private(part))
            yield from (alias.name for alias in node.names if is_private(alias.name) or not_exported)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in UPSTREAMS]
            yield from (part for name in names for part in name.split(".") if is_private(part))
        elif isinstance(node, ast.Attribute):
            of_upstream = root_name(node) in bound
            private = is_private(node.attr) and (of_upstream or node.attr not in own)
            if private or (of_upstream and isinstance(node.ctx, ast.Store) and not reads_a_result(node)):
                yield node.attr
        elif isinstance(node, ast.ClassDef):
            yield from overridden(node, bound)
        elif isinstance(node, ast.Call):
            yield from used_by_call(node, bound, own)


def reads_a_result(node):
    """Tell `f(x).attribute` and `a[0].attribute`, which are new objects, from `module.attribute`."""
    return any(isinstance(inner, (ast.Call, ast.Subscript)) for inner in ast.walk(node))


def used_by_call(node, bound, own):
    """Names that are given to `getattr` and its like; methods of imported classes that are called on None."""
    values = [arg.value if isinstance(arg, ast.Constant) else ... for arg in node.args[:2]]
    if last_name(node.func) in {"getattr", "setattr", "hasattr", "delattr"} and len(values) == 2:
        if is_private(values[1]) and (root_name(node.args[0]) in bound or values[1] not in own):
            yield values[1]
    elif values[:1] == [None] and (root_name(node.func) or "")[:1].isupper() and root_name(node.func) in bound:
        yield last_name(node.func)


def overridden(node, bound):
    """Private methods and attributes of a class of another package that a class of ours has too."""
    for base in node.bases:
        if root_name(base) not in bound:
            continue
        found = look_up(bound[root_name(base)] + ast.unparse(base).removeprefix(root_name(base)))
        yield from sorted(name for name in set(own_names(node)) if is_private(name) and hasattr(found, name))


def look_up(part):
    """The object at `module:attribute`; an AttributeError or ImportError names what is not there."""
    module, _, path = part.partition(":")
    if not path:  # `torch.optim.Optimizer`, of which nobody says where the module ends
        module, path = part.split(".", 1) if "." in part else (part, "")
    found = importlib.import_module(module)
    for attribute in path.split(".") if path else ():
        found = getattr(found, attribute)
    return found


def written_names(tree):
    """All identifiers and texts of a file, docstrings and comments left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.alias, ast.FunctionDef)):
            yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            yield from node.value.split(".")


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


def names_of(row):
    """What stands in our files for a row: its private names, or its last name where none is private."""
    parts = re.split(r"[.:]", row.part.rpartition("#")[2])
    return {part for part in parts if is_private(part)} or {parts[-1]}


def rows_of(path):
    return [row for row in PRIVATE_PARTS if path.removeprefix(f"{PACKAGE}/") in row.used_by]


@pytest.mark.parametrize("path", SOURCES)
def test_every_private_use_of_another_package_is_listed(path):
    source = read(path)
    uses = set(private_uses(source, set(own_names(ast.parse(source)))))
    listed = {name for row in rows_of(path) for name in names_of(row)}
    assert uses <= listed, f"{path} uses {sorted(uses - listed)}: add a row to tests/private_parts.py"


@pytest.mark.parametrize("row", PRIVATE_PARTS, ids=lambda row: row.part)
def test_every_private_part_that_is_listed_is_used(row):
    for name in row.used_by:
        path = f"{PACKAGE}/{name}"
        assert path in SOURCES, f"{row.part}: there is no {path}; correct the row, or delete it"
        written = set(written_names(ast.parse(read(path))))
        assert names_of(row) <= written, f"{path} does not use {row.part} any more; correct the row, or delete it"


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("from transformers.trainer_optimizer import _HANDLERS as h", ["_HANDLERS"]),
        ("import transformers\ntransformers.trainer._inner()", ["_inner"]),
        ("from transformers import Trainer\ngetattr(Trainer, '_inner')", ["_inner"]),
        ("from transformers import Trainer\nTrainer.__name__; Trainer.train", []),
        ("import torch\ntorch._foreach_mul_", ["_foreach_mul_"]),
        ("import torch.nn.functional as F\nF._in_projection", ["_in_projection"]),
        ("from torch._subclasses.fake_tensor import FakeTensor", ["_subclasses"]),
        ("import torch._dynamo", ["_dynamo"]),
        ("def f():\n    from accelerate import _inner", ["_inner"]),
        ("from peft.tuners import _inner\nimport trl._inner", ["_inner", "_inner"]),
        ("from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]", ["yaml_dump"]),
        ("from huggingface_hub import ModelCard", []),
        ("def f(storage):\n    return storage.untyped()._cdata", ["_cdata"]),
        ("def f(p):\n    return getattr(p, '_ddp_ignored', False), hasattr(p, 'grad')", ["_ddp_ignored"]),
        ("def f(updates):\n    return updates._ours", []),
        ("from accelerate import Accelerator\nAccelerator.clip = None", ["clip"]),
        ("import torch\ntorch.zeros(2).grad = None; p = torch.zeros(2); p.grad = None", []),
        (
            "from transformers import Trainer\nTrainer.get_decay_parameter_names(None, 1)",
            ["get_decay_parameter_names"],
        ),
        ("import torch\ntorch.zeros(None)", []),
        ("import torch\nclass A(torch.nn.Module):\n    def _apply(self): ...\n    def _ours(self): ...", ["_apply"]),
        ("from torch import nn\nclass A(nn.Module):\n    _ours = 1", []),
        ("import os\nos._exit", ["_exit"]),
    ],
)
def test_every_private_use_is_seen(source, uses):
    assert list(private_uses(source, {"_ours"})) == uses


# Files of kernels are themselves imported where they are used only: Triton's decorators run when a file is loaded.
@pytest.mark.parametrize("path", [path for path in SOURCES if "/kernels/triton_" not in path])
def test_optional_packages_are_imported_where_they_are_used(path):
    at_load = OPTIONAL & set(imports_at_load(ast.parse(read(path)).body))
    assert not at_load, f"{path} imports {sorted(at_load)} at load; import it inside the function that needs it"


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_registers_names_and_loads_what_uses_them_later():
    code = f"import sys, {PACKAGE}; print(*(name for name in sys.modules if name.startswith('{PACKAGE}.')))"
    loaded = run_python(code)
    assert {f"{PACKAGE}.trainer.names", f"{PACKAGE}.weights.int8.hf_quantizer"} <= set(loaded)
    late = ("reports", "run", "trainer.factory", "trainer.handler", "optimizer.optimizer", "update.kernels")
    assert [name for name in loaded if name.startswith(tuple(f"{PACKAGE}.{part}" for part in late))] == []


def test_the_public_face_is_whole_before_anything_is_loaded():
    names = f"set({PACKAGE}.__all__)"
    listed = f"import {PACKAGE}; print(*{names} - set(dir({PACKAGE})))"
    assert run_python(f"{listed}; from {PACKAGE} import *; print(*{names} - globals().keys())") == []
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = hf_stateless.no_such_name


def test_each_public_name_is_found_in_one_way():
    assert {*hf_stateless._PLACES, "Int8TrainingConfig", "dequantize", "quantize"} == set(hf_stateless.__all__)
    assert all(getattr(hf_stateless, name).__name__ == name for name in hf_stateless.__all__ if name.islower())


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

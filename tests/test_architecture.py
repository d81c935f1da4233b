"""The house rules that a reader relies on: who may import whom, what stays optional, how long a room may be."""

import ast
import subprocess
import sys

import pytest
from documents import ROOT, read, tracked_files

import hf_stateless


PACKAGE = "hf_stateless"
# Each room may import the rooms above it; `__init__` may import all of them.
ROOMS = [
    "command_line",
    "batching",
    "rounding",
    "int8",
    "whitening",
    "norms",
    "sinkhorn",
    "multi_norm",
    "presets",
    "width",
    "options",
    "adamw",
    "algorithms",
    "kernels",
    "update_rules",
    "sharding",
    "group_keys",
    "momentum",
    "sharded_sinkhorn",
    "owners",
    "matrix_update",
    "distributed",
    "lora",
    "averaging",
    "layerwise",
    "checkpoint",
    "signal_guard",
    "skipped",
    "optimizer",
    "adapters",
    "partition",
    "registration",
    "factory",
    "lora_factory",
    "memory",
    "report",
    "compare",
    "export",
    "hub",
    "callbacks",
    "integrations",
    "run",
    "autoload",
    "cli",
]
OPTIONAL = {"trl", "peft", "bitsandbytes", "matplotlib", "triton"}
LONGEST_FILE = 350

SOURCES = [name for name in tracked_files() if name.startswith(f"{PACKAGE}/") and name.endswith(".py")]
MODULES = [name for name in SOURCES if name != f"{PACKAGE}/__init__.py"]


def room_of(path):
    """`hf_stateless/norms.py` and every file below `hf_stateless/norms/` belong to the room `norms`."""
    return path.split("/")[1].removesuffix(".py")


def own_imports(path, tree):
    """The rooms that a file imports; a name taken from the package itself counts as the room `__init__`."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            dotted = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for parts in dotted:
            if parts[0] == PACKAGE:
                yield parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"


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


@pytest.mark.parametrize("path", MODULES)
def test_rooms_import_downwards_only(path):
    room = room_of(path)
    assert room in ROOMS, f"{path} is in no known room: give '{room}' its place in ROOMS of {__file__}"
    allowed = {*ROOMS[: ROOMS.index(room)], room}
    upwards = set(own_imports(path, ast.parse(read(path)))) - allowed
    assert not upwards, f"{path} imports {sorted(upwards)}; it may import {sorted(allowed)}"


@pytest.mark.parametrize(
    ("path", "source", "rooms"),
    [
        ("hf_stateless/factory.py", "from .norms import NORMS", ["norms"]),
        ("hf_stateless/factory.py", "from . import norms, __version__", ["norms", "__init__"]),
        ("hf_stateless/factory.py", "import hf_stateless.optimizer", ["optimizer"]),
        ("hf_stateless/kernels/fused.py", "def f():\n    from ..norms import NORMS", ["norms"]),
        ("hf_stateless/factory.py", "import torch\nfrom transformers import Trainer", []),
    ],
)
def test_every_form_of_an_own_import_is_seen(path, source, rooms):
    assert list(own_imports(path, ast.parse(source))) == rooms


@pytest.mark.parametrize("path", SOURCES)
def test_only_registration_touches_private_parts_of_transformers(path):
    uses = set(private_uses(ast.parse(read(path))))
    assert not uses or room_of(path) == "registration", f"{path} uses {sorted(uses)} of transformers"


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

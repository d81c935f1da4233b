"""Puts the kernels of this package in the layout that `kernels` loads, from the Hub or from a folder.

python recipes/hub_kernel/build.py sinkgd-kernel
hf upload --repo-type kernel YOU/sinkgd sinkgd-kernel . --revision v1

No code stands here twice: the files that `hf_stateless.update.kernels` needs are found by their imports and copied.
"""

import argparse
import ast
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path


VARIANT = "build/torch-universal"
START = "update/kernels/__init__.py", "update/kernels/choice.py", "update/kernels/cpu_sinkgd.c"
# Loaded by name or in a function: Triton's decorators run when a file is loaded.
START += "update/kernels/triton_sinkgd.py", "update/kernels/triton_int8.py", "update/kernels/triton_arithmetic.py"
# Each needs the answer of `choose` to be without a loop: the copy decides alone.
FACE = '''"""SinkGD updates of many matrices at once: Triton on CUDA, C on CPU. Copied out of hf_stateless {version}.

    from kernels import get_kernel
    sinkgd = get_kernel("OWNER/NAME", version=1)
    done = sinkgd.update_(weights, grads, step_size=1e-3)

`update_` changes weights of one shape in place, W <- decay W - step_size diag(r) G diag(c), stored as (out, in), and
returns for each whether its gradient was finite; None for a weight that was left alone; None for all where no kernel
takes them. Rounding is to nearest.
"""

import torch

from .norms.chain import Chain
from .update.kernels.choice import choose_here as choose
from .update.layout import LAYOUTS

__all__ = ["choose", "update_"]


@torch.no_grad()
def update_(weights, grads, *, step_size, decay=1.0, num_iterations=5):
    """Update weights in place by their gradients."""
    chain, layout = Chain(num_iterations=num_iterations), LAYOUTS["out_in"]
    kernel = choose(weights, grads, chain, layout)
    if kernel is None:
        return None
    options = {{"step_size": step_size, "decay": decay, "layout": layout, "num_iterations": num_iterations}}
    return kernel(weights, grads, None, **options)
'''


def needed(package: Path, start: tuple[str, ...]) -> list[str]:
    """Return the files that some files of a package import, themselves and the `__init__.py` above them included."""
    found, todo = set(), list(start)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        if name.endswith(".py"):
            todo += _imports(package, name)
        above = Path(name).parent
        while above != Path("."):
            todo.append(f"{above.as_posix()}/__init__.py")
            above = above.parent
    return sorted(found)


def _imports(package: Path, name: str) -> list[str]:
    """Return the files of the package that a file imports, also inside its functions."""
    files = []
    for node in ast.walk(ast.parse((package / name).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = Path(name).parents[node.level - 1] / (node.module or "").replace(".", "/")
        for module in (base, *(base / alias.name for alias in node.names)):
            for file in (f"{module.as_posix()}.py", f"{module.as_posix()}/__init__.py"):
                if (package / file).is_file():
                    files.append(file)
    return files


def build(output: Path, name: str = "sinkgd", version: int = 1) -> Path:
    """Write the folder of a kernel and return it.

    Args:
        output: a folder that is not there yet.
        name: of the kernel.
        version: a whole number, which names the branch `v1` on the Hub.

    Raises:
        FileExistsError: there is such a folder.
    """
    package = Path(find_spec("hf_stateless").submodule_search_locations[0])
    import hf_stateless

    variant = output / VARIANT
    variant.mkdir(parents=True)
    for file in needed(package, START):
        (variant / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package / file, variant / file)
    (variant / "__init__.py").write_text(FACE.format(version=hf_stateless.__version__), encoding="utf-8")
    metadata = {"id": f"_{name}_hf_stateless_v{version}", "name": name, "version": version, "license": "Apache-2.0"}
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    card = "---\nlibrary_name: kernels\nlicense: apache-2.0\ntags:\n- kernels\n---\n\n# SinkGD\n\n"
    origin = f"Made from the sources of hf_stateless {hf_stateless.__version__} by its `recipes/hub_kernel`.\n"
    (output / "README.md").write_text(card + origin)
    return output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument("--version", type=int, default=1)
    args = parser.parse_args()
    if args.output.exists():
        print(f"build.py: error: got {args.output}, which is there already; expected a new folder", file=sys.stderr)
        return 2
    print(build(args.output, version=args.version))
    return 0


if __name__ == "__main__":
    sys.exit(main())

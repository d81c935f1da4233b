"""Train many tiny models, and tell whether two versions of hf_stateless give them the same weights, to the bit.

    python tests/compat/bits.py write OLD          # before a change: train every case, keep weights and states
    python tests/compat/bits.py write NEW          # after it
    python tests/compat/bits.py compare OLD NEW    # exit code 1 if a case differs
    python tests/compat/bits.py resume OLD AGAIN   # go on from the states of OLD, and compare with its last weights

The package is the one that `import hf_stateless` finds, so set PYTHONPATH to its checkout. Only its public names are
used. Bits depend on the processor and on torch, so both folders have to come from one machine and one environment.
Every case runs in a process of its own, forked from this one; cases on two ranks in two.
"""

import argparse
import json
import logging
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from bits_cases import CASES
from bits_models import TWO_RANKS, Case
from bits_runs import ranks_of, run_case
from torch import Tensor

import hf_stateless


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what nested dictionaries and lists hold, with its place."""
    if isinstance(value, dict | list | tuple):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def difference(old: Any, new: Any) -> str:
    """Say where two nested values first differ, an empty string if they are equal to the bit."""
    olds, news = dict(leaves(old)), dict(leaves(new))
    if olds.keys() != news.keys():
        return f"names differ: {', '.join(sorted(olds.keys() ^ news.keys())[:4])}"
    worst, most = "", -1.0
    for name, a in olds.items():
        b = news[name]
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            if a != b:
                return f"{name}: {a!r} became {b!r}"
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name}: {a.dtype} {tuple(a.shape)} became {b.dtype} {tuple(b.shape)}"
        elif not torch.equal(bits(a), bits(b)):
            apart = float((a.double() - b.double()).abs().nan_to_num(nan=float("inf")).max())
            worst, most = (name, apart) if apart > most else (worst, most)
    return f"{worst}: max abs difference {most:.3g}" if worst else ""


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, of which NaN has some too."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def compare_case(case: Case, old: Path, new: Path, parts: tuple[str, ...]) -> list[str]:
    """Return what differs between the results of a case; nothing if they are equal."""
    found = []
    for rank in ranks_of(case):
        paths = [folder / case.name / f"{rank}.pt" for folder in (old, new)]
        missing = [path for path in paths if not path.exists()]
        if missing:
            return [f"missing: {', '.join(map(str, missing))}"]
        a, b = (torch.load(path, weights_only=True) for path in paths)
        if a.get("error") != b.get("error"):
            return [f"rank {rank}: error {a.get('error')!r} became {b.get('error')!r}"]
        if "error" in a:
            print(f"{case.name} raised in both: {a['error']}")
        found += [f"rank {rank}, {part}: {text}" for part in parts if (text := difference(a.get(part), b.get(part)))]
    return found


def write(cases: list[Case], folder: Path, old: Path | None = None) -> None:
    """Run cases one after the other, and print what raised."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").write_text(json.dumps(about(), indent=1))
    print(f"hf_stateless of {Path(hf_stateless.__file__).parent}", flush=True)
    start, raised = time.monotonic(), 0
    for number, case in enumerate(cases, 1):
        began = time.monotonic()
        run_case(case, folder, old)
        errors = [torch.load(folder / case.name / f"{rank}.pt").get("error") for rank in ranks_of(case)]
        raised += any(errors)
        spent = time.monotonic() - began
        print(f"{number:>4}/{len(cases)} {case.name:<36}{spent:>6.1f} s  {next(filter(None, errors), '')}", flush=True)
    print(f"{len(cases)} cases in {time.monotonic() - start:.0f} s, {raised} raised: {folder}", flush=True)


def compare(cases: list[Case], old: Path, new: Path, parts: tuple[str, ...]) -> int:
    """Print a table of cases and what differs; return 1 if anything does."""
    environments = [json.loads((folder / "about.json").read_text()) for folder in (old, new)]
    for key, value in environments[0].items():
        if key != "package" and value != environments[1].get(key):
            print(f"The folders differ in {key}: {value!r} and {environments[1].get(key)!r}, which may change bits.")
    wrong = 0
    for case in cases:
        found = compare_case(case, old, new, parts)
        wrong += bool(found)
        print(f"{case.name:<36}{'DIFFERS' if found else 'equal':<10}{'; '.join(found)}")
    print(f"{len(cases) - wrong} of {len(cases)} cases are equal to the bit in {', '.join(parts)}.")
    return int(wrong > 0)


def about() -> dict[str, str]:
    """Return what bits depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    packages = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")
    here = {"package": str(Path(hf_stateless.__file__).parent), "python": platform.python_version()}
    capability = torch.backends.cpu.get_cpu_capability()
    return {**here, "processor": f"{processor}, {capability}", **{name: version(name) for name in packages}}


def chosen(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that the command line asks for."""
    cases = [case for case in CASES if arguments.only in case.name]
    cases = [case for case in cases if case.way not in TWO_RANKS or not arguments.skip_ranks]
    if arguments.command == "resume":  # where nothing is trained there is nothing to resume
        cases = [case for case in cases if case.way not in ("function", "quantized")]
    if not cases:
        sys.exit(f"No case has {arguments.only!r} in its name.")
    return cases


def main() -> int:
    """Run the command, and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, folders in {"write": ["folder"], "compare": ["old", "new"], "resume": ["old", "new"]}.items():
        command = commands.add_parser(name)
        for folder in folders:
            command.add_argument(folder, type=lambda text: Path(text).resolve())
        command.add_argument("--only", default="", help="cases whose name contains this")
        command.add_argument("--skip-ranks", action="store_true", help="leave out cases on two ranks")
        if name == "compare":
            command.add_argument("--state", action="store_true", help="compare the optimizer's saved state as well")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    cases = chosen(arguments)
    if arguments.command == "compare":
        parts = ("middle", "final", *(["state"] if arguments.state else []))
        return compare(cases, arguments.old, arguments.new, parts)
    if arguments.command == "write":
        write(cases, arguments.folder)
        return 0
    if arguments.old == arguments.new:
        sys.exit("The folder for what is resumed has to be another one.")
    write(cases, arguments.new, arguments.old)
    return compare(cases, arguments.old, arguments.new, ("final",))


if __name__ == "__main__":
    sys.exit(main())

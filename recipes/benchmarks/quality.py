"""Held-out loss of one small LLaMA under many optimizers, each at its own best learning rate.

    python recipes/benchmarks/quality.py --study small --rows "swan, rest 32/4/16x" "muon, rest 32/4/16x" --seeds 0 1 2
    python recipes/benchmarks/quality.py --study "largest, english" --train_files "corpus/*.jsonl" --rows adamw
    python recipes/benchmarks/quality.py --report recipes/benchmarks/results/quality-cpu.json
    python recipes/benchmarks/quality.py --restore recipes/benchmarks/results/quality-cpu.json --study long --rows swan

Every run goes through the Trainer: same data order and initialisation per seed, cosine schedule to a tenth after 10 %
warm-up, fitted to the number of steps (neither in rows "constant rate"), float32 weights with bf16 autocast. Rates are
picked on one half of the held-out text at the end (`pick_loss`); what is reported is the loss of the other half
(`eval_loss`). The learning rate walks in factors of two from the row's start until the best one has a worse neighbour
on both sides and at least `--rates` were tried; the walk is done on the first seed, and the `--repeat` best rates with
the others. Rows whose matrices have a rate of their own update the rest at multiples of REST_RATE.

Each run is a JSON file in `--runs`, named by its configuration: what is there is not run again. Several processes may
work on different rows. `--report` gathers the files and prints the tables, `--restore` lays the files of a report out
again, so that its runs need not be repeated; studies and rows are in quality_plan.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import quality_families
import torch
from quality_plan import REST_RATE, ROWS, SCHEDULE, STUDIES, Beside, Row, Study
from quality_report import curves, document
from rate_walk import nearest, walk
from result_files import versions
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_stateless.reports.files import write_text


sys.path.insert(0, str(Path(__file__).parent.parent))

from pretraining_data import load_blocks
from pretraining_text import NOT_TEXT, DataArguments, standard_library_files


EVAL_TOKENS = 65_536
_BLOCKS: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}


def installed_sources(most: int = 120 << 20) -> list[str]:
    """Return the .py files of the standard library and of installed packages up to some bytes, in a fixed order."""
    root = Path(sysconfig.get_path("purelib"))
    packages = sorted(file for file in root.rglob("*.py") if NOT_TEXT.isdisjoint(file.relative_to(root).parts))
    files, size = standard_library_files(), 0
    for file in packages:
        size += file.stat().st_size
        if size > most:
            break
        files.append(str(file))
    return files


def text_blocks(study: Study, args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return train and held-out blocks and the tokenizer, made once per process."""
    key = (study.text, study.vocab, study.block)
    if key not in _BLOCKS:
        files = installed_sources() if study.text == "packages" else None
        files = args.train_files if study.text == "english" else files
        data = DataArguments(
            train_files=files, vocab_size=study.vocab, block_size=study.block, max_eval_tokens=EVAL_TOKENS
        )
        _BLOCKS[key] = load_blocks(data, study.vocab)
    return _BLOCKS[key]


def make_model(study: Study, vocab: int, seed: int) -> PreTrainedModel:
    """Return the model of a study with random weights of the seed."""
    set_seed(seed)
    heads = max(1, study.hidden // 32)
    sizes = {"hidden_size": study.hidden, "intermediate_size": study.intermediate, "num_hidden_layers": study.layers}
    config = LlamaConfig(
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=study.block,
        tie_word_embeddings=study.tied,
        # Torch's fused attention takes a third of a step on a CPU: its backward pass in bf16 is slow there.
        attn_implementation="sdpa" if torch.cuda.is_available() else "eager",
    )
    return LlamaForCausalLM(config)


class Progress(TrainerCallback):
    """One line that is written over, so that a run of minutes is seen to go on."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}) and sys.stderr.isatty():
            print(f"\r  step {state.global_step}/{state.max_steps} loss {logs['loss']}   ", end="", file=sys.stderr)


def training_arguments(row: Row, lr: float, study: Study, seed: int, args: argparse.Namespace) -> TrainingArguments:
    """Return the Trainer's arguments of one run."""
    own = dict(row.training)
    if row.optim in ("galore_adamw", "apollo_adamw"):
        own["optim_target_modules"] = "all-linear"
    return TrainingArguments(
        output_dir="runs/quality-scratch",
        optim=row.optim or "adamw_torch",
        optim_args=row.arguments() or None,
        learning_rate=lr,
        max_steps=study.steps,
        per_device_train_batch_size=study.sequences,
        per_device_eval_batch_size=study.sequences,  # one shape for the compiler
        seed=seed,
        save_strategy="no",
        logging_steps=max(1, study.steps // 20),
        report_to="none",
        bf16=True,
        torch_compile=args.compile,
        prediction_loss_only=True,
        use_cpu=args.device == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **{**dict(SCHEDULE), "weight_decay": 0.0, **own},
    )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the tensors that an optimizer keeps."""
    inner = getattr(optimizer, "optimizer", optimizer)
    tensors = inner.tensors() if isinstance(inner, Beside) else [t for s in inner.state.values() for t in s.values()]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def run(name: str, lr: float, seed: int, study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the held-out loss with what was run."""
    torch.compiler.reset()  # else the compiler gives up after some runs of a process, and the others are slower
    row = ROWS[name]
    rest_rate = row.rest * REST_RATE if row.apart else None
    train, held_out, tokenizer = text_blocks(study, args)
    model = make_model(study, len(tokenizer), seed)
    factory = None if row.factory is None else (row.factory, {"lr": lr, "rest_rate": rest_rate, "kinds": row.kinds})
    trainer = Trainer(
        model=model,
        args=training_arguments(row, lr, study, seed, args),
        train_dataset=train,
        data_collator=default_data_collator,
        optimizer_cls_and_kwargs=factory,
        callbacks=[Progress()],
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    half = len(held_out) // 2
    halves = held_out.select(range(half)), held_out.select(range(half, len(held_out)))
    losses = [trainer.evaluate(blocks)["eval_loss"] for blocks in halves]
    pick_loss, loss = [value if math.isfinite(value) else None for value in losses]
    history = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {
        **configuration(name, lr, seed, study),
        "rest_rate": rest_rate,
        "pick_loss": pick_loss,
        "eval_loss": loss,
        "train_losses": [(step, round(value, 4)) for step, value in history if math.isfinite(value)],
        "parameters": model.num_parameters(),
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "state_bytes": state_bytes(trainer.optimizer),
        "seconds": round(seconds, 1),
    }


def configuration(row: str, lr: float, seed: int, study: Study) -> dict[str, Any]:
    """Return what names a run; everything that changes its result is in it."""
    return {**study.values(), "row": row, "learning_rate": lr, "seed": seed}


def file_of(record: dict[str, Any], runs: Path) -> Path:
    """Return the file of a run: readable, and apart from every other configuration."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]
    words = "".join(c if c.isalnum() else "-" for c in record["row"]).strip("-")
    return runs / f"{words}_{record['learning_rate']:.3g}_{record['seed']}_{digest}.json"


def cached(row: str, lr: float, seed: int, study: Study, args: argparse.Namespace) -> float:
    """Return the held-out loss of a run, from its file or by training; infinite where it diverged."""
    file = file_of(configuration(row, lr, seed, study), args.runs)
    if not file.is_file():
        write_text(file, json.dumps(run(row, lr, seed, study, args)) + "\n")
    record = json.loads(file.read_text())
    losses = record.get("pick_loss", record["eval_loss"]), record["eval_loss"]  # earlier runs have one
    pick, loss = [math.inf if value is None else float(value) for value in losses]
    ends = f"loss {loss:.4f}, to pick by {pick:.4f}, {record['seconds']:.0f} s"
    print(f"{args.study}: {row}: lr {lr:.2e} seed {seed}: {ends}", flush=True)
    return pick


def read_runs(runs: Path) -> list[dict[str, Any]]:
    """Return the records of all runs in a folder."""
    return [json.loads(file.read_text()) for file in sorted(runs.glob("*.json"))]


def sweep(row: str, study: Study, args: argparse.Namespace) -> None:
    """Walk over the learning rates of a row with the first seed, and repeat the best ones with the others."""
    first, *others = args.seeds

    def loss(k: int, seed: int = first) -> float:
        return cached(row, ROWS[row].start * 2.0**k, seed, study, args)

    losses = walk(loss, args.rates) if args.factors is None else {k: loss(k) for k in args.factors}
    for seed in others:
        for k in nearest(losses, args.repeat):
            loss(k, seed)


def restore(source: Path, runs: Path) -> None:
    """Write the runs that a report gathered as files again; a file that is there stays."""
    named = configuration("", 0.0, 0, Study())
    for record in json.loads(source.read_text())["records"]:
        file = file_of({key: record.get(key, value) for key, value in named.items()}, runs)
        if not file.is_file():
            write_text(file, json.dumps(record) + "\n")


def setup() -> dict[str, Any]:
    """Return versions and device, for the file of results."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
        **versions(),
    }


def report(output: Path, runs: Path, picture: Path | None) -> None:
    """Gather the files of the runs into one, if there are any, print the tables and write them beside it."""
    records = read_runs(runs)
    if records:
        lines = ",\n".join(json.dumps(record) for record in records)
        write_text(output, f'{{"setup": {json.dumps(setup())},\n"records": [\n{lines}\n]}}\n')
    records = json.loads(output.read_text())["records"]
    # Runs of before have nothing to pick by.
    text = quality_families.document(records) if "pick_loss" in records[0] else document(records)
    print(text)
    write_text(output.with_suffix(".md"), text)
    if picture:
        curves(records, picture)


def main() -> None:
    """Parse the command line; sweep the rows or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="small")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=int, default=5, help="least number of learning rates of a row")
    parser.add_argument("--repeat", type=int, default=1, help="rates that are repeated with the other seeds")
    parser.add_argument("--factors", type=int, nargs="+", help="these exponents of two instead of a walk")
    parser.add_argument("--train_files", nargs="+", help="text files of the English studies")
    parser.add_argument("--threads", type=int, help="threads of torch on CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of the runs' JSON files")
    parser.add_argument("--restore", type=Path, help="count the runs in this file of --report as done")
    parser.add_argument("--report", type=Path, help="gather the runs into this file and print the tables")
    parser.add_argument("--plot", type=Path, help="with --report: draw the losses against tokens, time and memory")
    args = parser.parse_args()
    if args.restore:
        restore(args.restore, args.runs)
    if args.report:
        report(args.report, args.runs, args.plot)
        return
    if STUDIES[args.study].text == "english" and not args.train_files:
        parser.error(f"--study {args.study!r} trains on English: give its text by --train_files 'corpus/*.jsonl'")
    if args.threads:
        torch.set_num_threads(args.threads)
    for row in args.rows:
        sweep(row, STUDIES[args.study], args)


if __name__ == "__main__":
    main()

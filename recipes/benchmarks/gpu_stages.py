"""The stages of `gpu.py`, in the order of their worth: what each runs on a GPU, and how it is rehearsed on CPU."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One measurement: a command with its time limit.

    In words, `{out}` is the folder of results, `{file}` the file of this stage in it, `{work}` the folder of what is
    not kept, `{slug}` what its files are called, `{root}` the checkout, `{model}` the model that is fine-tuned.
    """

    name: str
    kind: str
    """The table of the report in which its figures stand."""
    script: str
    """Below the root, or a module after `-m`."""
    words: str
    """What the command has both on a GPU and in a rehearsal."""
    full: str
    tiny: str
    """What stands in the place of `full` in a rehearsal."""
    limit: int
    """Seconds after which it is stopped."""
    least: int
    """Seconds that have to be left for it to begin."""
    needs: tuple[str, ...] = ()
    """Packages without which it cannot be run."""

    @property
    def slug(self) -> str:
        """What its files are called."""
        return re.sub(r"\W+", "-", self.name.lower()).strip("-")

    def command(self, rehearse: bool) -> str:
        """Return what is run, with its names of places: equal wherever it is run."""
        return " ".join(filter(None, [self.script, self.words, self.tiny if rehearse else self.full]))


BENCHMARKS = "{root}/recipes/benchmarks"
# The optimizers that the issue of a step's cost is about; a row whose package is missing is left out by the script.
STEPS = (
    '"AdamW (fused)" "AdamW (foreach)" "AdamW8bit (bitsandbytes)" "Muon (torch)" "SinkSGD_adv (adv_optm)" sinkgd '
    '"sinkgd, L=1" "sinkgd, torch" swan sinkgd_polar "swan, newton_schulz, float16"'
)
MEMORY = (
    '"AdamW (fused)" "AdamW8bit (bitsandbytes)" swan sinkgd "swan_layerwise, release=all" '
    '"sinkgd_layerwise, release=all" "sinkgd_layerwise, int8, stateless"'
)
TINY_STEPS = "--models 60m --layers 1 --rounds 2 --rows sinkgd sinkgd_polar"
COMPARED = ("adamw, rates apart", "swan", "muon", "sinkgd 1, polar 1", "sinkgd")
TINY_QUALITY = "--study rehearsal --runs {out}/quality-runs/rehearsal --train_files {work}/text.txt --no-compile"
TINY_QUALITY += " --factors 0 --threads 1 --rows adamw"


def step_time(models: str, layers: int, limit: int) -> Stage:
    """Return the stage of the time of steps."""
    full = f"--models {models} --layers {layers} --rows {STEPS}"
    return Stage(
        f"step time, {models}",
        "step time",
        f"{BENCHMARKS}/step_time.py",
        "--output {file}",
        full,
        TINY_STEPS,
        limit,
        40,
    )


def memory(model: str, limit: int) -> Stage:
    """Return the stage of the peaks of memory, measured and predicted."""
    full = f"--model llama-{model} --rows {MEMORY}"
    tiny = "--model llama-tiny --vocab_size 256 --length 16 --steps 1 --threads 1"
    tiny += ' --rows "sinkgd_layerwise, int8, stateless"'
    words = "--runs 1 --predict --output {file}"
    return Stage(f"memory, {model}", "memory", f"{BENCHMARKS}/memory.py", words, full, tiny, limit, 75)


def training(optim: str) -> Stage:
    """Return the stage of whole training steps of the Trainer; its model lies in `{work}` afterwards."""
    words = "--learning_rate 1e-3 --eval_strategy no --eval_on_start false --report_to none --disable_tqdm true"
    full = f"--optim {optim} --output_dir {{work}}/training-{optim}"
    full += " --model_config 350m --dtype bfloat16 --bf16 true --per_device_train_batch_size 64 --max_steps 30"
    tiny = "--optim swan --output_dir {work}/training-swan --train_files {work}/text.txt --vocab_size 300"
    tiny += " --block_size 32 --per_device_train_batch_size 2 --max_steps 2 --max_eval_tokens 64 --cpu_threads 1"
    return Stage(f"training, {optim}", "training", "{root}/recipes/pretrain.py", words, full, tiny, 120, 45)


def quality(study: str, limit: int, *further: str) -> Stage:
    """Return a stage of held-out losses, each row at rates until the best one has a worse neighbour on both sides.

    What is in the folder of runs already is not run again.
    """
    rows = " ".join([f'"{row}, rest 32/4/16x"' for row in COMPARED] + list(further))
    full = f'--study "{study}" --runs {{out}}/quality-runs/{study} --rates 3 --rows {rows}'
    return Stage(f"quality, {study}", "quality", f"{BENCHMARKS}/quality.py", "", full, TINY_QUALITY, limit, 90)


SFT = "--train_files {work}/sums.jsonl"
INT8_SFT = f"{SFT} --load_in_8bit_training"
TINY_SFT = "--max_steps 1 --max_train_rows 4 --max_eval_rows 2 --per_device_train_batch_size 2 --max_length 24"
TINY_GRPO = "--max_steps 1 --task chain_sum --train_size 8 --eval_size 4 --num_generations 2 --max_completion_length 2"
TINY_GRPO += " --per_device_train_batch_size 2 --per_device_eval_batch_size 4"


def fine_tuning(name: str, config: str, words: str, limit: int, *needs: str) -> Stage:
    """Return a stage of a fine-tuning recipe; it trains a model that is there already."""
    grpo = config == "grpo"
    script = "{root}/recipes/grpo.py" if grpo else "{root}/recipes/sft.py"
    shared = f"--config {{root}}/recipes/smollm2-135m/{config}/swan.yaml --model_name_or_path {{model}}"
    shared += " --report_to none --disable_tqdm true --save_strategy no --output_dir {work}/{slug}"
    rehearsed = INT8_SFT if config == "sft" else words  # one rehearsal for all weights, in 8 bits or not
    tiny = f"{rehearsed} {TINY_GRPO if grpo else TINY_SFT} --cpu_threads 1"
    full = f"{words} --max_steps 100 --bf16 true"
    return Stage(name, "fine-tuning", script, shared, full, tiny, limit, 60, ("trl", *needs))


TESTS = Stage(
    "GPU tests",
    "tests",
    "-m pytest",
    "-c {root}/pyproject.toml --rootdir {root} -p no:cacheprovider -q -rf --no-header",
    '{gpu_tests} -k "gpu or test_kernels" -n 4',
    "{root}/tests/test_whitening_gpu.py",
    240,
    30,
    ("pytest", "hypothesis", "xdist"),
)
RANKS = Stage(
    "two processes",
    "ranks",
    f"{BENCHMARKS}/gpu_ranks.py",
    "--output {file}",
    "--backends nccl gloo",
    "--backends gloo --hidden 16 --layers 1 --steps 1",
    240,
    45,
)
WHITENING = Stage(
    "whitenings, 1b",
    "whitening",
    f"{BENCHMARKS}/whitening.py",
    "--output {file}",
    "--models 1b --batch 8",
    "--models tiny --steps 1 --rounds 2",
    240,
    60,
)
STAGES = (
    TESTS,
    step_time("1b", 6, 150),
    step_time("60m 130m 350m", 8, 180),
    memory("1b", 300),
    training("adamw_torch_fused"),
    training("swan"),
    training("sinkgd"),
    step_time("7b", 2, 240),
    memory("7b", 480),
    RANKS,
    fine_tuning("SFT", "sft", SFT, 180),
    fine_tuning("SFT, LoRA", "sft-lora", SFT, 180, "peft"),
    fine_tuning("SFT, int8", "sft", INT8_SFT, 180),
    quality("60M", 900, "adamw"),
    WHITENING,
    fine_tuning("GRPO", "grpo", "", 600, "reasoning_gym"),
    quality("130M", 900),
)

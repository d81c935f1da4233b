"""A run that is killed loses at most the steps since its last checkpoint: what is resumed from is whole."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import VOCAB_SIZE
from expert_models import expert_model
from int8_folders import load_int8_folder
from script_start import find_checkpoint
from test_int8_training import assert_equal, fit, load_int8, state_of
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_stateless.weights.int8.convert import int8_weights


OPTIONS = {"optim": "sinkgd_layerwise", "save_strategy": "steps", "save_steps": 1}
# What is trained: how it is loaded, and options of the Trainer.
MODELS = {"layers": ({}, {}), "experts": ({"embeddings": True}, {"optim_args": "embeddings=factored"})}
LAST_STEP = 3  # what is killed is step 4 or the writing of its checkpoint
pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGKILL and fork")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class KillBetweenLayers(TrainerCallback):
    """Ends the process in a backward pass, after some layers have been updated and before others."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == LAST_STEP:
            middle = model.model.layers[0].self_attn.q_proj.weight
            middle.register_post_accumulate_grad_hook(lambda p: die())


def in_weights():
    """Half of model.safetensors is written."""
    save_file = transformers.modeling_utils.safe_save_file

    def save(tensors, filename, metadata=None):
        save_file(tensors, filename, metadata=metadata)
        if f"checkpoint-{LAST_STEP + 1}" in str(filename):
            os.truncate(filename, os.path.getsize(filename) // 2)
            die()

    transformers.modeling_utils.safe_save_file = save


def before_optimizer():
    """The weights are written, the state of the optimizer is not."""
    save = transformers.Trainer._save_optimizer_and_scheduler

    def save_or_die(self, output_dir):
        die() if self.state.global_step > LAST_STEP else save(self, output_dir)

    transformers.Trainer._save_optimizer_and_scheduler = save_or_die


def in_state():
    """All but the second half of trainer_state.json is written."""
    save = TrainerState.save_to_json

    def save_half(self, path):
        save(self, path)
        if self.global_step > LAST_STEP:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    TrainerState.save_to_json = save_half


KILLS = {
    "between_layers": (lambda: None, [KillBetweenLayers]),
    "in_weights": (in_weights, []),
    "before_optimizer": (before_optimizer, []),
    "in_state": (in_state, []),
}
# What comes after the weights does not depend on them.
DIED = [("layers", kind) for kind in KILLS] + [("experts", kind) for kind in ("between_layers", "in_weights")]


def train(folder, model, run, resume=None, **more):
    """Train a model into a folder below that of the models."""
    load, options = MODELS[model]
    return fit(
        load_int8(Path(folder, model), **load), Path(folder, f"{model} {run}"), resume, **OPTIONS, **options, **more
    )


def train_and_die(folder):
    """Train in one forked process for each kind of death; print how it ended."""
    torch.set_num_threads(1)
    for model, kind in DIED:
        prepare, callbacks = KILLS[kind]
        child = os.fork()
        if not child:
            prepare()
            train(folder, model, kind, callbacks=[make() for make in callbacks])
            os._exit(0)
        print(model, kind, -os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of tiny bf16 models, and of the runs that died."""
    from conftest import TINY_MODELS

    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    TINY_MODELS["llama"]().to(torch.bfloat16).save_pretrained(folder / "layers")
    expert_model("qwen3_moe", vocab_size=VOCAB_SIZE).save_pretrained(folder / "experts")
    command = [sys.executable, __file__, folder]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    ends = [tuple(line.split()) for line in done.stdout.splitlines() if line.startswith(tuple(MODELS))]
    assert ends == [(*died, "-9") for died in DIED], done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def straight(runs):
    """The folders of the runs that nobody killed."""
    trained = {model: train(runs, model, "straight") for model in MODELS}
    stored = {name.split(".")[-2] for name, _ in int8_weights(trained["experts"].model)}
    assert {"experts", "embed_tokens", "lm_head", "q_proj"} <= stored
    return {model: Path(trainer.args.output_dir) for model, trainer in trained.items()}


@pytest.mark.parametrize(("model", "kind"), DIED)
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint_to_the_same_bytes(model, kind, runs, straight, capsys):
    folder = runs / f"{model} {kind}"
    half_written = folder / f"checkpoint-{LAST_STEP + 1}"
    assert half_written.is_dir() == (kind != "between_layers")
    found = find_checkpoint(TrainingArguments(str(folder), resume_from_checkpoint="true", use_cpu=True))
    assert found == str(folder / f"checkpoint-{LAST_STEP}")
    assert (f"{half_written} is left out" in capsys.readouterr().out) == half_written.is_dir()
    before = load_int8_folder(straight[model] / f"checkpoint-{LAST_STEP}")
    assert_equal(state_of(load_int8_folder(found)), state_of(before))
    resumed = train(runs, model, kind, found)
    for step in (LAST_STEP + 1, 5):
        expected = load_int8_folder(straight[model] / f"checkpoint-{step}")
        assert_equal(state_of(load_int8_folder(folder / f"checkpoint-{step}")), state_of(expected))
    assert_equal(state_of(resumed.model), state_of(expected))


def test_a_run_whose_first_checkpoint_is_not_whole_starts_anew(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    assert find_checkpoint(TrainingArguments(str(tmp_path), use_cpu=True)) is None


if __name__ == "__main__":
    train_and_die(*sys.argv[1:])

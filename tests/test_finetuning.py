"""Fine-tuning with TRL and PEFT: every trainer saves, loads and resumes to the bit."""

import functools

import pytest
import torch
from datasets import Dataset
from finetuning_models import SAMPLING, TRAINERS, train
from tiny_models import bits_and_bytes, changed, chat_tokenizer, weights_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from hf_stateless import PRESETS, StatelessOptimizer


pytest_plugins = ["finetuning_models"]


trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

# TRL asks for gradient checkpointing by the name that transformers is about to give up.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
each_trainer = pytest.mark.parametrize("kind", TRAINERS)
RUNS = [(tuning, optim) for tuning in ("full", "lora", "int8") for optim in ("sinkgd", "swan")]
# The control: what it does not repeat, the trainer itself does not.
RUNS += [("lora", "adamw_torch")]
each_run = pytest.mark.parametrize(("tuning", "optim"), RUNS)


def word_sum(completions, **kwargs):
    """A reward that differs from answer to answer, so that every batch has a gradient."""
    return [float(sum(map(ord, completion[0]["content"])) % 97) for completion in completions]


class Watch(TrainerCallback):
    """Keeps the weights of the beginning and after step 2."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.first = weights_of(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            self.second = weights_of(model)


def auto_class(kind, prefix="AutoModelFor"):
    return f"{prefix}{'SequenceClassification' if kind == 'Reward' else 'CausalLM'}"


def new_trainer(kind, folder, tuning, optim, output, seed=0, callbacks=()):
    rows, options = TRAINERS[kind]
    # Adapters are drawn from `seed`; a resumed run has to take them from the checkpoint.
    torch.manual_seed(seed)
    auto = {"AutoModelForCausalLM": AutoModelForCausalLM}.get(auto_class(kind), AutoModelForSequenceClassification)
    adapter = peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        lora_dropout=0.1,
        task_type="SEQ_CLS" if kind == "Reward" else "CAUSAL_LM",
    )
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(output),
        optim=optim,
        learning_rate=1e-2,
        max_steps=3,
        save_steps=2,
        per_device_train_batch_size=2,
        # TRL casts the whole of a quantised model's trainable part, the float32 input of a score head not.
        bf16=(kind, tuning) == ("Reward", "int8"),
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return getattr(trl, f"{kind}Trainer")(
        model=auto.from_pretrained(folder, **bits_and_bytes(tuning)),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=chat_tokenizer(),
        callbacks=list(callbacks),
        **({} if tuning == "full" else {"peft_config": adapter}),
        **({"reward_funcs": word_sum} if options is SAMPLING else {}),
    )


def keep_dtype(model):
    """Over a quantised base TRL trains adapters in bfloat16, but those of a checkpoint come back in float32.

    `test_a_resume_changes_the_dtype_of_adapters_over_a_quantised_base` says when this can go.
    """
    model.load_adapter = functools.partial(model.load_adapter, autocast_adapter_dtype=False)


@each_run
@each_trainer
def test_a_trainer_saves_loads_and_resumes_to_the_bit(kind, tuning, optim, folders, tmp_path):
    if tuning == "int8":
        pytest.importorskip("bitsandbytes")
    watch = Watch()
    whole = train(new_trainer(kind, folders[kind], tuning, optim, tmp_path, callbacks=[watch]))
    final = weights_of(whole.model)
    trained = {name for name, p in whole.model.named_parameters() if p.requires_grad}
    assert changed(final, watch.first) == changed(final, watch.second) == trained
    if optim in PRESETS:
        optimizer = whole.optimizer.optimizer
        assert isinstance(optimizer, StatelessOptimizer)
        assert optimizer.param_groups[0]["norms"] == PRESETS[optim].norms

    half = new_trainer(kind, folders[kind], tuning, optim, tmp_path, seed=1)
    if tuning == "int8":
        keep_dtype(half.model)
    resumed = train(half, str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3
    assert changed(weights_of(resumed.model), final) == set()

    whole.save_model(str(tmp_path / "saved"))
    if tuning == "full":
        auto = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    else:
        auto = getattr(peft, auto_class(kind, "AutoPeftModelFor"))
    loaded = auto.from_pretrained(tmp_path / "saved", **bits_and_bytes(tuning))
    assert changed({k: v.to(final[k].dtype) for k, v in loaded.state_dict().items()}, final) == set()


def test_a_resume_changes_the_dtype_of_adapters_over_a_quantised_base(folders, tmp_path):
    """What transformers, TRL and PEFT do with any optimizer; when this fails, `keep_dtype` can go (the page too)."""
    pytest.importorskip("bitsandbytes")

    def dtypes(trainer):
        return {p.dtype for p in trainer.model.parameters() if p.requires_grad}

    args = ("SFT", folders["SFT"], "int8", "sgd", tmp_path)
    assert dtypes(train(new_trainer(*args))) == {torch.bfloat16}
    assert dtypes(train(new_trainer(*args), str(tmp_path / "checkpoint-2"))) == {torch.float32}

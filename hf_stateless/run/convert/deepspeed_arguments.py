"""What a DeepSpeed config says that TrainingArguments say in the Trainer: batches, clipping, optimizer, schedule."""

from __future__ import annotations

from .conversion import Conversion
from .settings import Settings


# Names of optimizers and schedules in the Trainer.
OPTIMIZERS = {"adam": "adamw_torch", "adamw": "adamw_torch", "adagrad": "adagrad", "sgd": "sgd", "lion": "lion_32bit"}
SCHEDULES = {"warmuplr": "constant_with_warmup", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}


def take_arguments(settings: Settings, result: Conversion) -> None:
    """Write the values that belong to TrainingArguments.

    Raises:
        ValueError: a value is no number, or the sizes of the batches contradict each other.
    """
    _batches(settings, result)
    _clipping(settings, result)
    _optimizer(settings, result)
    _schedule(settings, result)


def _batches(settings: Settings, result: Conversion) -> None:
    """Take the three sizes; two of them and the number of processes give the third, as in DeepSpeed."""
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    open_before = len(settings.autos)
    total, each, steps = (settings.number(key, least=1, whole=True) for key in keys)
    is_open = len(settings.autos) > open_before
    processes = result.config.get("num_processes")
    if total and each and steps and not processes:
        if total % (each * steps):
            raise ValueError(f"train_batch_size: got {total}, expected a multiple of {each} x {steps}")
        processes = result.config["num_processes"] = int(total / each / steps)
        result.notes.append(f"num_processes: {processes}, from {total} = {each} x {steps} x processes.")
    if total and processes and not is_open:
        if each is None:
            each = total // processes // (steps or 1)
        elif steps is None:
            steps = total // processes // each
        if each * (steps or 1) * processes != total or each < 1:
            raise ValueError(
                f"train_batch_size: got {total}, expected {settings.name(keys[1])} x {settings.name(keys[2])} x "
                f"processes, here {each} x {steps or 1} x {processes}"
            )
    elif total and not processes:
        result.notes.append(
            f"train_batch_size: {total} = per_device_train_batch_size x gradient_accumulation_steps x processes, "
            "choose them so."
        )
    sizes = {"per_device_train_batch_size": each, "gradient_accumulation_steps": steps}
    result.arguments |= {key: int(size) for key, size in sizes.items() if size}
    if settings.switch("dataloader_drop_last") is True:
        result.arguments["dataloader_drop_last"] = True


def _clipping(settings: Settings, result: Conversion) -> None:
    """Take the norm that gradients are clipped to."""
    key = "gradient_clipping"
    is_said = key in settings
    most, of_optimizer = settings.number(key), settings.number("optimizer.params.max_grad_norm")
    if most is None:
        most = of_optimizer
    if most is not None:
        result.arguments["max_grad_norm"] = most
    elif not is_said:
        result.notes.append(
            "gradient_clipping is absent: the Trainer clips to 1.0, as DeepSpeed itself does since 0.19.3; older "
            "releases did not clip, for which type max_grad_norm=0."
        )


def _optimizer(settings: Settings, result: Conversion) -> None:
    """Take the optimizer that DeepSpeed makes, which becomes values of TrainingArguments."""
    kind = settings.take("optimizer.type")
    if kind is None:
        return
    _arguments(settings, result, "optimizer", lr="learning_rate", eps="adam_epsilon", weight_decay="weight_decay")
    betas = settings.take("optimizer.params.betas")
    if isinstance(betas, list) and len(betas) == 2:
        result.arguments |= {"adam_beta1": betas[0], "adam_beta2": betas[1]}
    same = OPTIMIZERS.get(str(kind).lower())
    stay = f"optim={same!r} is what the file has" if same else "the Trainer has none of that name"
    if str(kind).lower().startswith(("onebit", "zeroone")):
        stay = "its 1-bit messages have no counterpart"
    result.notes.append(
        f"optimizer {kind}: DeepSpeed makes it whatever optim= says; type optim='sinkgd' or optim='swan' ({stay})."
    )


def _schedule(settings: Settings, result: Conversion) -> None:
    """Take the learning rates over time that DeepSpeed makes, which become values of TrainingArguments."""
    kind = settings.take("scheduler.type")
    if kind is None:
        return
    names = {"warmup_max_lr": "learning_rate", "warmup_num_steps": "warmup_steps", "total_num_steps": "max_steps"}
    _arguments(settings, result, "scheduler", **names)
    shape = settings.take("scheduler.params.warmup_type") or "log"
    same = SCHEDULES.get(str(kind).lower())
    if same is None:
        known = ", ".join(SCHEDULES.values())
        result.notes.append(f"scheduler {kind}: no counterpart, type lr_scheduler_type= with one of {known}.")
        return
    result.arguments["lr_scheduler_type"] = same
    if shape == "log":
        result.notes.append(f"scheduler {kind}: its rate grows by a logarithm in the warmup, the Trainer's by a line.")


def _arguments(settings: Settings, result: Conversion, block: str, **names: str) -> None:
    """Take the numbers of a block, and write them under their names in TrainingArguments."""
    values = {
        argument: settings.number(f"{block}.params.{key}", whole=key.endswith("_steps"))
        for key, argument in names.items()
    }
    result.arguments |= {name: number for name, number in values.items() if number is not None}

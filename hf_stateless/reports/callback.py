"""`attach_memory_report`: every run of a Trainer measures its memory, logs it, and leaves a report in its folder."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .command_line import first_line
from .files import GIB
from .measured.build import build_report, continued, memory_parts
from .measured.meter import Reading, RunMeter, highest
from .measured.schema import PICTURE_FILE, MemoryReport
from .patches import see_training_batches


logger = logging.getLogger(__name__)


def attach_memory_report(trainer: Trainer) -> MemoryCallback:
    """Let a trainer measure, log and report the memory of its runs; one call, before `trainer.train()`.

    The logs of training get `memory/peak_gib` (measured, the most since the last log), `memory/optimizer_state_gib`
    (counted), `throughput/tokens_per_second` and `time/optimizer_share`; memory is that of the highest rank. Trackers
    of `report_to` and the history also get the other parts of the peak, `memory/optimizer_share` of it, and
    `updates/not_finite` and `updates/held_steps`, what an optimizer of this package has left out so far. At saves,
    pushes and at the end the output folder gets `memory_report.json`, at the last two also `memory.png` (which needs
    matplotlib), and the model card a section. A resumed run adds to the report of its checkpoint. It works for
    `Trainer` and those of TRL; a second call changes nothing.

    Under several processes the ranks exchange a few numbers when the Trainer logs, saves or ends. On CPU the kernel's
    high-water mark of the process is reset at each step, on a GPU the peaks of torch's allocator: whoever else reads
    them sees the last step only.

    Args:
        trainer: the one that is about to train.

    Example:
        >>> import tempfile
        >>> import hf_stateless
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=2, vocab_size=32)
        >>> args = TrainingArguments(tempfile.mkdtemp(), optim="sinkgd", use_cpu=True, report_to=[], max_steps=1,
        ...                          log_level="warning")
        >>> rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
        >>> trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=rows)
        >>> callback = hf_stateless.attach_memory_report(trainer)
        >>> trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...
        >>> for group in callback.report().groups:
        ...     print(group.role, group.algorithm, group.state_bytes)
        matrix multinorm 28
        embedding adamw 2052
        head adamw 2052
        rest adamw 204
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, MemoryCallback):
            return callback
    callback = MemoryCallback(trainer)
    trainer.add_callback(callback)
    trainer.callback_handler.callbacks.insert(0, _AddToLogs(callback))  # before the trackers, which read the logs
    see_training_batches(trainer, lambda batch: callback.meter.see(batch))  # each run has its own meter
    if not trainer.args.skip_memory_metrics:
        logger.warning(
            "skip_memory_metrics=False reads the same memory counters, which this report resets at every step: "
            "leave it out, or its figures will be those of the last step."
        )
    from .card.attach import attach_model_card  # loads a template engine

    attach_model_card(trainer)
    return callback


class MemoryCallback(TrainerCallback):  # type: ignore[misc]
    """Tells a `RunMeter` about the training loop of one trainer, and writes its report; see `attach_memory_report`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        optim = trainer.args.optim
        self._optimizer = _given_optimizer(trainer) or getattr(optim, "value", optim)
        self.meter = RunMeter(trainer.args.device, self._optimizer)
        self._rows: list[Reading] = []
        self._earlier: MemoryReport | None = None
        self._complete = False
        self._to_log: dict[str, float] = {}
        self._for_trackers: dict[str, float] = {}

    def report(self) -> MemoryReport | None:
        """Return the report of the run so far, on the main process; None before the end of the first step.

        It exchanges nothing between ranks: of the others it has what they said when the Trainer last logged or saved.
        """
        if not self._rows:
            return None
        report = build_report(self._trainer, self.meter, self._rows, complete=self._complete)
        return continued(report, self._earlier) if self._earlier else report

    def take_numbers(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the numbers of the last exchange, once, and let the peak since the last log begin anew.

        Returns:
            What everybody sees who watches a run, and the same with what only trackers and the history get.
        """
        numbers, more = self._to_log, self._for_trackers
        self._to_log, self._for_trackers = {}, {}
        self.meter.recent_peak = 0
        return numbers, {**numbers, **more}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take stock, and find the report of the part before a resume."""
        self.meter.close()
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self.meter = RunMeter(args.device, self._optimizer)
        self.meter.begin(kwargs["model"], optimizer)
        self._rows, self._to_log, self._for_trackers, self._complete = [], {}, {}, False
        self._earlier = None
        if state.global_step:
            with contextlib.suppress(OSError, ValueError, RecursionError):  # none, or not what this package writes
                self._earlier = MemoryReport.load(self._checkpoint(args, state))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch forward and backward."""
        self.meter.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch the optimizer's step."""
        self.meter.before_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the watch of the optimizer's step."""
        self.meter.after_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Exchange numbers where the Trainer is about to log, evaluate, save or end."""
        self.meter.end_step()
        self._exchange_if(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Exchange numbers likewise at the end of an epoch."""
        self._exchange_if(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave evaluation out of the time of training."""
        self.meter.pause()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the report with the checkpoint, for a resume."""
        self.meter.pause()
        checkpoint = self._checkpoint(args, state)
        if checkpoint.is_dir():
            self._write(state, checkpoint)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have report and picture in the folder that is pushed."""
        self._write(state, args.output_dir, picture=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the report of the whole run."""
        if self.meter.steps:
            self.meter.close()
            self._exchange()
            self._complete = True
            self._write(state, args.output_dir, picture=True)

    def _exchange_if(self, args: Any, state: Any, control: Any) -> None:
        """Exchange numbers where all ranks do, since their flags are equal: a rank that did it alone would hang."""
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._exchange()
        if control.should_save:  # TRL writes a card before it saves
            self._write(state, args.output_dir)

    def _exchange(self) -> None:
        if not self.meter.steps:
            return
        own = self.meter.read()
        values = torch.tensor([[*astuple(own), self.meter.recent_peak]], device=self.meter.device)
        if self._trainer.accelerator.num_processes > 1:
            values = self._trainer.accelerator.gather(values)
        numbers = values.tolist()
        self._rows = [Reading(*row[:-1]) for row in numbers]
        _, share, per_second = self.meter.rates(sum(row.tokens for row in self._rows))
        recent = max(row[-1] for row in numbers)
        known = {
            "memory/peak_gib": recent / GIB,
            "memory/optimizer_state_gib": highest(self._rows).optimizer_state / GIB,
            "time/optimizer_share": share,
            "throughput/tokens_per_second": per_second,
        }
        self._to_log = {key: float(f"{value:.4g}") for key, value in known.items() if value is not None}
        more = memory_parts(highest(self._rows), recent)
        if self.meter.counts_skips:
            more["updates/not_finite"] = max(row.not_finite for row in self._rows)
            more["updates/held_steps"] = max(row.held_steps for row in self._rows)
        self._for_trackers = {key: float(f"{value:.4g}") for key, value in more.items()}

    def _write(self, state: Any, folder: str | Path, *, picture: bool = False) -> None:
        """Write the report on the main process; a full disk or a missing package must not end a training."""
        if not state.is_world_process_zero or (report := self.report()) is None:
            return
        try:
            report.save(folder)
            if picture:
                from .measured.picture import draw

                draw(report, Path(folder) / PICTURE_FILE)
        except ImportError as error:
            logger.info("%s", error)
        except (OSError, ValueError) as error:
            logger.warning("The memory report cannot be written: %s", first_line(error))

    @staticmethod
    def _checkpoint(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


class _AddToLogs(TrainerCallback):  # type: ignore[misc]
    """Adds the numbers of a `MemoryCallback` to the logs of training; what comes after it in the list sees them."""

    def __init__(self, memory: MemoryCallback) -> None:
        self._memory = memory

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add them to what is logged and to the history, which the Trainer has already written."""
        if logs and "loss" in logs:
            numbers, more = self._memory.take_numbers()
            logs.update(more if set(args.report_to or ()) - {"none"} else numbers)
            for entry in state.log_history[-1:]:
                entry.update(more)


def _given_optimizer(trainer: Trainer) -> str | None:
    """Return what to call an optimizer that was handed to the trainer; None where `optim=` names it."""
    if trainer.optimizer is not None and not trainer.state.global_step:
        return type(trainer.optimizer).__name__
    if trainer.optimizer_cls_and_kwargs is not None:
        factory = trainer.optimizer_cls_and_kwargs[0]
        return str(getattr(factory, "name", getattr(factory, "__name__", type(factory).__name__)))
    return None

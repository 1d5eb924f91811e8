"""What is recorded during one run of a Trainer, and where it goes."""

import contextlib
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerState, TrainingArguments

from hf_sketch.processes import in_turn, reduced
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE
from hf_sketch.store.writer import SketchWriter

from .examples import ExampleRecorder
from .position import Position
from .sink import Columns, HeldRows
from .steps import StepRecorder, check_sum


class Recording:
    """Rows of the steps and of the examples of one run.

    Args:
        header: of the store.
        args: of the Trainer.
        state: of the Trainer, as training begins.
        model: the model that trains.
        loader: the training DataLoader.
        per_step: record a row for each step.
        per_example: record a row for each example.
        every_steps: record the steps whose number is a multiple of this.
    """

    def __init__(
        self,
        header: Header,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        loader: DataLoader[Any],
        *,
        per_step: bool,
        per_example: bool,
        every_steps: int,
    ) -> None:
        sketch = header.model_sketch
        directory = Path(args.output_dir or ".") / "sketches"
        with in_turn() as processes:
            rank, world_size = processes.process_index, processes.num_processes
            self._writer = SketchWriter(
                directory, header, state.global_step, rank=rank, world_size=world_size
            )
        self._rows = HeldRows(self._hand_on)
        self._every_steps = every_steps
        self._examples = (
            ExampleRecorder(model, sketch, loader, header.loss, rank, world_size)
            if per_example
            else None
        )
        self._steps = StepRecorder(model, sketch) if per_step else None
        sixteen_bits = any(p.element_size() < 4 for p in model.parameters())
        self._low_precision = args.bf16 or args.fp16 or sixteen_bits
        self._verified = not (per_example and per_step)
        self._measured = rank > 0 or self._writer.measured_error is not None
        self._epoch = int(state.epoch or 0) - 1
        self._micro_step = self._skipped_batches = 0
        if self._examples is not None and not args.ignore_data_skip:
            per_update = args.gradient_accumulation_steps
            self._skipped_batches = self._examples.skipped_batches(
                state.global_step, per_update
            )

    def start_epoch(self) -> None:
        """A pass over the training set begins."""
        self._epoch += 1
        if self._examples is not None:
            self._examples.start_epoch(self._skipped_batches)
        self._skipped_batches = 0

    def start_step(self, step: int) -> None:
        """An optimizer step begins; the first is 1."""
        self._micro_step = 0
        recording = step % self._every_steps == 0
        for recorder in (self._examples, self._steps):
            if recorder is not None:
                recorder.start_step(recording)

    def end_micro_batch(self, state: TrainerState, optimizer: Optimizer) -> None:
        """A backward pass has run: write its examples."""
        if self._examples is not None:
            moment, scale = self._moment(state, optimizer), _loss_scale(optimizer)
            self._examples.end_micro_batch(moment, self._rows, scale)
        self._micro_step += 1

    def end_gradient(self, state: TrainerState, optimizer: Optimizer) -> None:
        """The optimizer is about to step: write the step's row.

        In several processes, all that they do together comes before all that can fail.
        """
        total = None if self._examples is None else self._examples.end_step()
        if total is not None and not self._verified:
            total = reduced(total, "sum")
        if self._steps is not None:
            moment, scale = self._moment(state, optimizer), _loss_scale(optimizer)
            sketch = self._steps.end_step(moment, self._rows, scale)
            if not self._verified and sketch is not None and total is not None:
                check_sum(total, sketch, self._low_precision)
                self._verified = True
        if total is not None:
            self._measure_error()

    def end_step(self) -> None:
        """The optimizer has stepped."""
        self._rows.end_step()
        self._writer.end_step()

    def flush(self) -> None:
        """Put all rows so far into the store."""
        self._rows.flush()
        self._writer.flush()

    def close(self) -> None:
        """Take all hooks off; rows that are not flushed are dropped."""
        for recorder in (self._examples, self._steps):
            if recorder is not None:
                recorder.close()
        self._writer.close()

    def abandon(self, reason: str, last_step: int | None = None) -> int:
        """Record no more, and say so in the store if it can still be written.

        Args:
            reason: what went wrong.
            last_step: the last step of which there are rows in the process where it
                did; None for this process.

        Returns:
            the last step of which there are rows in this process.
        """
        self.close()
        with contextlib.suppress(OSError):  # the error that matters is told already
            self._writer.note_gap(reason, last_step)
        return self._writer.last_step

    def _hand_on(self, kind: str, columns: Columns) -> None:
        """Give rows to the writer."""
        if kind == PER_EXAMPLE and self._examples is not None:
            self._examples.warn(columns)
        self._writer.append(kind, columns)

    def _moment(self, state: TrainerState, optimizer: Optimizer) -> Position:
        """The present micro-batch's place in training."""
        rate = float(optimizer.param_groups[0]["lr"])
        return Position(self._epoch, state.global_step + 1, self._micro_step, rate)

    def _measure_error(self) -> None:
        """Compare the first step's rows with exact gradients, once for a store."""
        assert self._examples is not None
        if self._measured:
            return
        self._measured = True
        error = self._examples.measure_error(self._low_precision)
        if error is not None:
            self._writer.note_measured_error(error)


def _loss_scale(optimizer: Optimizer) -> float:
    """What the loss is multiplied by before the backward pass, under fp16."""
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())

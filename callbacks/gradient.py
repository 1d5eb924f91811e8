"""The callback that sketches gradients while a Trainer trains."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_sketch.examples.losses import check_reduction
from hf_sketch.model.sketch import ModelSketch, check_layout
from hf_sketch.processes import check_same, gathered
from hf_sketch.sketches.by_name import check_operator
from hf_sketch.store.header import Header
from hf_sketch.store.rows import check_row_dtype

from .placement import check_processes, step_examples
from .recording.run import Recording

ON_ERROR = ("raise", "warn")
_GOES_ON = -1
_FAILURES = (OSError, MemoryError, torch.OutOfMemoryError)


class GradientSketchCallback(TrainerCallback):
    """Sketches the gradients of training into `<output_dir>/sketches`.

    Two kinds of rows, both out of the backward pass that training runs anyway:

    - per step: the sketch of the gradient that the optimizer sees, with the factor by
      which it was clipped;
    - per example: the sketch of the gradient of the example's own loss, with the row
      number of the example in `train_dataset` and the weight with which it entered the
      step, so that the weighted sum of a step's rows is the step's gradient before
      clipping. This is verified at the first step.

    Under DDP each process records its own examples. Those that fill up the last batch
    of an epoch have a row where they had their turn only: the rows of that step add up
    to its gradient without the repetitions' share. Under FSDP2 it is the same, and each
    process sketches its part of each parameter for the rows of steps.

    Training is bit for bit what it is without the callback. Rows are written before
    each checkpoint; training that resumes from a checkpoint ends with the rows of
    training that never stopped. Open them with `hf_sketch.load_sketches(output_dir)`.

    Args:
        out_size: numbers in a sketch.
        layout: "factored" (cheap per-example rows) or "blocked" (more accurate, but
            forms each example's weight gradients); see `ModelSketch`.
        operator: what sketches the parameters, or those that "factored" does not
            factor; see `ModelSketch`.
        seed: of the sketch; by default the Trainer's own.
        per_step: record a row for each step.
        per_example: record a row for each example.
        every_steps: record the steps whose number is a multiple of this.
        loss: what a row is the gradient of: the "mean" or the "sum" of the loss over
            the example's tokens.
        row_dtype: what rows are stored in: "float32", or "float16" or "int8", each row
            with a scale.
        on_error: what to do if the disk is full or the memory runs out in recording:
            "raise" an error that stops training, or "warn", record no more, in any
            process, until training is resumed, and train on.

    Raises:
        ValueError: a bad argument; in `on_train_begin` a model, a setting of the
            Trainer or a store that does not fit, before any training time is spent.
        OSError: with on_error="raise", rows cannot be written.
    """

    _recording: Recording | None = None
    _together = False  # whether all processes are to stop recording where one does
    _last_step = _GOES_ON

    def __init__(
        self,
        out_size: int = 4096,
        *,
        layout: str = "factored",
        operator: str = "srht",
        seed: int | None = None,
        per_step: bool = True,
        per_example: bool = True,
        every_steps: int = 1,
        loss: str = "mean",
        row_dtype: str = "float32",
        on_error: str = "raise",
    ) -> None:
        for name, value in (("out_size", out_size), ("every_steps", every_steps)):
            if value < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {value}: pass 1 or more."
                )
        if not (per_step or per_example):
            raise ValueError(
                "per_step and per_example must not both be False, got False for both: "
                "leave the callback out to record nothing."
            )
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {ON_ERROR}, got {on_error!r}.")
        check_layout(layout)
        check_operator(operator)
        check_reduction(loss)
        check_row_dtype(row_dtype)
        self.out_size = out_size
        self.layout = layout
        self.operator = operator
        self.seed = seed
        self.per_step = per_step
        self.per_example = per_example
        self.every_steps = every_steps
        self.loss = loss
        self.row_dtype = row_dtype
        self.on_error = on_error

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        train_dataloader: DataLoader[Any],
        **kwargs: Any,
    ) -> None:
        self._close()
        check_processes(args, model, in_shards=True)
        check_same(type(self).__name__, vars(self))
        self._together = args.world_size > 1 and self.on_error == "warn"
        self._last_step = _GOES_ON
        seed = args.seed if self.seed is None else self.seed
        sketch = ModelSketch.from_model(
            model, self.out_size, self.layout, seed, self.operator
        )
        self._recording = Recording(
            Header(
                sketch,
                self.loss,
                self.row_dtype,
                step_examples=step_examples(args, state),
            ),
            args,
            state,
            model,
            train_dataloader,
            per_step=self.per_step,
            per_example=self.per_example,
            every_steps=self.every_steps,
        )

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._run(Recording.start_epoch)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._run(lambda recording: recording.start_step(state.global_step + 1))

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        self._run(lambda recording: recording.end_micro_batch(state, optimizer))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        self._run(lambda recording: recording.end_micro_batch(state, optimizer))
        if (state.global_step + 1) % self.every_steps == 0:
            self._agree()
        self._run(lambda recording: recording.end_gradient(state, optimizer))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._run(Recording.end_step)
        if control.should_save:  # the rows must be there before the checkpoint is
            self._run(Recording.flush)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if control.should_save:
            self._run(Recording.flush)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._run(Recording.flush)  # save_strategy="best" decides only now

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._run(Recording.flush)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._run(Recording.flush)
        self._agree()
        self._close()

    def _run(self, action: Callable[[Recording], None]) -> None:
        """Do something with the recording, if there is one, and deal with failures."""
        if self._recording is None:
            return
        try:
            action(self._recording)
        except _FAILURES as error:
            self._abandon(f"{type(error).__name__}: {error}")
            if self.on_error == "raise":
                raise

    def _agree(self) -> None:
        """Record no more in any process once one of them does not."""
        if not self._together:
            return
        ended = [step for step in gathered(self._last_step) if step != _GOES_ON]
        if ended:
            self._together = False
            self._abandon("recording failed in another process", min(ended))

    def _abandon(self, reason: str, last_step: int | None = None) -> None:
        """Record no more, and say so, in the store and to the user."""
        recording, self._recording = self._recording, None
        if recording is None:
            return
        self._last_step = recording.abandon(reason, last_step)
        if self.on_error == "warn":
            warnings.warn(
                f"sketches are recorded no more, training goes on: {reason} "
                "(on_error='warn'). Resume training from a checkpoint to record again.",
                stacklevel=4,
            )

    def _close(self) -> None:
        """Take all hooks off; rows that are not flushed are dropped."""
        if self._recording is not None:
            self._recording.close()
        self._recording = None

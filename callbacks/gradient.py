"""The callback that sketches gradients while a Trainer trains."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_sketch.example_losses import check_reduction
from hf_sketch.model_sketch import ModelSketch, check_layout
from hf_sketch.operator_choice import check_operator
from hf_sketch.writer import SketchWriter

from .example_rows import ExampleRecorder
from .moment import Moment
from .step_rows import StepRecorder, check_sum


class GradientSketchCallback(TrainerCallback):
    """Sketches the gradients of training into `<output_dir>/sketches`.

    Two kinds of rows, both out of the backward pass that training runs anyway:

    - per step: the sketch of the gradient that the optimizer sees, with the factor by
      which it was clipped;
    - per example: the sketch of the gradient of the example's own loss, with the row
      number of the example in `train_dataset` and the weight with which it entered the
      step, so that the weighted sum of a step's rows is the step's gradient before
      clipping. This is verified at the first step.

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

    Raises:
        ValueError: a bad argument; in `on_train_begin` a model, a setting of the
            Trainer or a store that does not fit, before any training time is spent.
    """

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
        check_layout(layout)
        check_operator(operator)
        check_reduction(loss)
        self.out_size = out_size
        self.layout = layout
        self.operator = operator
        self.seed = seed
        self.per_step = per_step
        self.per_example = per_example
        self.every_steps = every_steps
        self.loss = loss
        self._examples: ExampleRecorder | None = None
        self._steps: StepRecorder | None = None
        self._writer: SketchWriter | None = None
        self._epoch = self._micro_step = self._skipped_batches = 0
        self._verified = self._measured = self._low_precision = False

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
        _check_arguments(args)
        seed = args.seed if self.seed is None else self.seed
        sketch = ModelSketch.from_model(
            model, self.out_size, self.layout, seed, self.operator
        )
        if self.per_example:
            self._examples = ExampleRecorder(model, sketch, train_dataloader, self.loss)
        if self.per_step:
            self._steps = StepRecorder(model, sketch)
        directory = Path(args.output_dir or ".") / "sketches"
        self._writer = SketchWriter(directory, sketch, self.loss, state.global_step)
        sixteen_bits = any(p.element_size() < 4 for p in model.parameters())
        self._low_precision = args.bf16 or args.fp16 or sixteen_bits
        self._verified = not (self.per_example and self.per_step)
        self._measured = self._writer.measured_error is not None
        self._epoch = int(state.epoch or 0) - 1
        self._skipped_batches = 0
        if self._examples is not None and not args.ignore_data_skip:
            per_update = args.gradient_accumulation_steps
            self._skipped_batches = self._examples.skipped_batches(
                state.global_step, per_update
            )

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._epoch += 1
        if self._examples is not None:
            self._examples.start_epoch(self._skipped_batches)
        self._skipped_batches = 0

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._micro_step = 0
        recording = (state.global_step + 1) % self.every_steps == 0
        for recorder in (self._examples, self._steps):
            if recorder is not None:
                recorder.start_step(recording)

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        self._end_micro_batch(self._moment(state, optimizer), _loss_scale(optimizer))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        moment = self._moment(state, optimizer)
        scale = _loss_scale(optimizer)
        self._end_micro_batch(moment, scale)
        total = self._examples.end_step() if self._examples is not None else None
        if self._steps is not None and self._writer is not None:
            sketch = self._steps.end_step(moment, self._writer, scale)
            if not self._verified and sketch is not None and total is not None:
                check_sum(total, sketch, self._low_precision)
                self._verified = True
        if total is not None:
            self._measure_error()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._writer is not None:
            self._writer.end_step()
        if control.should_save:  # the rows must be there before the checkpoint is
            self._flush()

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if control.should_save:
            self._flush()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._flush()  # save_strategy="best" decides only now

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._flush()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._flush()
        self._close()

    def _moment(self, state: TrainerState, optimizer: Optimizer) -> Moment:
        """The present micro-batch's place in training."""
        rate = float(optimizer.param_groups[0]["lr"])
        return Moment(self._epoch, state.global_step + 1, self._micro_step, rate)

    def _end_micro_batch(self, moment: Moment, loss_scale: float) -> None:
        """Write the examples of a micro-batch."""
        if self._examples is not None and self._writer is not None:
            self._examples.end_micro_batch(moment, self._writer, loss_scale)
        self._micro_step += 1

    def _measure_error(self) -> None:
        """Compare the first step's rows with exact gradients, once for a store."""
        assert self._examples is not None
        assert self._writer is not None
        if self._measured:
            return
        self._measured = True
        error = self._examples.measure_error(self._low_precision)
        if error is not None:
            self._writer.note_measured_error(error)

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def _close(self) -> None:
        """Take all hooks off; rows that are not flushed are dropped."""
        for recorder in (self._examples, self._steps):
            if recorder is not None:
                recorder.close()
        self._examples = self._steps = self._writer = None


def _check_arguments(args: TrainingArguments) -> None:
    """Raise if the Trainer's settings are not covered."""
    refused = {
        "several processes": args.world_size > 1,
        "several GPUs in one process": args.n_gpu > 1,
        "torch_compile=True": args.torch_compile,
    }
    found = [name for name, present in refused.items() if present]
    if found:
        raise ValueError(
            "GradientSketchCallback runs in one process and uncompiled, got "
            f"{', '.join(found)}: train without, or take the callback out."
        )


def _loss_scale(optimizer: Optimizer) -> float:
    """What the loss is multiplied by before the backward pass, under fp16."""
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())

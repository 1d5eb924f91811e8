"""The callback that sketches gradients while a Trainer trains."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_sketch.examples.losses import check_reduction
from hf_sketch.model.sketch import LAYOUTS, ModelSketch
from hf_sketch.processes import check_same
from hf_sketch.sketches.by_name import OPERATORS
from hf_sketch.sketches.choices import check_choice, check_count, check_flag
from hf_sketch.store.header import Header
from hf_sketch.store.rows import ROW_DTYPES

from .placement import check_processes, step_examples
from .recording.run import Run
from .recording.trainers import calling_trainers, wrap_training_step

OnError = Literal["raise", "warn"]


@dataclass(eq=False, repr=False)
class GradientSketchCallback(TrainerCallback):
    """Sketches the gradients of training into `<output_dir>/sketches`.

    It reuses the backward pass that training runs, for two kinds of rows:

    - per step: the sketch of the gradient that the optimizer sees, with the factor by
      which it was clipped;
    - per example: the sketch of the gradient of the example's own loss, with the row
      number of the example in `train_dataset` and the weight with which it entered the
      step, so that the weighted sum of a step's rows is the step's gradient before
      clipping. This is verified at the first recorded step.

    Under DDP each process records its own examples. Examples repeated to pad the last
    batch of an epoch are recorded once; their second copy is missing from the sum of
    that step's rows. Under FSDP2 it is the same, and each process sketches its part of
    each parameter for the rows of steps.

    Training is bit for bit what it is without the callback. Rows are written before
    each checkpoint; training that resumes from a checkpoint ends with the rows of
    training that never stopped. Open them with `hf_sketch.load_sketches(output_dir)`.

    Args:
        out_size: numbers per sketch.
        layout: "factored" (cheap per-example rows) or "blocked" (more accurate, but
            forms each example's weight gradients); see `ModelSketch`.
        operator: sketch of each parameter, or of those that "factored" does not
            factor; see `ModelSketch`.
        seed: seed of the sketch; by default the Trainer's own.
        per_step: record a row per step.
        per_example: record a row per example.
        every_steps: record the steps whose number is a multiple of this.
        loss: an example's own loss, the "mean" or the "sum" over its tokens.
        row_dtype: type of the stored rows: "float32", or "float16" or "int8", each row
            with a scale.
        measure_error: compare the first rows of a new store with the exact gradients of
            three examples; the result is in the store's header.
        on_error: what to do where the disk is full or memory runs out while recording:
            "raise" an error that stops training, or "warn", stop recording in all
            processes and continue training.

    Raises:
        ValueError: a bad argument; before any training time is spent, a model, a
            setting of the Trainer or a store that does not fit, a second such callback
            in one Trainer, or one callback in two Trainers at once.
        OSError: with on_error="raise", rows cannot be written.
    """

    out_size: int = 4096
    _: KW_ONLY
    layout: str = "factored"
    operator: str = "srht"
    seed: int | None = None
    per_step: bool = True
    per_example: bool = True
    every_steps: int = 1
    loss: str = "mean"
    row_dtype: str = "float32"
    measure_error: bool = True
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        check_count("out_size", self.out_size)
        check_count("every_steps", self.every_steps)
        check_count("seed", self.seed, least=0, optional=True)
        check_flag("per_step", self.per_step)
        check_flag("per_example", self.per_example)
        check_flag("measure_error", self.measure_error)
        check_choice("on_error", self.on_error, get_args(OnError))
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("operator", self.operator, OPERATORS)
        check_choice("row_dtype", self.row_dtype, ROW_DTYPES)
        check_reduction(self.loss)
        if not (self.per_step or self.per_example):
            raise ValueError(
                "per_step and per_example are both False, so nothing would be "
                "recorded. Remove the callback."
            )
        self._run: Run | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the run, so that copies of a Trainer share no store."""
        return {**vars(self), "_run": None}

    def on_init_end(self, *event: Any, **kwargs: Any) -> None:
        for trainer in islice(calling_trainers(), 1):
            _check_alone(trainer)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        train_dataloader: DataLoader[Any],
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        trainer = self._calling_trainer()
        self._do(Run.close)  # of training that an exception has ended
        self._run = None
        check_processes(args, model, type(self).__name__, in_shards=True)
        check_same(type(self).__name__, vars(self))
        seed = args.seed if self.seed is None else self.seed
        sketch = ModelSketch.from_model(
            model, self.out_size, self.layout, seed, self.operator
        )
        examples = step_examples(args, state)
        self._run = Run(
            Header(sketch, self.loss, self.row_dtype, step_examples=examples),
            args,
            state,
            model,
            train_dataloader,
            optimizer,
            per_step=self.per_step,
            per_example=self.per_example,
            every_steps=self.every_steps,
            measure_error=self.measure_error,
            raises=self.on_error == "raise",
        )
        self._run.closing.callback(wrap_training_step(trainer, self._training_step))

    # Every event comes with (args, state, control), which the run has from the start.

    def on_epoch_begin(self, *event: Any, **kwargs: Any) -> None:
        self._do(Run.start_epoch)

    def on_step_begin(self, *event: Any, **kwargs: Any) -> None:
        self._do(Run.start_step)

    def on_pre_optimizer_step(self, *event: Any, **kwargs: Any) -> None:
        self._do(Run.end_gradient)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._do(Run.end_step)
        if control.should_save:  # the rows must be there before the checkpoint is
            self._do(Run.flush)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if control.should_save:
            self._do(Run.flush)

    def on_evaluate(self, *event: Any, **kwargs: Any) -> None:
        self._do(Run.flush)  # save_strategy="best" decides only now

    def on_save(self, *event: Any, **kwargs: Any) -> None:
        self._do(Run.flush)

    def on_train_end(self, *event: Any, **kwargs: Any) -> None:
        self._do(Run.end)
        self._run = None

    def _calling_trainer(self) -> Trainer:
        """Return the Trainer that is about to train, unless this cannot record it."""
        trainers = list(calling_trainers())
        if not trainers:
            raise RuntimeError(
                "GradientSketchCallback was called by no Trainer. Pass it to a "
                "Trainer of transformers: Trainer(..., callbacks=[callback])."
            )
        _check_alone(trainers[0])
        run = self._run
        if run is not None and any(run.state is outer.state for outer in trainers[1:]):
            raise ValueError(
                "This GradientSketchCallback still records the training around this "
                "one. Pass a GradientSketchCallback of its own to the inner Trainer."
            )
        return trainers[0]

    def _training_step(
        self, training_step: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run the Trainer's own step, with hooks on the model for as long."""
        if self._run is None:
            return training_step(*args, **kwargs)
        with self._run.micro_batch():
            loss = training_step(*args, **kwargs)
            self._run.end_micro_batch()
        return loss

    def _do(self, action: Callable[[Run], None]) -> None:
        """Do something with the run, if training is under way."""
        if self._run is not None:
            action(self._run)


def _check_alone(trainer: Trainer) -> None:
    """Raise if a Trainer has several of these callbacks."""
    callbacks = trainer.callback_handler.callbacks
    count = sum(isinstance(other, GradientSketchCallback) for other in callbacks)
    if count > 1:
        raise ValueError(
            f"This Trainer has {count} GradientSketchCallbacks, which would write to "
            "one store. Keep one: it can record rows of steps and of examples."
        )

"""The callback that sketches gradients while a Trainer trains."""

import logging
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from itertools import islice
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import has_length

from hf_sketch.examples.losses import check_reduction
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.groups import Grouping, check_grouping
from hf_sketch.model.sketch import LAYOUTS, ModelSketch
from hf_sketch.processes import check_same
from hf_sketch.sketches.by_name import OPERATORS
from hf_sketch.sketches.choices import (
    check_choice,
    check_count,
    check_flag,
    check_setting,
)
from hf_sketch.store.header import Header
from hf_sketch.store.rows import ROW_DTYPES

from .placement import check_processes, step_examples
from .recording.arriving import check_steps_late
from .recording.forecast import forecast
from .recording.normalizing import normalized
from .recording.origins.ids import warn_of_restart
from .recording.rehearsal import DryRun, Rehearsal
from .recording.run import Run
from .recording.sink import stored_layout
from .recording.trainers import (
    calling_trainers,
    free_trainer,
    only_callback,
    wrap_method,
)

logger = logging.getLogger(__name__)
OnError = Literal["raise", "warn"]


@dataclass(eq=False, repr=False)
class GradientSketchCallback(TrainerCallback):
    """Sketches the gradients of training into `<output_dir>/sketches`.

    It reuses the backward pass that training runs, for two kinds of rows:

    - per step: the sketch of the gradient that the optimizer sees, with the factor by
      which it was clipped;
    - per example: the sketch of the gradient of the example's own loss, with the row
      number of the example in `train_dataset` and its weight in the step: the weighted
      sum of a step's rows is the step's gradient before clipping, verified at first.

    Under DDP each process records its own examples. Examples repeated to pad the last
    batch of an epoch are recorded once; their second copy is missing from the sum of
    that step's rows. Under FSDP2 and DeepSpeed it is the same.

    Training is bit for bit what it is without the callback. Rows are written before
    each checkpoint; training that resumes from a checkpoint ends with the rows of
    training that never stopped. Open them with `hf_sketch.load_sketches(output_dir)`.
    The Trainer's logs get `sketch/top_example` and other numbers: docs/spikes.md.

    Args:
        out_size: numbers per sketch, or per group of layers.
        layout: "grouped" (cheap per-example rows), "blocked" (forms each example's
            weight gradients) or "factored" (of earlier releases); see `ModelSketch`.
            By default that of the store that training resumes, or else "grouped".
        operator: sketch of the parameters that the layout leaves; see `ModelSketch`.
        groups: number of groups of layers, each with a sketch of its own in a row, for
            `attribute(layers=...)`; or a regular expression per group, found in names
            of parameters: {"attention": "attn", "rest": None}. By default one sketch.
        seed: seed of the sketch; by default the Trainer's own.
        per_step: record a row per step.
        per_example: record a row per example.
        updates: also record what each step of the optimizer, and anything else, does to
            the weights, for `hf-sketch verify --from --to`; see docs/ledger.md. It
            takes a copy of the trained weights in memory.
        every_steps: record the gradients of steps whose number is a multiple of this.
        loss: an example's own loss, the "mean" or the "sum" over its tokens.
        normalize: "adam" divides each gradient element by the root of Adam's second
            moment, as LESS does. The moments are those of the checkpoint from which
            training resumes, and lie in the store; see `Normalizer`.
        row_dtype: type of the stored rows: "float32", or "float16" or "int8", each row
            with a scale.
        per_row: keep rows apart where a batch has several per example: the chosen and
            the rejected answer of a pair, or the documents of a packed example. A
            column `part` counts them. By default they add up to one.
        measure_error: before the first rows, compare each parameter's gradients of two
            examples with those of a backward pass per example, and read them another
            way where they differ; after them, compare rows of a new store with exact
            gradients of three (or this many) examples of that step, for its header.
        on_error: what to do where disk or memory run out while recording: "raise" an
            error that stops training, or "warn", stop recording in all processes.

    Raises:
        ValueError: a bad argument; before any training time is spent, a model, a
            setting of the Trainer or a store that does not fit, a second such callback
            in one Trainer, or one callback in two Trainers at once.
        OSError: with on_error="raise", rows cannot be written.
    """

    out_size: int = 4096
    _: KW_ONLY
    layout: str | None = None
    operator: str = "srht"
    groups: Grouping = 1
    seed: int | None = None
    per_step: bool = True
    per_example: bool = True
    updates: bool = False
    every_steps: int = 1
    loss: str = "mean"
    normalize: Literal["adam"] | None = None
    row_dtype: str = "float32"
    per_row: bool = False
    measure_error: bool | int = True
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        check_count("out_size", self.out_size)
        check_count("every_steps", self.every_steps)
        check_count("seed", self.seed, least=0, optional=True)
        check_flag("measure_error", self.measure_error, or_count=True)
        for flag in ("per_step", "per_example", "updates", "per_row"):
            check_flag(flag, getattr(self, flag))
        check_choice("on_error", self.on_error, get_args(OnError))
        if self.layout is not None:
            check_choice("layout", self.layout, LAYOUTS)
        check_choice("operator", self.operator, OPERATORS)
        check_grouping(self.groups)
        check_choice("row_dtype", self.row_dtype, ROW_DTYPES)
        check_choice("normalize", self.normalize or "adam", ("adam",))
        check_reduction(self.loss)
        if not (self.per_step or self.per_example or self.updates):
            raise ValueError(
                "per_step, per_example and updates are all False, so nothing would be "
                "recorded. Remove the callback."
            )
        self.run: Run | None = None  # the training that is under way

    @property
    def raises(self) -> bool:
        """Whether recording that fails stops training with an error."""
        return self.on_error == "raise"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the run, so that copies of a Trainer share no store."""
        return {**vars(self), "run": None}

    def on_init_end(self, *event: Any, **kwargs: Any) -> None:
        for trainer in islice(calling_trainers(), 1):
            only_callback(trainer, type(self))

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
        busy = None if self.run is None else self.run.state
        trainer = free_trainer(type(self), busy)
        self._do(Run.close)  # of training that an exception has ended
        self.run = None
        if self.updates:
            check_steps_late(optimizer, trainer.deepspeed)
        header = self._checked_header(args, state, model)
        rows = train_dataloader.dataset
        header = replace(header, train_rows=len(rows) if has_length(rows) else None)
        if self.normalize is not None:
            header = normalized(header, args, state, model, optimizer)
        warn_of_restart(train_dataloader, state)
        self.run = Run(header, trainer, model, train_dataloader, optimizer, self)
        undo = wrap_method(trainer, "training_step", self._training_step)
        self.run.closing.callback(undo)
        if state.is_world_process_zero:
            run = header, args, state, train_dataloader, self.run.coverage
            logger.info("Recording %s", forecast(*run, self))

    # Every event comes with (args, state, control), which the run has from the start.

    def on_epoch_begin(self, *event: Any, **kwargs: Any) -> None:
        self._do(Run.start_epoch)

    def on_step_begin(self, *event: Any, **kwargs: Any) -> None:
        self._do(Run.start_step)

    def on_pre_optimizer_step(self, *event: Any, **kwargs: Any) -> None:
        self._do(Run.end_gradient)

    def on_optimizer_step(self, *event: Any, **kwargs: Any) -> None:
        self._do(Run.record_weights)

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

    def on_epoch_end(self, *event: Any, **kwargs: Any) -> None:
        if event[2].should_save:
            self._do(Run.flush)

    def on_evaluate(self, *event: Any, **kwargs: Any) -> None:
        self._do(Run.flush)  # save_strategy="best" decides only now

    def on_save(self, *event: Any, **kwargs: Any) -> None:
        self._do(Run.flush)

    def on_train_end(self, *event: Any, **kwargs: Any) -> None:
        self._do(Run.end)
        self.run = None

    @staticmethod
    def dry_run(trainer: Trainer) -> DryRun:
        """Check a Trainer and its GradientSketchCallback on one batch, and print it.

        Training that follows is bit for bit what it is without: parameters, buffers,
        gradients, random numbers, the order of the data and `output_dir` stay as they
        are. The batch is drawn apart from the DataLoader; a stream is read from its
        start once more. All processes call together.

        Returns:
            what is printed: the forecast of the run and the time of a batch.

        Raises:
            ValueError: as in training; or the Trainer shards the model (FSDP,
                DeepSpeed), which it does only as training begins.
        """
        callback = only_callback(trainer, GradientSketchCallback)
        with Rehearsal(trainer) as rehearsal:
            args, model = trainer.args, rehearsal.model
            state, loader = rehearsal.state, rehearsal.loader
            header = callback._checked_header(args, state, model)
            sketcher = None
            if callback.per_example:
                sketcher = ExampleSketcher(model, header.model_sketch, header.loss)
            seconds = rehearsal.seconds(
                header.model_sketch, sketcher, callback.per_step
            )
            run = header, args, state, loader, sketcher and sketcher.coverage
            found = DryRun(forecast(*run, callback), *seconds)
        if state.is_world_process_zero:
            tqdm.write(str(found))
        return found

    def _checked_header(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module
    ) -> Header:
        """Return the header of the store, unless this training cannot be recorded."""
        name, every, last = type(self).__name__, self.every_steps, state.max_steps
        check_processes(args, model, name, compiled=True, in_shards=True)
        check_same(name, {**vars(self), "groups": str(self.groups)})
        allowed = f"at most {last}, the steps of this run"
        check_setting("every_steps", every <= last, allowed, every)
        seed = args.seed if self.seed is None else self.seed
        layout = self.layout or stored_layout(args, state.global_step) or "grouped"
        settings = self.out_size, layout, seed, self.operator, None, self.groups
        sketch = ModelSketch.from_model(model, *settings)
        header = Header(sketch, self.loss, self.row_dtype, per_row=self.per_row)
        return replace(header, step_examples=step_examples(args, state))

    def _training_step(
        self, training_step: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run the Trainer's own step, with hooks on the model for as long."""
        if self.run is None:
            return training_step(*args, **kwargs)
        with self.run.micro_batch(args[1] if args[1:] else kwargs["inputs"]):
            loss = training_step(*args, **kwargs)
            self.run.end_micro_batch()
        return loss

    def _do(self, action: Callable[[Run], None]) -> None:
        """Do something with the run, if training is under way."""
        if self.run is not None:
            action(self.run)

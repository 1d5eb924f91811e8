"""The callback that judges each step before the optimizer makes it."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_sketch.processes import check_same
from hf_sketch.sketches.choices import check_choice, check_count, check_number

from .gradient import GradientSketchCallback
from .guarding.watch import Watch
from .placement import check_processes
from .recording.arriving import steps_early
from .recording.run import Run
from .recording.trainers import free_trainer, only_callback

Action = Literal["log", "warn", "skip", "quarantine"]
_LEAST_WINDOW = 10


@dataclass(eq=False, repr=False)
class GuardCallback(TrainerCallback):
    """Watches training for batches with unusual losses, or that harm a guard set.

    It needs a `GradientSketchCallback` before it in the Trainer's list, and judges the
    rows that this records, by one or two measures:

    - loss: the mean of the examples' own losses with their weights, if they are known;
    - opposition, with `queries`: the same mean of minus the smallest cosine between an
      example's gradient and those of the guard set.

    A step stands out if a measure lies more than `threshold` robust standard deviations
    above its median over the last `window` recorded steps, as in `find_spikes`, or if
    rows are not finite. The examples named are the fewest without which the mean would
    lie at most one deviation above the median. All processes decide together.

    Each recorded step has a line in `<output_dir>/guard.jsonl`; `hf-sketch report`
    shows those that stand out. The Trainer's logs get `sketch/opposition` and
    `sketch/alarms`. While nothing stands out, training is bit for bit what it is
    without the callback. docs/guard.md has an example, and how well it works.

    Args:
        queries: the guard set, a dataset of training's own form with labels: a few
            dozen examples of what the model must not lose. By default only losses
            count, which find bad batches equally well (docs/guard.md).
        every: number of steps after which the guard set is sketched again.
        action: what to do before the optimizer steps: "log" to the file, also "warn",
            also "skip" the step, or "quarantine", which skips it and sets the labels
            of the named examples to -100 whenever they come again.
        threshold: robust standard deviations above the median.
        window: recorded steps that a step is compared with, and before the first one
            that is judged.

    Raises:
        ValueError: a bad argument; before any training time is spent, no
            GradientSketchCallback that records examples comes before it, or the
            Trainer shards the model or its optimizer steps within the backward pass.

    Examples:
        >>> from datasets import Dataset
        >>> guard = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]})
        >>> callbacks = [GradientSketchCallback(1024), GuardCallback(guard, every=50)]
    """

    queries: Any = None
    every: int = 100
    _: KW_ONLY
    action: Action = "warn"
    threshold: float = 3.0
    window: int = 50

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_choice("action", self.action, get_args(Action))
        check_number("threshold", self.threshold, least=0)
        check_count("window", self.window, least=_LEAST_WINDOW)
        self._watch: Watch | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the run, so that copies of a Trainer share none."""
        return {**vars(self), "_watch": None}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        busy = None if self._watch is None else self._watch.state
        self._watch = None
        trainer = free_trainer(type(self), busy)
        check_processes(args, model, type(self).__name__, compiled=True)
        check_same(type(self).__name__, vars(self))
        if steps_early(optimizer, trainer.deepspeed):
            raise ValueError(
                "GuardCallback does not support optimizers that step within the "
                "backward pass. Choose another optimizer, or remove the callback."
            )
        run = self._recorded(trainer)
        self._watch = Watch(self, trainer, run, model, optimizer)

    def on_step_begin(self, *event: Any, **kwargs: Any) -> None:
        if self._watch is not None:
            self._watch.start_step()

    def on_pre_optimizer_step(self, *event: Any, **kwargs: Any) -> None:
        if self._watch is not None:
            self._watch.end_gradient()

    def on_train_end(self, *event: Any, **kwargs: Any) -> None:
        self._watch = None

    def _recorded(self, trainer: Trainer) -> Run:
        """Return the run whose rows are judged."""
        recorder = only_callback(trainer, GradientSketchCallback)
        callbacks = trainer.callback_handler.callbacks
        if callbacks.index(recorder) > callbacks.index(self):
            raise ValueError(
                "GuardCallback comes before GradientSketchCallback. List it after: "
                "callbacks=[GradientSketchCallback(), GuardCallback(queries)]."
            )
        if recorder.run is None or not recorder.per_example:
            raise ValueError(
                "GuardCallback judges rows of examples. Pass per_example=True to "
                "GradientSketchCallback."
            )
        return recorder.run

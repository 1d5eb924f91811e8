"""One batch of a Trainer, run without leaving a trace."""

import copy
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import has_length

from hf_sketch.examples.calls import ModelCall
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.planning.units import as_seconds

from ..spectra.batches import draw_batches, own_randomness
from .forecast import Forecast
from .loss_check import LossCheck
from .origins.finder import Origins, in_turn
from .steps import left_gradients

_ROUNDS = 3


@dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Args:
        forecast: what the run is going to record.
        plain_seconds: forward and backward pass of a batch.
        recorded_seconds: the same with its rows.
    """

    forecast: Forecast
    plain_seconds: float
    recorded_seconds: float

    @property
    def slowdown(self) -> float:
        """The time of a recorded batch as a multiple of a plain one."""
        return self.recorded_seconds / self.plain_seconds

    def __str__(self) -> str:
        """Return a table."""
        recorded = f"{as_seconds(self.recorded_seconds)}, {self.slowdown:.2f} times"
        lines = [
            *self.forecast.lines(),
            ("a plain batch", as_seconds(self.plain_seconds)),
            ("a recorded batch", f"{recorded} a plain one"),
        ]
        return "\n".join(f"{name:32}{value}" for name, value in lines)


class Rehearsal:
    """A batch that a Trainer runs before it trains.

    Used as a context manager: on leaving, the Trainer, its model and all random numbers
    are as before. The batch is drawn from the dataset, not by the DataLoader's sampler.

    Args:
        trainer: a Trainer that has not begun to train.

    Raises:
        ValueError: the Trainer shards its model, as it begins to train.
    """

    def __init__(self, trainer: Trainer) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "A dry run needs the model as it trains, but FSDP and DeepSpeed split "
                "it as training begins. Train one step instead, with max_steps=1."
            )
        assert isinstance(trainer.model, nn.Module)
        self.model = trainer.model
        self._trainer = trainer
        self._stack = ExitStack()
        self.state = TrainerState()

    def __enter__(self) -> "Rehearsal":
        trainer, args = self._trainer, self._trainer.args
        with self._stack as stack:
            stack.enter_context(own_randomness(args.seed))
            stack.enter_context(_kept(trainer, self.model))
            self.loader = trainer.get_train_dataloader()
            (batch,) = draw_batches(self.loader, 1, args.train_batch_size, args.seed)
            self._batches, self._items = trainer.get_batch_samples(
                iter([batch]), 1, args.device
            )
            self._stack = stack.pop_all()
        self.state.max_steps = _steps(trainer, self.loader)
        self.state.compute_steps(args, self.state.max_steps)
        trainer.current_gradient_accumulation_steps = 1
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def seconds(
        self, sketch: ModelSketch, sketcher: ExampleSketcher | None, per_step: bool
    ) -> tuple[float, float]:
        """Return the seconds of a plain batch and of a recorded one, the least of 3."""
        reader = left_gradients(sketch, sketch.parameters_of(self.model))
        losses = None if sketcher is None else LossCheck(self._trainer, sketcher)

        def recorded() -> None:
            with ExitStack() as hooks:
                if sketcher is not None:
                    hooks.enter_context(sketcher)
                if losses is not None:
                    hooks.enter_context(losses.watching(self._origins_of))
                self._run()
                if sketcher is not None:
                    sketcher.take()
            if per_step:
                reader.note()
                reader.columns({}, 1.0)

        self._timed(recorded)  # the first time costs more
        rounds = [
            (self._timed(self._run), self._timed(recorded)) for _ in range(_ROUNDS)
        ]
        plain, rows = zip(*rounds, strict=True)
        return min(plain), min(rows)

    def _origins_of(self, calls: Sequence[ModelCall]) -> Origins | None:
        """Return whose the rows of the model's calls are, if they lie in order."""
        main_input = getattr(self.model, "main_input_name", "input_ids")
        return in_turn(calls, self._batches[0], main_input)

    def _run(self) -> None:
        """Run the forward and the backward pass."""
        trainer = self._trainer
        with trainer.accelerator.autocast():  # as the prepared model does
            batch = copy.copy(self._batches[0])
            trainer.training_step(self.model, batch, self._items)

    def _timed(self, run: Callable[[], None]) -> float:
        """Return the seconds of something, with gradients that begin at zero."""
        self.model.zero_grad()
        _synchronize()
        start = time.perf_counter()
        run()
        _synchronize()
        return time.perf_counter() - start


def _steps(trainer: Trainer, loader: Any) -> int:
    """The optimizer steps of the Trainer's run."""
    args = trainer.args
    if args.max_steps > 0 or not has_length(loader):
        return args.max_steps
    each = max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * each)


@contextmanager
def _kept(trainer: Trainer, model: nn.Module) -> Generator[None]:
    """Restore the Trainer's own attributes, and the model's state but its weights."""
    attributes = dict(vars(trainer))
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(attributes)
        for module, mode in modes.items():
            module.training = mode
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def _synchronize() -> None:
    """Wait until the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()

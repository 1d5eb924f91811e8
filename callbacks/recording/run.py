"""One run of a Trainer: where training is, and which rows it gives."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_sketch.examples.coverage import ModuleCoverage
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.fsdp import in_shards
from hf_sketch.processes import OtherProcessFailedError, check_others
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP

from .arriving import learning_rate, loss_scale, step_reader
from .examples import ExampleReader
from .forecast import RecordSettings
from .live import Follower, LiveLog
from .origins.answers import generates_answers
from .sink import RowSink
from .steps import StepReader, SumCheck, computes_in_16_bits
from .stopping import unless_stopped, warn_of_stop
from .weights import WeightLedger


class Run:
    """Records the steps and the examples of one run.

    Where memory or disk run out in one process, recording stops: with an error, or in
    all processes at the next recorded step, while training continues.

    Args:
        header: header of the store.
        trainer: the one that trains.
        model: the model that trains.
        loader: the training DataLoader.
        optimizer: the one that steps, with a `scaler` under fp16.
        settings: which rows to record.
    """

    def __init__(
        self,
        header: Header,
        trainer: Trainer,
        model: nn.Module,
        loader: DataLoader[Any],
        optimizer: Optimizer,
        settings: RecordSettings,
    ) -> None:
        args, state = trainer.args, trainer.state
        self.stopped, self.raises = False, settings.raises
        self._since = 0  # the first step that lacks rows, once recording has stopped
        self._agrees = args.world_size > 1 and not settings.raises
        self._every_steps = settings.every_steps
        self._args, self.state, self._optimizer = args, state, optimizer
        self._epoch, self._micro_step = int(state.epoch or 0) - 1, 0
        self._low_precision = computes_in_16_bits(args, model)
        compares = settings.per_example and settings.per_step
        self._sum = SumCheck(compares, self._low_precision)
        self._examples: ExampleReader | None = None
        self._steps: StepReader | None = None
        self._ledger: WeightLedger | None = None
        self._updates = settings.updates
        self._engine = trainer.deepspeed
        self._rate, self._loss_scale = 0.0, 1.0
        self._live = LiveLog(args.world_size)
        self.followers: list[Follower] = [self._live.add_examples]
        self._open(header, trainer, model, loader, settings)
        self._compares_jointly = settings.per_example and in_shards(model.parameters())

    @unless_stopped
    def start_epoch(self) -> None:
        """Begin a pass over the training set."""
        self._epoch += 1
        if self._examples is not None:
            self._examples.start_epoch()

    @unless_stopped
    def start_step(self) -> None:
        """Begin an optimizer step."""
        self._micro_step = 0
        for reader in (self._live, self._sum, self._steps, self.sketcher):
            if reader is not None:
                reader.start_step()

    @contextmanager
    def micro_batch(self, collated: Any) -> Generator[None]:
        """Hold hooks on the model for a pass over a loader's batch."""
        if self._compares_jointly and self.is_recorded and not self._micro_step:
            self._agree()  # or others would wait for one that has stopped
        if self._examples is not None and not self.stopped:
            self._examples.start_batch(collated)
        with ExitStack() as hooks:
            self._rate = learning_rate(self._optimizer)  # before it steps
            if self.is_recorded and not self.stopped:
                self._loss_scale = loss_scale(self._optimizer)
                if self._examples is not None:
                    watch = self._examples.watching(first=not self._sum.done)
                    hooks.enter_context(watch)
                if self._steps is not None:
                    hooks.enter_context(self._steps.watched(self.sketcher))
            yield

    @unless_stopped
    def end_micro_batch(self) -> None:
        """Record the examples of a backward pass that has run, before hooks go."""
        if self.is_recorded:
            if self._steps is not None:
                self._steps.note()
            if self._examples is not None:
                self._record_examples(self._examples)
        self._micro_step += 1

    def end_gradient(self) -> None:
        """Record the step whose gradient is complete."""
        if self.is_recorded:
            if self._micro_step == 0 and not self.stopped:
                raise RuntimeError(
                    "GradientSketchCallback records within Trainer.training_step, which"
                    " this Trainer did not call. Call it for each batch, or remove the "
                    "callback."
                )
            self._agree()
            self._record_step()
        self.record_weights(by_optimizer=False)

    def record_weights(self, by_optimizer: bool = True) -> None:
        """Record how the optimizer, or something before it, changed the weights."""
        if self._updates:
            self._agree()
            self._record_weights(by_optimizer)

    @unless_stopped
    def end_step(self) -> None:
        """Write rows if there are many, now that the optimizer has stepped."""
        self._sink.end_step()

    @unless_stopped
    def flush(self) -> None:
        """Write all rows."""
        self._sink.flush()

    def end(self) -> None:
        """Write all rows, as training ends."""
        self.flush()
        self._sink.writer.join_files()
        self._agree()
        self.close()

    def close(self) -> None:
        """Close the store; rows that are not written are dropped."""
        self._ledger = None
        if self._examples is not None:
            self._examples.forget()
        self.closing.close()

    def stop(self, reason: str, since: int | None = None) -> None:
        """Record nothing from now on, and say so in the store and to the user.

        Args:
            reason: what went wrong.
            since: the first step that lacks rows; None for what this process knows.
        """
        self.stopped = True
        self.close()
        self._since = self._sink.writer.last_step + 1
        with suppress(OSError):  # the error that matters is known already
            self._sink.writer.note_gap(reason, None if since is None else since - 1)
        if not self.raises:
            warn_of_stop(reason)

    def _open(
        self,
        header: Header,
        trainer: Trainer,
        model: nn.Module,
        loader: DataLoader[Any],
        settings: RecordSettings,
    ) -> None:
        """Open the store; an error gives the loader its sampler back."""
        step, sketch = self.state.global_step, header.model_sketch
        with ExitStack() as opened:
            if settings.per_example:
                measured = settings.measure_error
                self._examples = ExampleReader(
                    header, trainer, model, loader, self._optimizer, measured
                )
                opened.callback(self._examples.close)
                header = replace(header, answers=generates_answers(trainer))
            if settings.per_step:
                self._steps = step_reader(sketch, model, self._optimizer, self._engine)
            opened.callback(self._live.watch(trainer))
            self._sink = RowSink.open(header, self._args, step)
            opened.callback(self._sink.close)
            if self._updates:
                self._ledger = WeightLedger(sketch, model, self._sink.append)
                self._ledger.start_run(self._epoch + 1, step)
            if self._examples is not None:
                writer = self._sink.writer
                if writer.has_answers:
                    opened.callback(self._examples.follow_answers(trainer))
                if writer.measured_error is not None or self._args.process_index > 0:
                    self._examples.forget()  # the error is known, or another's to take
            self.closing = opened.pop_all()

    @property
    def sketcher(self) -> ExampleSketcher | None:
        """What reads the rows of examples, if they are recorded."""
        return None if self._examples is None else self._examples.sketcher

    @property
    def drawn(self) -> Sequence[int | None] | None:
        """The ids of the present batch's examples, as far as they are followed."""
        return None if self._examples is None else self._examples.drawn

    @property
    def coverage(self) -> ModuleCoverage | None:
        """How each module's gradients are read; None without rows of examples."""
        return None if self.sketcher is None else self.sketcher.coverage

    @property
    def is_recorded(self) -> bool:
        """Whether the present step is one of those to record."""
        return (self.state.global_step + 1) % self._every_steps == 0

    @property
    def _position(self) -> dict[str, float]:
        """The columns that say where in training a row was recorded."""
        step = self.state.global_step + 1
        return {"epoch": self._epoch, "step": step, "learning_rate": self._rate}

    def _record_examples(self, examples: ExampleReader) -> None:
        """Hand on the rows of a batch, and add them up."""
        place = {**self._position, "micro_step": self._micro_step}
        batch, columns = examples.read(place, self._loss_scale)
        self._sum.add(batch)
        if len(columns["example_id"]):
            self._sink.append(PER_EXAMPLE, columns)
            for follow in self.followers:
                follow(columns)

    @unless_stopped
    def _record_step(self) -> None:
        """Hand on the step's row, and compare it with the sum of its examples'.

        In several processes, all that they do together comes before all that can fail.
        """
        self._sum.join()
        if self._steps is not None:
            row = self._steps.columns(self._position, self._loss_scale)
            self._live.end_step(row)
            if self._args.process_index == 0:
                self._sink.append(PER_STEP, row)
            self._sink.writer.note(unowned=self._sum.check(row))
        if self._examples is not None:
            unverified = self._examples.sketcher.unverified
            error = self._examples.measure(self._low_precision)
            self._sink.writer.note(unverified=unverified, measured_error=error)

    @unless_stopped
    def _record_weights(self, by_optimizer: bool) -> None:
        """Hand on a change of the weights."""
        assert self._ledger is not None
        step = self.state.global_step + by_optimizer
        self._ledger.record({**self._position, "step": step}, by_optimizer)

    def _agree(self) -> None:
        """Stop recording in all processes if it has stopped in one."""
        if not self._agrees:
            return
        try:
            check_others(self._since)
        except OtherProcessFailedError as error:
            self._agrees = False
            if not self.stopped:
                self.stop("recording failed in another process", error.since)

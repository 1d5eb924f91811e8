"""What a run is going to record, known before its first step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import DataLoader
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from hf_sketch.examples.coverage import ModuleCoverage
from hf_sketch.planning.disk import RowFormat, store_size
from hf_sketch.planning.units import as_bytes
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP, UPDATE

from ..placement import step_examples


class RecordSettings(Protocol):
    """Which rows a run records; see `GradientSketchCallback`."""

    per_step: bool
    per_example: bool
    updates: bool
    every_steps: int
    measure_error: bool | int

    @property
    def raises(self) -> bool:
        """Whether to raise an error where memory or disk run out, rather than warn."""
        ...


@dataclass(frozen=True)
class Forecast:
    """What a run is going to record.

    Args:
        parameters: number of parameters that are sketched.
        elements: how many numbers they hold.
        modules: how each module's gradients are read; None without rows of examples.
        example_rows: rows of examples, over the whole run and all processes. Batches
            that hold other numbers of examples than the Trainer's settings say give
            other numbers of rows.
        step_rows: rows of steps.
        update_rows: rows of updates.
        total_bytes: bytes on disk, less the header.
    """

    parameters: int
    elements: int
    modules: ModuleCoverage | None
    example_rows: int
    step_rows: int
    update_rows: int
    total_bytes: int

    def __str__(self) -> str:
        """Return it all in one line."""
        return ", ".join(f"{name}: {value}" for name, value in self.lines())

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield what is forecast, and its value."""
        elements = f"{self.parameters:,} ({self.elements:,} elements)"
        yield "parameters", elements
        if self.modules is not None:
            yield "modules by rule", f"{len(self.modules.by_rule):,}"
            yield "modules run again per example", f"{len(self.modules.run_again):,}"
        yield "rows of examples", f"{self.example_rows:,}"
        yield "rows of steps", f"{self.step_rows:,}"
        if self.update_rows:
            yield "rows of updates", f"{self.update_rows:,}"
        yield "bytes on disk", f"about {as_bytes(self.total_bytes)}"


def forecast(
    header: Header,
    args: TrainingArguments,
    state: TrainerState,
    loader: DataLoader[Any],
    modules: ModuleCoverage | None,
    settings: RecordSettings,
) -> Forecast:
    """Return what a run is going to record, from its settings alone.

    Args:
        header: header of the store.
        args: the Trainer's settings.
        state: the Trainer's, with the run's `max_steps`.
        loader: the training DataLoader.
        modules: coverage of the rows of examples; None for rows of steps alone.
        settings: which rows are recorded.
    """
    every_steps, per_step = settings.every_steps, settings.per_step
    sketch, steps = header.model_sketch, state.max_steps // every_steps
    rows, kind = 0, PER_STEP
    ranks, flushed = 1, None
    if modules is not None:
        rows = _example_rows(args, state, loader, every_steps)
        ranks, kind = args.world_size, PER_EXAMPLE
    if args.save_strategy == "steps":
        flushed = max(1, state.save_steps // every_steps)
    groups = sketch.layer_groups.count
    size = store_size(
        RowFormat(kind, sketch.row_size, header.row_dtype, groups),
        rows_a_step=step_examples(args, state) // ranks if modules is not None else 1,
        steps=steps,
        per_step=per_step and modules is not None,
        ranks=ranks,
        flush_steps=flushed,
    )
    missing = size.rows - rows if modules is not None else 0
    updates = state.max_steps * settings.updates
    update_bytes = RowFormat(UPDATE, sketch.row_size).row_bytes
    return Forecast(
        parameters=len(sketch.shapes),
        elements=sketch.in_size,
        modules=modules,
        example_rows=rows,
        step_rows=steps * per_step,
        update_rows=updates,
        total_bytes=round(
            size.total_bytes - missing * size.row_bytes + updates * update_bytes
        ),
    )


def _example_rows(
    args: TrainingArguments,
    state: TrainerState,
    loader: DataLoader[Any],
    every_steps: int,
) -> int:
    """The examples of all recorded steps; the last one of an epoch may have fewer."""
    each, steps = step_examples(args, state), state.max_steps
    rows = each * (steps // every_steps)
    dataset: Any = loader.dataset
    if not has_length(loader) or not has_length(dataset):
        return rows
    accumulated = args.gradient_accumulation_steps
    batches = len(loader)
    in_epoch = max(1, math.ceil(batches / accumulated))
    examples = len(dataset)
    if args.dataloader_drop_last:
        examples = batches * each // accumulated
    short = steps // math.lcm(every_steps, in_epoch)
    return rows - short * (in_epoch * each - examples)
